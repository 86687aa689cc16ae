"""Tuning: which strength serves a method best, tried on a stream's first tasks and judged on held-out training examples.

No test example is read, and the other tasks are for the runs that count: `later` returns them. Chaudhry et al. chose so in
"Efficient Lifelong Learning with A-GEM" (ICLR 2019).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from rwalk._errors import explain
from rwalk.bench.experience import Experience, Part, check, label_counts
from rwalk.bench.grid import Failure, once, outcomes
from rwalk.bench.learners import Training
from rwalk.bench.record import Record
from rwalk.bench.runner import Method, called, configuration, record_name, run
from rwalk.bench.tuned import Tuned, tuned_name

SPREAD = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""Strengths tried when none are given, over the default one."""
ROUND = 4
"""Trials that are proposed together, so that the search is the same with any number of workers."""
VALIDATION = "-validation"
"""What the name of a stream ends in whose test examples are held out from training."""


class Candidate(NamedTuple):
    """What one trial tries: a strength and a learning rate, with one seed."""

    strength: float
    lr: float
    seed: int


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
        method: "recipe" or a rule such as `RWalk()`.
        strengths: what to try, above 0; nine values around the default when None, from a hundredth of it to a hundred times.
        learning_rates: what to try with each strength; that of `training` when None.
        seeds: of initial weights and batch order; accuracies are averaged over them.
        training: as for `rwalk.bench.run`.
        tasks: how many tasks to try on.
        validation: which share of their training examples is held out.
        refine: how many further pairs of values to try, between those given, where Optuna's sampler expects better.
        workers: processes that try side by side.
        out: folder for a record of each trial, from which the same call goes on; none when None.
        device: as for `rwalk.bench.run`.
        options: `pull` and the like, as for `rwalk.bench.run`.

    Raises:
        ValueError: if a value is out of range, or no trial succeeded.
    """
    training = training or Training()
    first = early(stream, tasks, validation)
    search = Search(first, method, strengths, learning_rates, seeds, training, refine, **options)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    common = (first, method, training, options, out, device)
    return search.result(lambda candidates: outcomes(_trial, {c: c for c in candidates}, workers, common=common))


def _trial(common: tuple[Any, ...], strength: float, lr: float, seed: int) -> Record:
    stream, method, training, options, out, device = common
    training = replace(training, lr=lr)
    if out is None:
        return run(stream, method, strength, seed, training, device=device, **options)
    place = Path(out) / record_name(stream, method, strength, seed, training, **options)
    return once(place, stream, method, strength, seed, training, device=device, **options)[0]


def early(stream: Sequence[Experience], tasks: int = 3, validation: float = 0.2) -> list[Experience]:
    """Return the first tasks of a stream, with a share of their training examples in place of their test examples.

    Raises:
        ValueError: if the stream has fewer tasks, a task would be left without examples, or no label competes with another.
    """
    check(stream)
    _within(stream, tasks, 1)
    about = stream[0].stream
    about = about | {"name": about["name"] + VALIDATION, "tasks": tasks, "validation": validation}
    parts = [_divided(e.train, validation) for e in stream[:tasks]]
    found = [replace(e, stream=about, train=train, test=test) for e, (train, test) in zip(stream, parts, strict=False)]
    if all(task["compete"] == 1 for task in label_counts(found)):
        came = "tasks with a single label to choose from, on which every strength is right"
        raise ValueError(explain(came, "several labels in a task", "Take fewer tasks in the stream, or another scenario."))
    return found


def later(stream: Sequence[Experience], tasks: int = 3) -> list[Experience]:
    """Return the stream without its first tasks.

    Raises:
        ValueError: if nothing would be left.
    """
    _within(stream, tasks, 0, spare=1)
    if tasks == 0:
        return list(stream)
    about = stream[0].stream | {"tasks": len(stream) - tasks, "skipped": tasks}
    return [replace(e, task=k, stream=about) for k, e in enumerate(stream[tasks:])]


def _within(stream: Sequence[Experience], tasks: int, least: int, spare: int = 0) -> None:
    if not least <= tasks <= len(stream) - spare:
        came, most = f"{tasks} tasks of a stream of {len(stream)}", len(stream) - spare
        raise ValueError(explain(came, f"{least} to {most}", "Pass such a number, or a longer stream."))


def _divided(part: Part, validation: float) -> tuple[Part, Part]:
    """Divide training examples at random, the same way each time; the second part is held out."""
    count = round(validation * len(part)) if 0 < validation < 1 else 0
    if not 0 < count < len(part):
        came = f"a share of {validation} of {len(part)} examples to hold out"
        raise ValueError(explain(came, "a share between 0 and 1 that leaves examples on both sides", "Pass such a share."))
    rows = torch.arange(len(part.y)) if part.rows is None else part.rows
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0), device="cpu")
    held, kept = (rows[some.sort().values] for some in order.split([count, len(part) - count]))
    return replace(part, rows=kept), replace(part, rows=held)


class Search:
    """Which candidates to try, and which of them was best: a grid, then what Optuna's TPE sampler proposes.

    Args:
        stream: what they are tried on, from `early`.
        method, strengths, learning_rates, seeds, training, refine, options: as for `tune`.
    """

    def __init__(
        self,
        stream: Sequence[Experience],
        method: Method,
        strengths: Sequence[float] | None,
        learning_rates: Sequence[float] | None,
        seeds: Sequence[int],
        training: Training,
        refine: int = 0,
        **options: Any,
    ) -> None:
        self.config = configuration(stream, method, None, training, **options)
        if "strength" not in self.config:
            came = f"method `{called(method)}`, which has no strength"
            raise ValueError(explain(came, "recipe or a rule", "Tune another method."))
        if refine < 0:
            raise ValueError(explain(f"{refine} trials to refine", "0 or more", "Pass such a number."))
        self.method, self.tasks, self.seeds = called(method), len(stream), list(seeds)
        self.name = stream[0].stream["name"].removesuffix(VALIDATION)
        self.ends = {
            "strength": _positive("strength", strengths or [self.config["strength"] * s for s in SPREAD]),
            "lr": _positive("learning rate", learning_rates or [training.lr]),
        }
        self.grid = [dict(zip(self.ends, pair, strict=True)) for pair in product(*self.ends.values())]
        self.rounds = [len(self.grid)] + [min(ROUND, refine - done) for done in range(0, refine, ROUND)]
        self.runs = sum(self.rounds) * len(self.seeds)
        self.study = _study(self.grid)
        self.trials: list[dict[str, Any]] = []

    def result(self, evaluate: Callable[[list[Candidate]], Iterable[tuple[Candidate, Record | Failure]]]) -> Tuned:
        """Try all candidates, and return what was chosen; `evaluate` does the runs, in any order."""
        for count in self.rounds:
            asked = [self._ask() for _ in range(count)]
            found = dict(evaluate([Candidate(**trial.params, seed=seed) for trial in asked for seed in self.seeds]))
            self.trials += [self._tell(trial, found) for trial in asked]
        good = [t for t in self.trials if t["accuracy"] is not None]
        if not good:
            came = f"no run of `{self.method}` that succeeded ({self.trials[0]['failures'][0]})"
            raise ValueError(explain(came, "at least one", "Try smaller strengths or learning rates."))
        best = max(good, key=lambda t: (t["accuracy"], -t["strength"]))
        values = {key: best[key] for key in ("strength", "lr", "accuracy")}
        trials = sorted(self.trials, key=lambda t: (t["lr"], t["strength"]))
        return Tuned(
            self.method, self.name, **values, tasks=self.tasks, trials=trials, config=self.config, edge=self._edge(best)
        )

    def _ask(self) -> Any:
        trial = self.study.ask()
        for name, values in self.ends.items():
            trial.suggest_float(name, values[0], values[-1], log=True)
        return trial

    def _tell(self, trial: Any, found: dict[Candidate, Record | Failure]) -> dict[str, Any]:
        """Tell Optuna how a pair of values did over its seeds, and return it as JSON has it."""
        from optuna.trial import TrialState

        mine = {seed: found[Candidate(**trial.params, seed=seed)] for seed in self.seeds}
        accuracies = {str(seed): r.average_accuracy for seed, r in mine.items() if isinstance(r, Record)}
        failures = [r.cause for r in mine.values() if isinstance(r, Failure)]
        value = None if failures else fmean(a or 0.0 for a in accuracies.values())
        self.study.tell(trial, value, TrialState.FAIL if failures else TrialState.COMPLETE)
        return {**trial.params, "accuracy": value, "seeds": accuracies, "failures": failures}

    def _edge(self, best: dict[str, Any]) -> list[str]:
        return [key for key, values in self.ends.items() if len(values) > 1 and best[key] in (values[0], values[-1])]


def _study(grid: list[dict[str, float]]) -> Any:
    """Return an Optuna study that asks for a grid first; it is the same each time, so that a search can be done again."""
    try:
        import optuna
    except ImportError as error:
        remedy = "Run: pip install 'rwalk[tune]'"
        raise ValueError(explain(f"a search without its package ({error})", "the package `optuna`", remedy)) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `constant_liar`, before Optuna 5
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=len(grid), constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in grid:
        study.enqueue_trial(point)
    return study


def _positive(name: str, values: Iterable[float]) -> list[float]:
    """Sort values of a logarithmic scale, and take each one once."""
    values = sorted(set(map(float, values)))
    if not all(0 < v < math.inf for v in values):
        raise ValueError(explain(f"a {name} among {values}", "finite numbers above 0", "Leave the others out."))
    return values


def find(folder: Path, stream: Sequence[Experience], method: Method, training: Training, **options: Any) -> Tuned:
    """Return what was tuned for a method on a stream, trained in this way.

    Raises:
        ValueError: if it was not, or with another learning rate.
    """
    name = stream[0].stream["name"]
    path = folder / tuned_name(name, called(method), configuration(stream, method, None, training, **options))
    if not path.exists():
        came = f"`tuned` strength for `{called(method)}` on {name} with these settings, which `{folder}` does not have"
        raise ValueError(explain(came, "a run of `rwalk tune` with them", "Tune first, or pass a number."))
    tuned = Tuned.load(path)
    if tuned.lr != training.lr:
        came = f"learning rate {training.lr:g} for a strength that was tuned with {tuned.lr:g}"
        raise ValueError(explain(came, f"--lr {tuned.lr:g}", "Pass it, or tune with the other one."))
    return tuned
