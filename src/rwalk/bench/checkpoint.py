"""A checkpoint is where a run stood after a finished task, as a file from which the same run goes on."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rwalk import states
from rwalk._errors import explain
from rwalk.bench import devices, ranks
from rwalk.bench.experience import Experience
from rwalk.bench.learners import Learner, Resumable


@dataclass
class Measured:
    """What a run has measured so far.

    Args:
        untrained: accuracy on each task before training.
        accuracy: one row for each finished task.
        bits: the same for bits per character, where there are any.
        seconds: time spent on training.
    """

    untrained: list[float | None] = field(default_factory=list)
    accuracy: list[list[float | None]] = field(default_factory=list)
    bits: list[list[float]] = field(default_factory=list)
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

    def save(self, learner: Learner, measured: Measured) -> None:
        """Keep where the run stands, if the learner can tell; of several ranks the first one does.

        Raises:
            OSError: if the file cannot be written; an earlier checkpoint is still there.
        """
        if self.path is not None and isinstance(learner, Resumable) and ranks.number() == 0:
            random = devices.chance(self.device)
            content = {"run": self.run, "measured": asdict(measured), "random": random, "learner": learner.state_dict()}
            states.save(self.path, "checkpoint", content)

    def restore(self, learner: Learner, stream: Sequence[Experience]) -> Measured | None:
        """Bring a new learner to where the run stood, and return what was measured; None if it has to start anew.

        After None the learner may be changed in part. A checkpoint that does not fit gives a warning.
        """
        if self.path is None or not isinstance(learner, Resumable):
            return None
        try:
            content = states.load(self.path, "checkpoint")
            if content["run"] != self.run:
                raise ValueError(f"it is of another run, version, device or number of threads: {content['run']}")
            measured = Measured(**content["measured"])
            learner.resume(content["learner"], stream[: len(measured.accuracy)])
            devices.set_chance(self.device, content["random"])
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a stale state does to a learner, the run can start anew
            self._warn(error)
            return None
        return measured

    def _warn(self, error: Exception) -> None:
        came = f"a checkpoint `{self.path}` that cannot be used ({error})"
        remedy = "The run starts from its beginning and replaces it."
        warnings.warn(explain(came, "one that this run has written", remedy), stacklevel=4)
