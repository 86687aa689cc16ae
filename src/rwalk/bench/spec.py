"""A run is described once: which tasks, which method, and how it trains. The description goes to workers as it is."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rwalk import kernels
from rwalk.bench import devices, methods, models, streams
from rwalk.bench.baselines import BASELINES, LwF, Rehearsal, addition
from rwalk.bench.checkpoint import Checkpoint, Measured
from rwalk.bench.evaluation import scores
from rwalk.bench.imports import check_kept, code_of, preload
from rwalk.bench.methods import Method
from rwalk.bench.optimisation import Training
from rwalk.bench.preserved import features_now
from rwalk.bench.progress import bar
from rwalk.bench.record import Record
from rwalk.bench.stream_spec import StreamSpec
from rwalk.bench.streams import Experience, label_counts, task_names
from rwalk.bench.trackers import Track, figures, quiet
from rwalk.bench.training import CustomLearner, Learner, check_batches
from rwalk.consolidation.settings import Average, Pull, Settings, check_strength, resolve
from rwalk.finetuning import Snapshot
from rwalk.rules.base import Rule


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run. What follows from the fields is worked out once, and goes along when the description is pickled.

    Args:
        stream: the tasks, or what makes them.
        method, strength, seed, training, pull, average, replay, device: as for `rwalk.bench.run`.
        threads: CPU threads; None for as many as the process has.
        backend: of the kernels; None for the process's.
        command: the command line that asked for the run.
    """

    stream: Sequence[Experience] | StreamSpec
    method: Method = "finetune"
    strength: float | None = None
    seed: int = 0
    training: Training = field(default_factory=Training)
    pull: Pull | None = None
    average: Average | None = None
    replay: Rehearsal | int | None = None
    device: str | torch.device = "cpu"
    threads: int | None = None
    backend: str | None = None
    command: str = ""

    @property
    def tasks(self) -> Sequence[Experience]:
        """The tasks to learn."""
        return self.stream.make() if isinstance(self.stream, StreamSpec) else self.stream

    def on(self, stream: Sequence[Experience]) -> "RunSpec":
        """Return the same run with its tasks as another process holds them; what was worked out stays."""
        other = copy.copy(self)
        object.__setattr__(other, "stream", stream)
        return other

    @property
    def _offers(self) -> dict[str, Any]:
        """What a rule or learner of one's own may ask for, beside what follows from the tasks."""
        return {"training": self.training, "seed": self.seed}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a rule by import path: another process may not find its module before it looks in the current folder."""
        own = ("rule", "settings") if methods.is_path(self.method) else ()
        return {name: value for name, value in vars(self).items() if name not in own}

    @cached_property
    def rule(self) -> Rule[Any] | None:
        """The rule; None for methods without one."""
        return methods.rule_of(self.method, self.tasks[0], self._offers)

    @cached_property
    def settings(self) -> Settings | None:
        """The consolidator's settings; None for methods without one."""
        return None if self.rule is None else resolve(self.rule, self.strength, self.pull, self.average)

    @cached_property
    def rehearsal(self) -> Rehearsal | None:
        """What is kept of earlier tasks; None for methods that keep nothing, or all."""
        rehearsal = Rehearsal(self.replay) if isinstance(self.replay, int) else self.replay
        if not isinstance(rehearsal, Rehearsal | None):
            raise TypeError(f"`replay` is {rehearsal!r}; pass a number of examples or a `Rehearsal`.")
        if self.added_name in ("replay", "agem"):
            return rehearsal or Rehearsal()
        if rehearsal is not None and self.settings is None:
            came = f"Method `{self.base_name}` does not use `replay`"
            raise ValueError(f"{came}. Pass it with a rule, default, recipe, replay or agem.")
        return rehearsal

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Every setting but the method's name and the seed, as JSON values."""
        first, training = self.tasks[0], self.training
        config = training.settings() | {
            "hidden": list(training.hidden),
            "mask": training.resolved_mask(first.scenario),
            "model": models.resolve(training.model, first),
        }
        ruled: dict[str, Any] = {}
        if self.settings is not None:
            ruled = self.settings._asdict() | {"rule": asdict(self.settings.rule)}
        elif self.added_name == "lwf":
            weight = check_strength(1.0 if self.strength is None else self.strength)
            ruled = {"strength": weight} | ({} if first.regression else {"temperature": LwF.TEMPERATURE})
        kept = {"replay": asdict(self.rehearsal)} if self.rehearsal else {}
        own = {"learner": methods.settings_of(self.method), "code": code_of(self.method, training.model)}
        return {"stream": first.stream, "training": config} | ruled | kept | {name: v for name, v in own.items() if v}

    @cached_property
    def base_name(self) -> str:
        """The method's name, without replay beside it."""
        return methods.name_of(self.method)

    @property
    def added_name(self) -> str:
        """The name of the baseline that is added to the loop; empty for other methods."""
        return self.method if isinstance(self.method, str) and self.method in BASELINES else ""

    @property
    def method_name(self) -> str:
        """The method's name in records."""
        return self.base_name + "+replay" * (self.replay is not None and not self.added_name)

    @cached_property
    def name(self) -> str:
        """The name of the record's file."""
        first, config = self.tasks[0], self.configuration
        return Record(self.method_name, first.stream["name"], self.seed, [], [], first.metric, first.higher, config=config).name

    def check(self) -> None:
        """Raise a ValueError or TypeError if the parts do not fit together; no model is built."""
        streams.check(self.tasks)
        if self.tasks[0].regression and self.training.mask not in ("auto", "all"):
            raise ValueError(f"A regression has no labels for a mask `{self.training.mask}` to shut; leave the mask out.")
        methods.check(self.method)
        if self.tasks[0].kind == "characters" and getattr(self.rule, "labels", "true") == "exact":
            came = f'Method `{self.base_name}` with labels="exact" cannot measure streams of characters'
            raise ValueError(f'{came}; use "sample" or "true".')
        if self.rehearsal is not None:
            self.rehearsal.check(self.tasks)

    def check_model(self) -> None:
        """Raise a ValueError if the model does not fit the tasks."""
        if models.check(self.training.model, self.tasks[0]):
            check_batches(self.tasks, self.training)

    def build(self, tick: Callable[[], None] = lambda: None) -> CustomLearner:
        """Make the learner, with its first weights from the seed."""
        preload(self.method, self.training.model)
        memory = self.settings
        torch.manual_seed(self.seed)
        if self.rule is None and (methods.is_path(self.method) or not isinstance(self.method, str)):
            return cast(CustomLearner, methods.made(self.method, self.tasks[0], self._offers))
        device = devices.chosen(self.device)

        def make() -> nn.Module:
            return models.build(self.training.model, self.tasks[0], self.training.hidden).to(device)

        added = addition(self.added_name, self.rehearsal, self.configuration.get("strength", 0.0), self.seed)
        learner = Learner(make, self.training, self.seed, tick, memory=memory, addition=added)
        learner.check(self.tasks)
        return learner

    def run(self, checkpoint: Path | None = None, tick: Callable[[], None] = lambda: None, track: Track = quiet) -> Record:
        """Train on each task in turn, evaluate after each, and return the record; see `rwalk.bench.run`."""
        self.check()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.backend is not None:
            kernels.use(self.backend)
        if checkpoint is not None:
            check_kept(self.training.model)
        device, stream = devices.chosen(self.device), self.tasks
        facts = devices.facts(device)
        place = Checkpoint(checkpoint, {"file": self.name} | facts, device)
        place.check()
        with devices.isolated_device(device):
            learner = self.build(tick)
            foreign = ":" in self.configuration.get("training", {}).get("model", "")
            snapshot = features_now(learner, stream) if foreign else None
            measured = place.restore(learner, stream) if place.exists else None
            if measured is None:
                learner = self.build(tick) if place.exists else learner
                measured = Measured(scores(learner, stream, -1) if isinstance(learner, Learner) else [])
            _learn(learner, measured, stream, place, track, snapshot)
        return self._record(learner, measured, facts)

    def _record(self, learner: CustomLearner, measured: Measured, facts: dict[str, Any]) -> Record:
        ours = isinstance(learner, Learner)
        return Record(
            method=self.method_name,
            stream=self.tasks[0].stream["name"],
            seed=self.seed,
            scores=measured.scores,
            untrained=measured.untrained,
            metric=self.tasks[0].metric,
            higher=self.tasks[0].higher,
            tasks=task_names(self.tasks),
            preserved=measured.preserved,
            bits=measured.bits,
            labels=label_counts(self.tasks),
            config=self.configuration,
            timings={"train_seconds": measured.seconds} | (cast(Learner, learner).timings() if ours else {}),
            memory=cast(Learner, learner).memory_sizes() if ours else {},
            diagnostics=getattr(learner, "diagnostics", []),
            command=self.command,
            **facts,
        )


def _learn(
    learner: CustomLearner,
    measured: Measured,
    stream: Sequence[Experience],
    place: Checkpoint,
    track: Track,
    snapshot: Snapshot | None = None,
) -> None:
    """Train on the tasks that are left, and measure after each of them."""
    for k in range(len(measured.scores), len(stream)):
        start = time.perf_counter()
        learner.fit(stream[k])
        measured.seconds += time.perf_counter() - start
        measured.scores.append(scores(learner, stream, k))
        if stream[0].kind == "characters" and isinstance(learner, Learner):
            measured.bits.append([learner.bits(*e.test.read()) for e in stream])
        if snapshot is not None and isinstance(learner, Learner):
            measured.preserved.append(snapshot.kept(learner.model).scalars(""))
        track(figures(measured.scores, stream[0].metric, stream[0].higher) | getattr(learner, "scalars", dict)(), k + 1)
        if k + 1 < len(stream):
            place.save(learner, measured)


def run(
    stream: Sequence[Experience],
    method: Method = "finetune",
    strength: float | None = None,
    seed: int = 0,
    training: Training | None = None,
    *,
    pull: Pull | None = None,
    average: Average | None = None,
    replay: Rehearsal | int | None = None,
    checkpoint: str | Path | None = None,
    tick: Callable[[], None] = lambda: None,
    track: Track = quiet,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> Record:
    """Train on each task of a stream in turn, and after each evaluate on all tasks.

    Args:
        stream: the tasks, for example `rwalk.bench.split("digits", tasks=5)`.
        method: "finetune", "joint", "cumulative", "replay", "agem", "lwf", "default" (`Consolidator(model)`), "recipe" (the
            diagonal one), a rule such as `RWalk()`, or an object with `fit` and `predict`, which is copied for each run. A
            class, function or `package.module:name` may make either, and ask for `task`, `training` and `seed`.
        strength: factor of the penalty for a rule; the consolidator's default when None. For "lwf" the weight of the earlier
            answers; 1 when None.
        seed: seed of initial weights and batch order; equal seeds give equal results, bit for bit on one machine's CPU.
        training: epochs, batch size, optimiser, model and softmax mask.
        pull: "gradient" or "proximal", for a rule; the consolidator's default when None.
        average: "none" or "tail", for a rule; the consolidator's default when None.
        replay: how many examples of earlier tasks "replay" and "agem" keep, or a `Rehearsal`; 200 in total when None. A rule or
            default and recipe are trained with replay beside it if this is given.
        checkpoint: file that keeps the state of the run after each task but the last; if it exists, the run continues from it.
            It stays until it is removed; where it cannot be written, a warning says so. Learners of one's own need the methods
            of `rwalk.bench.training.Resumable` for it.
        tick: called after each training step, for progress displays.
        track: called after each task with figures by name and the number of tasks learned, before the checkpoint is written: a
            task that is cut off in between comes twice.
        device: "cpu", "cuda", or one GPU such as "cuda:1"; a task's data are brought there as a whole. A learner of one's own
            sees to it itself. Results agree with those of the CPU to rounding, which grows over a run.
        progress: whether to show a bar while it trains; None for in terminals and notebooks, if `tqdm` is installed.

    Returns:
        The record. In class-incremental streams later tasks are not evaluated before they come.

    Raises:
        ValueError: if method, model, training and stream do not fit together.
    """
    spec = RunSpec(stream, method, strength, seed, training or Training(), pull, average, replay, device)
    with bar(spec, tick, track, progress) as (step, task):
        return spec.run(Path(checkpoint) if checkpoint else None, step, task)
