"""How raw importances become comparable: figures over all protected tensors to divide them by, and the overlap of tasks."""

import math
from collections.abc import Sequence

from torch import Tensor

from rwalk.distributed.shards import ALONE, ShardGroup


def largest_element(raw: Sequence[Tensor], shard_group: ShardGroup = ALONE) -> float:
    """Return the largest element of all tensors together, or infinity where all are zero: zero over it is zero, not NaN."""
    largest = shard_group.maxima([t.max().item() if t.numel() else 0.0 for t in raw])
    return _nonzero(max(largest, default=0.0))


def mean_element(raw: Sequence[Tensor], shard_group: ShardGroup = ALONE) -> float:
    """Return the mean of the elements of all tensors, or infinity where all are zero."""
    total, count = shard_group.sums([sum(t.sum().item() for t in raw), sum(t.numel() for t in raw)])
    return _nonzero(total / max(count, 1))


def _nonzero(scale: float) -> float:
    return scale if scale > 0 else math.inf


MOST = 10.0
"""The most that a task's importance is multiplied by. At a limit of 30, convolution layers could no longer learn."""


def overlap_factors(earlier: Sequence[Tensor | None], latest: Sequence[Tensor], shard_group: ShardGroup = ALONE) -> list[float]:
    """Return what to multiply each tensor of a task's importance by: half the squared odds of its overlap, from 1 to `MOST`.

    The overlap of two importances is their Bhattacharyya coefficient as distributions over a tensor's elements: 1 where the
    task needs the weights that earlier ones need, in the same proportions, and 0 where it needs others. Weights that see other
    inputs are other weights in all but name; so no tensor has a larger overlap than a matrix or kernel before it.

    Args:
        earlier: importances of earlier tasks, non-negative, in the order of the layers; None where there are none.
        latest: those of the last task, parallel to them, in any unit.
        shard_group: the ranks that hold the other parts of the tensors.

    Returns:
        One factor per tensor; 1 up to an overlap of 0.586, and where either importance is zero.
    """
    found, least = [], 1.0
    for (common, old, new), tensor in zip(_sums(earlier, latest, shard_group), latest, strict=True):
        overlap = common / math.sqrt(old * new) if old * new > 0 else 0.0
        if tensor.dim() > 1 and overlap > 0:  # a head of the task's own says nothing about the layers after it
            least = min(least, overlap)
        overlap = min(overlap, least)
        found.append(min(max((overlap / (1 - overlap)) ** 2 / 2, 1.0), MOST) if overlap < 1 else MOST)
    return found


def _sums(
    earlier: Sequence[Tensor | None], latest: Sequence[Tensor], shard_group: ShardGroup
) -> list[tuple[float, float, float]]:
    """Return for each tensor the sum of the roots of products, and the two sums, over all ranks."""
    parts = [
        (0.0, 0.0, 0.0) if old is None else ((old * new).sqrt_().sum().item(), old.sum().item(), new.sum().item())
        for old, new in zip(earlier, latest, strict=True)
    ]
    whole = iter(shard_group.sums([number for part in parts for number in part]))
    return list(zip(whole, whole, whole, strict=True))
