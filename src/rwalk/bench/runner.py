"""Run one method over one stream and record what it measured."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import rwalk
from rwalk import _refusals as refusals
from rwalk import kernels
from rwalk._errors import explain
from rwalk.bench import devices, models, ranks
from rwalk.bench.checkpoint import Checkpoint, Measured
from rwalk.bench.comparators import AGEM, LwF, ProtectedReplay, Rehearsal, Replay
from rwalk.bench.experience import Experience, check, label_counts
from rwalk.bench.learners import Cumulative, FineTune, Joint, Learner, Protected, Training
from rwalk.bench.record import Record, file_name
from rwalk.bench.trackers import Track, figures, quiet
from rwalk.consolidator import Average, Pull, Settings, resolve
from rwalk.importance import rules
from rwalk.importance.base import Importance

Method = str | Importance[Any] | Learner


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
) -> Record:
    """Train on each task of a stream in turn, and after each evaluate on all tasks.

    Within an initialised process group all ranks have to call, and train one model together.

    Args:
        stream: the tasks, for example `rwalk.bench.split("digits", tasks=5)`.
        method: "finetune", "joint", "cumulative", "replay", "agem", "lwf", "recipe" (`Consolidator(model)`), a rule such as
            `RWalk()`, or an object with `fit` and `predict`.
        strength: factor of the penalty for a rule; the consolidator's default when None. For "lwf" the weight of the earlier
            answers; 1 when None.
        seed: seed of initial weights and batch order; equal seeds give equal results, bit for bit on one machine's CPU.
        training: epochs, batch size, optimiser, model and softmax mask.
        pull: "gradient" or "proximal", for a rule; the consolidator's default when None.
        average: "none" or "tail", for a rule; the consolidator's default when None.
        replay: how many examples of earlier tasks "replay" and "agem" keep, or a `Rehearsal`; 200 in total when None. A rule or
            the recipe is trained with replay beside it if this is given.
        checkpoint: file that keeps where the run stands after each task but the last; if it is there already, the run goes on
            from there. It stays until it is removed; where it cannot be written, a warning says so. Learners of one's own need
            the methods of `rwalk.bench.learners.Resumable` for it.
        tick: called after each training step, for progress displays.
        track: called after each task with figures by name and the number of tasks learned, before the checkpoint is written: a
            task that is cut off in between comes twice. Of several ranks the first one calls.
        device: "cpu", "cuda", or one GPU such as "cuda:1"; a task's data are brought there as a whole. A learner of one's own
            sees to it itself. Results agree with those of the CPU to rounding, which grows over a run.

    Returns:
        The record. In class-incremental streams later tasks are not evaluated before they come.
    """
    check(stream)
    refuse(stream, method)
    training = training or Training()
    settings = _settings(method, strength, pull, average)
    rehearsal = _rehearsal(method, settings, replay)
    if rehearsal is not None:
        rehearsal.check(stream)
    config = configuration(stream, method, strength, training, pull, average, replay)
    device = devices.chosen(device)
    name = record_name(stream, method, strength, seed, training, pull=pull, average=average, replay=replay)
    facts = _facts(device)
    place = Checkpoint(Path(checkpoint) if checkpoint else None, {"file": name} | facts, device)
    place.check()

    def begin() -> Learner:
        torch.manual_seed(seed)
        learner = _learner(stream, method, settings, rehearsal, config, seed, training, tick, device)
        if isinstance(learner, FineTune):
            learner.refuse(stream)
        return learner

    with devices.alone(device):
        learner, measured = _begun(begin, place, stream)
        _learn(learner, measured, stream, place, track)
    return Record(
        method=called(method, replay),
        stream=stream[0].stream["name"],
        seed=seed,
        accuracy=measured.accuracy,
        untrained=measured.untrained,
        bits=measured.bits,
        labels=label_counts(stream),
        config=config,
        timings={"train_seconds": measured.seconds} | _step_time(learner),
        memory=_memory(learner),
        diagnostics=getattr(learner, "diagnostics", []),
        **facts,
    )


def _facts(device: torch.device) -> dict[str, Any]:
    """Return what a run depends on beside its configuration and seed, by the names of a record's fields."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "rwalk": rwalk.__version__}
    versions |= {"kernels": kernels.current()} | devices.about(device)
    return {"versions": versions, "threads": torch.get_num_threads(), "ranks": ranks.size(), "device": device.type}


def _begun(begin: Callable[[], Learner], place: Checkpoint, stream: Sequence[Experience]) -> tuple[Learner, Measured]:
    """Return a learner and what has been measured, from where a checkpoint stands on all ranks, else from the start."""
    learner = begin()
    measured = place.restore(learner, stream)
    if ranks.every(measured is not None) and measured is not None:
        return learner, measured
    learner = begin()
    return learner, Measured(_evaluate(learner, stream, -1) if isinstance(learner, FineTune) else [])


def _learn(learner: Learner, measured: Measured, stream: Sequence[Experience], place: Checkpoint, track: Track) -> None:
    """Train on the tasks that are left, and measure after each of them."""
    for k in range(len(measured.accuracy), len(stream)):
        start = time.perf_counter()
        learner.fit(stream[k])
        measured.seconds += time.perf_counter() - start
        measured.accuracy.append(_evaluate(learner, stream, k))
        if stream[0].kind == "characters" and isinstance(learner, FineTune):
            measured.bits.append([learner.bits(*e.test.read()) for e in stream])
        if ranks.number() == 0:
            track(figures(measured.accuracy) | getattr(learner, "scalars", dict)(), k + 1)
        if k + 1 < len(stream):
            place.save(learner, measured)


def refuse(stream: Sequence[Experience], method: Method) -> None:
    """Raise a ValueError if a rule goes through every class of every label where an example has many."""
    if stream[0].kind == "characters" and getattr(method, "labels", "true") == "exact":
        came = f'`{_name(method)}` with the labels "exact" for a stream of characters'
        raise ValueError(explain(came, 'the labels "sample" or "true"', "Pass the rule such labels."))


def configuration(
    stream: Sequence[Experience],
    method: Method,
    strength: float | None = None,
    training: Training | None = None,
    pull: Pull | None = None,
    average: Average | None = None,
    replay: Rehearsal | int | None = None,
) -> dict[str, Any]:
    """Return every setting of a run but the method's name and the seed, as JSON values."""
    training = training or Training()
    config = asdict(training) | {
        "hidden": list(training.hidden),
        "mask": training.resolved_mask(stream[0].scenario),
        "model": models.resolve(training.model, stream[0]),
    }
    settings = _settings(method, strength, pull, average)
    ruled = settings._asdict() | {"rule": asdict(settings.rule)} if settings else {}
    if method == "lwf":
        weight = refusals.check_strength(1.0 if strength is None else strength)
        ruled = {"strength": weight, "temperature": LwF.TEMPERATURE}
    rehearsal = _rehearsal(method, settings, replay)
    kept = {"replay": asdict(rehearsal)} if rehearsal else {}
    return {"stream": stream[0].stream, "training": config} | ruled | kept


def record_name(
    stream: Sequence[Experience], method: Method, strength: float | None, seed: int, training: Training, **options: Any
) -> str:
    """Return the name of a run's record file; `options` are `pull`, `average` and `replay`, as for `run`."""
    config = configuration(stream, method, strength, training, **options)
    return file_name(stream[0].stream["name"], called(method, options.get("replay")), seed, config)


def _settings(method: Method, strength: float | None, pull: Pull | None, average: Average | None) -> Settings | None:
    """Return a consolidator's settings for a method that has one."""
    if isinstance(method, Importance):
        return resolve(method, strength, pull, average)
    return resolve(None, strength, pull, average) if method == "recipe" else None


def _rehearsal(method: Method, settings: Settings | None, replay: Rehearsal | int | None) -> Rehearsal | None:
    """Return what a method keeps of earlier tasks; None for those that keep nothing, or all."""
    rehearsal = Rehearsal(replay) if isinstance(replay, int) else replay
    if not isinstance(rehearsal, Rehearsal | None):
        raise TypeError(explain(f"replay {replay!r}", "a number of examples or a `Rehearsal`", "For example `replay=200`."))
    if isinstance(method, str) and issubclass(LEARNERS.get(method, FineTune), Replay):
        return rehearsal or Rehearsal()
    if rehearsal is not None and settings is None:
        came, expected = f"`replay` for method `{_name(method)}`", "a rule, recipe, replay or agem"
        raise ValueError(explain(came, expected, 'Use the method "replay", or leave `replay` out.'))
    return rehearsal


def called(method: Method, replay: Rehearsal | int | None = None) -> str:
    """Return the name of a method as records have it, with what is beside it."""
    beside = replay is not None and not (isinstance(method, str) and method in LEARNERS)
    return _name(method) + "+replay" * beside


def _name(method: Method) -> str:
    if isinstance(method, str):
        return method
    return next((name for name, kind in rules().items() if type(method) is kind), type(method).__name__.lower())


def _learner(
    stream: Sequence[Experience],
    method: Method,
    settings: Settings | None,
    rehearsal: Rehearsal | None,
    config: dict[str, Any],
    seed: int,
    training: Training,
    tick: Callable[[], None],
    device: torch.device,
) -> Learner:
    """Build the learner that a method names."""

    def build() -> nn.Module:
        return models.build(training.model, stream[0], training.hidden).to(device)

    common = (build, training, seed, tick)
    if settings is not None:
        return ProtectedReplay(rehearsal, settings, *common) if rehearsal else Protected(settings, *common)
    if isinstance(method, str):
        if method not in LEARNERS:
            known = ", ".join([*LEARNERS, "recipe", *rules()])
            raise ValueError(
                explain(f"method `{method}`", f"one of {known}", "Pass such a name, or a rule object like `RWalk()`.")
            )
        kind = LEARNERS[method]
        if issubclass(kind, Replay) and rehearsal is not None:
            return kind(rehearsal, *common)
        return kind(config["strength"], *common) if issubclass(kind, LwF) else kind(*common)
    if isinstance(method, type) or not (hasattr(method, "fit") and hasattr(method, "predict")):
        raise TypeError(
            explain(f"method {method!r}", "a name, a rule, or an object with `fit` and `predict`", "For example `RWalk()`.")
        )
    return cast(Learner, method)


LEARNERS: dict[str, type[FineTune]] = {
    "finetune": FineTune,
    "joint": Joint,
    "cumulative": Cumulative,
    "replay": Replay,
    "agem": AGEM,
    "lwf": LwF,
}


def _evaluate(learner: Learner, stream: Sequence[Experience], last: int) -> list[float | None]:
    """Return the accuracy on each task after training task number `last`; None for class-incremental tasks yet to come."""
    seen = {label for e in stream[: last + 1] for label in e.classes}
    return [_accuracy(learner, e, seen) if e.scenario != "class" or e.task <= last else None for e in stream]


def _accuracy(learner: Learner, experience: Experience, seen: set[int]) -> float:
    x, y = experience.test.read()
    labels = seen if experience.scenario == "class" else experience.classes
    return (learner.predict(x, labels) == y).double().mean().item()


def _step_time(learner: Learner) -> dict[str, float]:
    if not isinstance(learner, FineTune):
        return {}
    return {"step_ms": learner.step_milliseconds(), "examples_per_step": learner.examples_per_step()}


def _memory(learner: Learner) -> dict[str, float]:
    if not isinstance(learner, FineTune):
        return {}
    model = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    return {"model_bytes": model, "state_bytes": learner.state_bytes(), "stored_examples": learner.stored_examples()}
