"""A checkpoint is the state of a run after a finished task, as a file from which the same run continues."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk._errors import printable, warn
from rwalk._io import files, states
from rwalk.bench import devices
from rwalk.bench.record import Record, is_matrix
from rwalk.bench.streams import Experience
from rwalk.bench.training import CustomLearner, Learner, Resumable


@dataclass
class Measured:
    """What a run has measured so far.

    Args:
        untrained: score on each task before training.
        scores: one row for each finished task.
        bits: the same for bits per character, where there are any.
        preserved: after each finished task, how much of a pretrained model's features is left.
        seconds: time spent on training.
    """

    untrained: list[float | None] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    bits: list[list[float]] = field(default_factory=list)
    preserved: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one run.

    Args:
        path: the file; None keeps none.
        run: what the run is: its settings, versions, threads and device, on which equal results depend.
        device: where it trains.
    """

    path: Path | None
    run: dict[str, Any]
    device: torch.device

    def check(self) -> None:
        """Refuse a path where no file can be written.

        Raises:
            OSError: if something else is there, or no folder for it.
        """
        if self.path is not None:
            files.check(self.path)

    def save(self, learner: CustomLearner, measured: Measured) -> None:
        """Write the state of the run, if the learner has one.

        If the file cannot be written, the run continues with a warning, and an earlier checkpoint stays.
        """
        if self.path is None or not isinstance(learner, Resumable):
            return
        random = devices.rng_state(self.device)
        content = {"run": self.run, "measured": asdict(measured), "random": random, "learner": learner.state_dict()}
        try:
            states.save(self.path, "checkpoint", content)
        except OSError as error:
            warn(f"{error} The run continues without this checkpoint.")

    @property
    def exists(self) -> bool:
        """Whether there is a file to continue from."""
        return self.path is not None and self.path.exists()

    def restore(self, learner: CustomLearner, stream: Sequence[Experience]) -> Measured | None:
        """Restore the state of a new learner, and return what was measured; None, with a warning, if the file does not fit.

        After None the learner may be changed in part.
        """
        if self.path is None or not isinstance(learner, Resumable):
            return None
        try:
            content = states.load(self.path, "checkpoint")
            if content["run"] != self.run:
                raise ValueError(f"it is of another run, version, device or number of threads: {content['run']}")
            measured, state = Measured(**content["measured"]), content["learner"]
            _check_measured(measured, len(stream), stream[0].metric)
            if isinstance(learner, Learner):
                _check_learner(learner, state, stream[0].outputs)
            learner.resume(state, stream[: len(measured.scores)])
            if isinstance(learner, Learner):
                _check_optimizer(learner.optimizer)
            devices.set_rng_state(self.device, content["random"])
        except Exception as error:  # whatever a stale state does to a learner, the run can start anew
            text = f"Checkpoint `{self.path}` cannot be used ({error}). The run starts from its beginning and replaces it."
            warn(printable(text))
            return None
        return measured


def _check_measured(measured: Measured, tasks: int, metric: str) -> None:
    """Raise a ValueError if what was measured does not fit a record of this many tasks."""
    rows: list[Any] = [*measured.scores, *measured.bits]
    figures = asdict(measured) | {"timings": {"train_seconds": measured.seconds}, "metric": metric}
    if not _recordable(figures) or measured.seconds is None or {len(row) for row in rows} != {tasks}:
        raise ValueError("what it has measured is of another kind")


def _recordable(parts: dict[str, Any]) -> bool:
    """Return whether a record may hold some parts."""
    with suppress(ValueError):
        return bool(Record.from_json({"method": "", "stream": "", "seed": 0, "scores": []} | files.as_json(parts)))
    return False


def _check_learner(learner: Learner, state: Mapping[str, Any], outputs: int) -> None:
    """Raise a ValueError unless a state has the entries of a learner, each of its kind."""
    fresh, seconds, loss = learner.state_dict(), state["step_seconds"], state["loss"]
    forms = [{name: (t.shape, t.dtype) for name, t in one["model"].items()} for one in (state, fresh)]
    memories = state["optimizer"]["state"].values()
    holds = {
        "step_seconds": isinstance(seconds, Tensor) and seconds.dim() == 1 and seconds.is_floating_point(),
        "passed": type(state["passed"]) is int,
        "seen": set(state["seen"]) <= set(range(outputs)),
        "loss": isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point(),
        "model": forms[0] == forms[1],
        "optimizer": state["optimizer"]["param_groups"] == fresh["optimizer"]["param_groups"]
        and all(value is None or value.is_floating_point() for memory in memories for value in memory.values()),
        "diagnostics": _recordable({"diagnostics": state["diagnostics"]}),
        "old": all(old.dtype == torch.bool and old.shape == (outputs,) for old in state.get("old", [])),
    }
    if wrong := [key for key, right in holds.items() if not right]:
        raise ValueError(f"its `{wrong[0]}` is of another kind")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raise a ValueError unless an optimiser remembers the same of each parameter: tensors of its shape, and numbers."""
    kept = optimizer.state.items()
    each = [(name, value.shape, p.shape) for p, memory in kept for name, value in memory.items() if value is not None]
    fits = all(shape == whole or (name == "step" and not shape) for name, shape, whole in each)
    if len({frozenset(memory) for _, memory in kept}) > 1 or not fits:
        raise ValueError("its optimiser has other entries than this one")


def scores_so_far(path: str | Path) -> list[list[float | None]]:
    """Return the matrix of scores in a checkpoint; empty if the file is absent or unreadable.

    The checksum is not verified: resuming from the file does that.
    """
    try:
        with files.opened(path) as file:
            header = files.parse(files.header(file))
        content = files.parse(header["__metadata__"]["content"])
        rows = content["measured"]["scores"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return rows if is_matrix(rows) else []
