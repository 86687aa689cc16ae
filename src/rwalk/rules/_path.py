"""What rules share that follow the path of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


def start_at(theta: list[Tensor], *columns: list[Tensor]) -> None:
    """Have columns of a state be where the parameters are now."""
    for column in columns:
        torch._foreach_copy_(column, theta)


def elements(tensors: Sequence[Tensor]) -> int:
    """Count the elements of all tensors."""
    return sum(t.numel() for t in tensors)


def beside(count: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """Return a count on the device of the parameters."""
    return count.to(theta[0].device) if theta else count
