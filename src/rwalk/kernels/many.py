"""A list of tensors that answers to the operations which the formulas use, each of them one launch on a GPU.

So the formulas are written once, for a tensor, and serve a whole list: `torch._foreach_` functions do the work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Many:
    """Tensors that act as one.

    Args:
        tensors: any number of them; the shapes may differ, kinds and device may not.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Their common type."""
        return self.tensors[0].dtype

    def numel(self) -> int:
        """Count their elements."""
        return sum(t.numel() for t in self.tensors)

    def to(self, dtype: torch.dtype) -> "Many":
        """Convert."""
        return self if dtype == self.dtype else Many([t.to(dtype) for t in self.tensors])

    def sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """Add up all elements."""
        return torch.stack([t.sum(dtype=dtype) for t in self.tensors]).sum()

    def __sub__(self, other: "Many") -> "Many":
        """Subtract."""
        return Many(torch._foreach_sub(self.tensors, other.tensors))

    def __mul__(self, other: Any) -> "Many":
        """Multiply by a number or scalar."""
        return Many(torch._foreach_mul(self.tensors, other))

    def __truediv__(self, other: Any) -> "Many":
        """Divide by a number or scalar."""
        return Many(torch._foreach_div(self.tensors, other))

    def __add__(self, other: float) -> "Many":
        """Add a number."""
        return Many(torch._foreach_add(self.tensors, other))

    def copy_(self, other: "Many") -> "Many":
        """Overwrite."""
        torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def zero_(self) -> "Many":
        """Overwrite with 0."""
        torch._foreach_zero_(self.tensors)
        return self

    def add_(self, other: Any, alpha: float = 1) -> "Many":
        """Add a number, or other tensors times `alpha`."""
        if isinstance(other, Many):
            torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        else:
            torch._foreach_add_(self.tensors, other)
        return self

    def mul_(self, other: Any) -> "Many":
        """Multiply by a number or by other tensors."""
        torch._foreach_mul_(self.tensors, other.tensors if isinstance(other, Many) else other)
        return self

    def div_(self, other: "Many") -> "Many":
        """Divide by other tensors."""
        torch._foreach_div_(self.tensors, other.tensors)
        return self

    def addcmul_(self, a: "Many", b: "Many", value: float = 1) -> "Many":
        """Add a * b * value."""
        torch._foreach_addcmul_(self.tensors, a.tensors, b.tensors, value=value)
        return self

    def addcdiv_(self, a: "Many", b: "Many", value: float = 1) -> "Many":
        """Add a / b * value."""
        torch._foreach_addcdiv_(self.tensors, a.tensors, b.tensors, value=value)
        return self

    def sqrt_(self) -> "Many":
        """Take the root."""
        torch._foreach_sqrt_(self.tensors)
        return self

    def reciprocal_(self) -> "Many":
        """Take the reciprocal."""
        torch._foreach_reciprocal_(self.tensors)
        return self

    def lerp_(self, end: "Many", weight: "Many") -> "Many":
        """Go the share `weight` of the way to `end`."""
        torch._foreach_lerp_(self.tensors, end.tensors, weight.tensors)
        return self


def above(into: Any, value: Any, limit: float) -> Any:
    """Write 1 where a value exceeds a limit and 0 elsewhere; on a CPU four times as fast as making booleans."""
    if isinstance(into, Many):
        for place, one in zip(into.tensors, value.tensors, strict=True):
            torch.gt(one, limit, out=place)
        return into
    return torch.gt(value, limit, out=into)
