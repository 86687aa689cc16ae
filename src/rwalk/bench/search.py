"""Tuning: Optuna tries strengths on a stream's first tasks and judges them on held-out training examples."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rwalk._errors import printable, warn
from rwalk._io import files
from rwalk.bench.holdout import VALIDATION, early
from rwalk.bench.imports import check_kept
from rwalk.bench.methods import Method
from rwalk.bench.optimisation import Training
from rwalk.bench.pool import Failure, Outcome, outcomes
from rwalk.bench.record import Record
from rwalk.bench.spec import RunSpec
from rwalk.bench.streams import Experience
from rwalk.bench.tuned import Tuned

SPREAD = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""Strengths tried when none are given, as multiples of the default one."""
ROUND = 4
"""Trials that are proposed together, so that the search is the same with any number of workers."""
Evaluate = Callable[[list[RunSpec]], Iterable[tuple[RunSpec, Outcome]]]


def tune(
    stream: Sequence[Experience],
    method: Method,
    strengths: Sequence[float] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    training: Training | None = None,
    *,
    tasks: int = 3,
    validation: float = 0.2,
    refine: int = 0,
    workers: int = 1,
    out: str | Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> Tuned:
    """Try strengths on the first tasks of a stream, and return the best one with all trials.

    Args:
        stream: the whole stream; only training examples of its first tasks are read.
        method: "default", "recipe" or a rule such as `RWalk()`.
        strengths: what to try, above 0; nine values around the default when None, from a hundredth of it to a hundred times.
        learning_rates: what to try with each strength; that of `training` when None.
        seeds: of initial weights and batch order; accuracies are averaged over them.
        training: as for `rwalk.bench.run`.
        tasks: how many tasks to try on.
        validation: which share of their training examples is held out.
        refine: how many further pairs of values to try, between those given, where Optuna's sampler expects better.
        workers: processes that try side by side.
        out: folder for Optuna's journal and a record of each trial, from which the same call continues; none when None.
        device: as for `rwalk.bench.run`.
        options: `pull` and the like, as for `rwalk.bench.run`.

    Raises:
        ValueError: if a value is out of range, or no trial succeeded.
    """
    spec = RunSpec(early(stream, tasks, validation), method, training=training or Training(), device=device, **options)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_kept(spec.training.model)
        files.folder(folder)
    search = Search(spec, strengths, learning_rates, seeds, refine)
    return search.result(lambda specs: _aloud(outcomes(specs, folder, workers)), folder)


def _aloud(found: Iterable[tuple[RunSpec, Outcome]]) -> Iterator[tuple[RunSpec, Outcome]]:
    """Repeat the warnings of runs in this process, each text once."""
    said = set[str]()
    for spec, outcome in found:
        for text in outcome.warnings:
            if text not in said:
                warn(text)
        said.update(outcome.warnings)
        yield spec, outcome


class Search:
    """Which strengths and learning rates to try: a grid first, then what Optuna's TPE sampler proposes.

    Args:
        spec: the run whose strength, learning rate and seed vary, on tasks from `early`.
        strengths, learning_rates, seeds, refine: as for `tune`.
    """

    def __init__(
        self,
        spec: RunSpec,
        strengths: Sequence[float] | None,
        learning_rates: Sequence[float] | None,
        seeds: Sequence[int],
        refine: int = 0,
    ) -> None:
        spec.check()
        if spec.settings is None:
            raise ValueError(f"Method `{spec.method_name}` has no strength; tune default, recipe or a rule.")
        if not spec.tasks[0].higher:
            raise ValueError("Tuning looks for the highest score, and a lower one is better here. Negate the metric.")
        if refine < 0:
            raise ValueError(f"{refine} trials to refine are out of range; pass 0 or more.")
        self.spec, self.seeds, self.refine = spec, list(seeds), refine
        self.ends = {
            "strength": positive("strength", strengths or [spec.settings.strength * s for s in SPREAD]),
            "lr": positive("learning rate", learning_rates or [spec.training.lr]),
        }
        self.grid = [dict(zip(self.ends, pair, strict=True)) for pair in product(*self.ends.values())]

    def result(self, evaluate: Evaluate, folder: Path | None = None) -> Tuned:
        """Try all values, and return what was chosen.

        Args:
            evaluate: does runs, in any order.
            folder: where Optuna keeps its journal, from which the same search continues.
        """
        optuna = _optuna()
        space = {key: optuna.distributions.FloatDistribution(v[0], v[-1], log=True) for key, v in self.ends.items()}
        study = self._study(optuna, folder)
        trials = [t.user_attrs["result"] for t in study.get_trials(deepcopy=False) if "result" in t.user_attrs]
        while points := self._next(trials):
            study.sampler = _sampler(optuna, len(trials))
            for point in filter(None, points):
                study.enqueue_trial(point)
            trials += self._tried([study.ask(space) for _ in points], study, evaluate)
        return self._chosen(sorted(trials, key=lambda t: (t["lr"], t["strength"])))

    def _next(self, trials: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Return what of the grid is left to try, or else an empty point for each that Optuna is to propose."""
        tried = [{name: trial[name] for name in self.ends} for trial in trials]
        left = len(self.grid) + self.refine - len(trials)
        return [point for point in self.grid if point not in tried] or [{}] * min(ROUND, left)

    def _tried(self, asked: list[Any], study: Any, evaluate: Evaluate) -> Iterator[dict[str, Any]]:
        """Do the runs of some trials, and hand each result to Optuna and to the caller as its last run ends."""
        owners = {self._run(trial, seed): trial for trial in asked for seed in self.seeds}
        found: dict[int, dict[int, Record | Failure]] = {trial.number: {} for trial in asked}
        for spec, outcome in evaluate(list(owners)):
            trial = owners[spec]
            results = found[trial.number]
            results[spec.seed] = outcome.result
            if len(results) == len(self.seeds):
                yield _told(study, trial, {seed: results[seed] for seed in self.seeds})

    def _run(self, trial: Any, seed: int) -> RunSpec:
        strength, lr = trial.params["strength"], trial.params["lr"]
        return replace(self.spec, strength=strength, seed=seed, training=replace(self.spec.training, lr=lr))

    def _chosen(self, trials: list[dict[str, Any]]) -> Tuned:
        """Return the best trial; of several, that with the smallest strength."""
        spec, good = self.spec, [t for t in trials if t["accuracy"] is not None]
        if not good:
            cause = trials[0]["failures"][0]
            raise ValueError(f"No run of `{spec.method_name}` succeeded; try smaller values. The first failed so: {cause}")
        best = max(good, key=lambda t: (t["accuracy"], -t["strength"]))
        edge = [key for key, values in self.ends.items() if len(values) > 1 and best[key] in (values[0], values[-1])]
        values = best["strength"], best["lr"], best["accuracy"], len(spec.tasks), trials, spec.configuration, edge
        first = spec.tasks[0]
        return Tuned(spec.method_name, first.stream["name"].removesuffix(VALIDATION), *values, first.metric)

    def _study(self, optuna: Any, folder: Path | None) -> Any:
        """Return the study of this search, from its journal in a folder if there is one."""
        if folder is None:
            return optuna.create_study(direction="maximize")
        about = [self.spec.method_name, self.spec.configuration, self.grid, self.seeds]
        path = folder / f"{files.digest(files.as_json(about))[:10]}.journal"
        try:
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
            study = optuna.create_study(storage=storage, study_name="tuning", direction="maximize", load_if_exists=True)
            for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of an attempt that was stopped
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(printable(f"`{path}` cannot be read as Optuna's journal ({error}). Move it away.")) from None
        return study


def _optuna() -> Any:
    """Return the package, which is imported for a search alone."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError(f"Tuning needs the package `optuna` ({error}). Run: pip install 'rwalk[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(optuna: Any, seed: int) -> Any:
    """Return a sampler that proposes the same after the same trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `constant_liar`, before Optuna 5
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)


def _told(study: Any, trial: Any, results: dict[int, Record | Failure]) -> dict[str, Any]:
    """Hand the mean accuracy over seeds to Optuna, and return it with its parts; of a worker that died nothing is kept."""
    from optuna.trial import TrialState

    accuracies = {str(seed): r.average for seed, r in results.items() if isinstance(r, Record)}
    failures = [r for r in results.values() if isinstance(r, Failure)]
    value = None if failures else fmean(a or 0.0 for a in accuracies.values())
    result = {**trial.params, "accuracy": value, "seeds": accuracies, "failures": [f.cause for f in failures]}
    if all(failure.known for failure in failures):
        trial.set_user_attr("result", result)
    study.tell(trial, value, TrialState.FAIL if failures else TrialState.COMPLETE)
    return result


def positive(name: str, values: Iterable[float]) -> list[float]:
    """Sort values of a logarithmic scale, and take each one once."""
    values = sorted(set(map(float, values)))
    if not all(0 < v < math.inf for v in values):
        raise ValueError(f"A {name} among {values} is out of range; pass finite numbers above 0.")
    return values
