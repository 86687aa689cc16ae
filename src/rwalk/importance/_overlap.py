"""How much harder a task is held where it needs the weights of earlier tasks: our own measure, with no paper behind it."""

import math
from collections.abc import Sequence

from torch import Tensor

from rwalk.parallel import ALONE, Spread

MOST = 10.0
"""The most that a task's importance is multiplied by. With 30 convolutions were held too hard to learn."""


def gains(earlier: Sequence[Tensor | None], latest: Sequence[Tensor], spread: Spread = ALONE) -> list[float]:
    """Say by what to multiply each tensor of a task's importance: half the squared odds of its overlap, from 1 to `MOST`.

    The overlap of two importances is their Bhattacharyya coefficient as distributions over a tensor's elements: 1 where the
    task needs the weights that earlier ones need, in the same proportions, and 0 where it needs others. Weights that see other
    inputs are other weights in all but name; so no tensor has a larger overlap than a matrix or kernel before it.

    Args:
        earlier: importances of earlier tasks, non-negative, in the order of the layers; None where there are none.
        latest: those of the last task, parallel to them, in any unit.
        spread: the ranks that hold the other parts of the tensors.

    Returns:
        One factor per tensor; 1 up to an overlap of 0.586, and where either importance is zero.
    """
    found, least = [], 1.0
    for (common, old, new), tensor in zip(_sums(earlier, latest, spread), latest, strict=True):
        overlap = common / math.sqrt(old * new) if old * new > 0 else 0.0
        if tensor.dim() > 1 and overlap > 0:  # a head of the task's own says nothing about the layers after it
            least = min(least, overlap)
        overlap = min(overlap, least)
        found.append(min(max((overlap / (1 - overlap)) ** 2 / 2, 1.0), MOST) if overlap < 1 else MOST)
    return found


def _sums(earlier: Sequence[Tensor | None], latest: Sequence[Tensor], spread: Spread) -> list[tuple[float, float, float]]:
    """Return for each tensor the sum of the roots of products, and the two sums, over all ranks."""
    parts = [
        (0.0, 0.0, 0.0) if old is None else ((old * new).sqrt_().sum().item(), old.sum().item(), new.sum().item())
        for old, new in zip(earlier, latest, strict=True)
    ]
    whole = iter(spread.sums([number for part in parts for number in part]))
    return list(zip(whole, whole, whole, strict=True))
