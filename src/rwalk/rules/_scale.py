"""How raw importances become comparable: figures over all protected tensors to divide them by."""

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
