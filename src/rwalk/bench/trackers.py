"""A tracker shows figures while a run makes them: any callable that takes a dictionary of scalars and a step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rwalk.bench import metrics
from rwalk.bench.record import ACCURACY

Track = Callable[[dict[str, float], int], None]


def figures(scores: metrics.Matrix, metric: str = ACCURACY, higher: bool = True) -> dict[str, float]:
    """Return the figures of the last row of a matrix of scores: that on each task, on average, and forgetting."""
    row = {f"{metric}/task_{j + 1}": score for j, score in enumerate(scores[-1])}
    row |= {f"average_{metric}": metrics.average(scores), "forgetting": metrics.forgetting(metrics.oriented(scores, higher))}
    return {name: value for name, value in row.items() if value is not None}


def quiet(scalars: dict[str, float], step: int) -> None:
    """Show nothing."""


@contextmanager
def tensorboard(folder: Path) -> Iterator[Track]:
    """Write event files for TensorBoard into a folder, which is made at the first step.

    What an earlier process has written there from that step on, before it was cut off, TensorBoard then leaves out.

    Raises:
        ValueError: if the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"A log for TensorBoard needs its package ({error}). Run: pip install 'rwalk[tensorboard]'") from None
    writer: Any = None

    def track(scalars: dict[str, float], step: int) -> None:
        nonlocal writer
        writer = writer or SummaryWriter(str(folder), purge_step=step)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield track
    finally:
        if writer is not None:
            writer.close()


TRACKERS = {"tensorboard": tensorboard}


def tracker(name: str | None, folder: Path) -> AbstractContextManager[Track]:
    """Open the tracker of a name for the folder of a run; one that shows nothing for None."""
    return nullcontext(quiet) if name is None else TRACKERS[name](folder)
