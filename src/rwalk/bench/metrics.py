"""What an accuracy matrix says: a[k][j] is the accuracy on task j after training task k, None where not evaluated.

Definitions follow Chaudhry et al. (2018) for average accuracy, forgetting and intransigence, and Lopez-Paz and Ranzato (2017)
for backward and forward transfer. Fractions, not percent; None where a figure is not defined.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

Row = Sequence[float | None]
Matrix = Sequence[Row]


def average_accuracy(a: Matrix) -> float | None:
    """Return A_k, the mean accuracy over all tasks after the last one."""
    return _mean(a[-1][: len(a)]) if a else None


def forgetting(a: Matrix) -> float | None:
    """Return F_k, the mean over earlier tasks of the best accuracy before the last task less the accuracy after it."""
    last = len(a) - 1
    return _mean([_less(max(_known(a[row][j] for row in range(j, last)), default=None), a[last][j]) for j in range(last)])


def backward_transfer(a: Matrix) -> float | None:
    """Return BWT, the mean over earlier tasks of the accuracy after the last task less that right after learning them."""
    last = len(a) - 1
    return _mean([_less(a[last][j], a[j][j]) for j in range(last)])


def forward_transfer(a: Matrix, untrained: Row) -> float | None:
    """Return FWT, the mean over later tasks of the accuracy just before learning them less that of the untrained model."""
    return _mean([_less(a[j - 1][j], untrained[j]) for j in range(1, len(a))])


def intransigence(a: Matrix, joint: Matrix) -> float | None:
    """Return I_k for the last task: joint training's accuracy on it less this learner's; lower is better."""
    return _less(joint[-1][len(a) - 1], a[-1][len(a) - 1]) if a and len(a) == len(joint) else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Row) -> float | None:
    known = _known(values)
    return fmean(known) if known and len(known) == len(values) else None
