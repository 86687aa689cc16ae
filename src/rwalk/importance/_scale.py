"""How raw importances become comparable: the ways to normalise them, in one place."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

Normalize = Literal["max", "mean", "tensor", "first"]
WAYS: tuple[str, ...] = get_args(Normalize)


def divisors(raw: Sequence[Tensor], how: Normalize, first: float) -> list[float]:
    """Say by what to divide each tensor of raw importance.

    Args:
        raw: non-negative importances of all protected tensors.
        how: "max" divides by the largest element of all tensors together, "mean" by the mean of all elements, "tensor" by the
            largest element of each tensor, "first" by `first`, a mean kept from an earlier task.
        first: the scale to use with "first", or infinity to take it now.

    Returns:
        One positive divisor per tensor; infinity, which makes importance zero, where there is nothing to scale.
    """
    if how == "tensor":
        return [_nonzero(_largest([t])) for t in raw]
    if how == "max":
        return [_nonzero(_largest(raw))] * len(raw)
    if how == "first" and math.isfinite(first):
        return [first] * len(raw)
    return [_nonzero(_mean(raw))] * len(raw)


def _largest(raw: Sequence[Tensor]) -> float:
    return max((t.max().item() for t in raw if t.numel()), default=0.0)


def _mean(raw: Sequence[Tensor]) -> float:
    return sum(t.sum().item() for t in raw) / max(sum(t.numel() for t in raw), 1)


def _nonzero(scale: float) -> float:
    return scale if scale > 0 else math.inf
