"""How raw importances become comparable: the ways to normalise them, in one place."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from rwalk.parallel import ALONE, Spread

Normalize = Literal["max", "mean", "tensor", "first"]
WAYS: tuple[str, ...] = get_args(Normalize)


def divisors(raw: Sequence[Tensor], how: Normalize, first: float, spread: Spread = ALONE) -> list[float]:
    """Say by what to divide each tensor of raw importance.

    Args:
        raw: non-negative importances of all protected tensors.
        how: "max" divides by the largest element of all tensors together, "mean" by the mean of all elements, "tensor" by the
            largest element of each tensor, "first" by `first`, a mean kept from an earlier task.
        first: the scale to use with "first", or infinity to take it now.
        spread: the ranks that hold the other parts of the tensors.

    Returns:
        One positive divisor per tensor; infinity, which makes importance zero, where there is nothing to scale.
    """
    if how == "first" and math.isfinite(first):
        return [first] * len(raw)
    if how in ("tensor", "max"):
        largest = spread.maxima([t.max().item() if t.numel() else 0.0 for t in raw])
        return [_nonzero(c) for c in largest] if how == "tensor" else [_nonzero(max(largest, default=0.0))] * len(raw)
    whole, count = spread.sums([sum(t.sum().item() for t in raw), sum(t.numel() for t in raw)])
    return [_nonzero(whole / max(count, 1))] * len(raw)


def _nonzero(scale: float) -> float:
    return scale if scale > 0 else math.inf
