"""What a matrix of scores says: a[k][j] is the score on task j after training task k, None where not evaluated.

Definitions follow Chaudhry et al. (2018) for average accuracy, forgetting and intransigence, and Lopez-Paz and Ranzato (2017)
for backward and forward transfer. Higher scores are better; errors enter with the opposite sign (`oriented`). Figures have the
unit of the scores; None where one is not defined.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

Row = Sequence[float | None]
Matrix = Sequence[Row]


def oriented(a: Matrix, higher: bool) -> Matrix:
    """Return scores so that higher is better: errors get the opposite sign."""
    return a if higher else [[None if score is None else -score for score in row] for row in a]


def average(a: Matrix) -> float | None:
    """Return A_k, the mean score over all tasks after the last one."""
    return mean(a[-1][: len(a)]) if a else None


def forgetting(a: Matrix) -> float | None:
    """Return F_k, the mean over earlier tasks of the best score before the last task less the score after it."""
    return mean(forgotten(a))


def forgotten(a: Matrix) -> list[float | None]:
    """Return what forgetting averages: for each earlier task its best score before the last task less that after it."""
    return [_less(best, now) for best, now in zip(_best(a), a[-1] if a else [], strict=False)]


def kept(a: Matrix) -> float | None:
    """Return which share of the best scores on earlier tasks is left after the last one; above 1 where they improved."""
    best, now = mean(_best(a)), mean(a[-1][: len(a) - 1]) if a else None
    return now / best if now is not None and best else None


def learned(a: Matrix) -> float | None:
    """Return the mean score on each task right after learning it."""
    return mean([a[j][j] for j in range(len(a))])


def course(a: Matrix) -> list[float | None]:
    """Return the average score after each task, over the tasks so far."""
    return [average(a[: k + 1]) for k in range(len(a))]


def backward_transfer(a: Matrix) -> float | None:
    """Return BWT, the mean over earlier tasks of the score after the last task less that right after learning them."""
    last = len(a) - 1
    return mean([_less(a[last][j], a[j][j]) for j in range(last)])


def forward_transfer(a: Matrix, untrained: Row) -> float | None:
    """Return FWT, the mean over later tasks of the score just before learning them less that of the untrained model."""
    return mean([_less(a[j - 1][j], untrained[j]) for j in range(1, len(a))])


def intransigence(a: Matrix, joint: Matrix) -> float | None:
    """Return I_k for the last task: joint training's score on it less this learner's; lower is better."""
    return _less(joint[-1][len(a) - 1], a[-1][len(a) - 1]) if a and len(a) == len(joint) else None


def _best(a: Matrix) -> list[float | None]:
    """Return the best score on each earlier task from learning it until before the last task."""
    last = len(a) - 1
    return [max(_known(a[row][j] for row in range(j, last)), default=None) for j in range(last)]


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def mean(values: Row) -> float | None:
    """Return the mean of figures that are all defined, else None."""
    known = _known(values)
    return fmean(known) if known and len(known) == len(values) else None
