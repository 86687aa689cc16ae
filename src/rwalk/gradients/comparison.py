"""Whether the contributions of examples sum to a gradient, up to a factor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Relative difference up to which contributions count as summing to the gradient; products in bfloat16 are that exact."""

CANCELLED = 2.0**-10
"""Where contributions cancel, the share of them that may be left of a sum through rounding."""


class Comparison(NamedTuple):
    """Inner products of a sum of contributions and the gradient of the same parameter.

    Args:
        total: the sum with itself.
        both: the sum with the gradient.
        grad: the gradient with itself.
        apart: an upper bound of `total`, which it reaches if all contributions are equal.
    """

    total: float
    both: float
    grad: float
    apart: float

    @classmethod
    def of(cls, total: Tensor, grad: Tensor, apart: Tensor) -> "Comparison":
        """Compare, with one wait for the device."""
        total = total.flatten()
        grad = grad.flatten().to(total)
        return cls(*torch.stack([total @ total, total @ grad, grad @ grad, apart.to(total)]).tolist())

    @property
    def factor(self) -> float:
        """What the sum is multiplied by in the gradient."""
        return self.both / self.total if self.total else 1.0

    @property
    def telling(self) -> bool:
        """Whether the sum is more than rounding."""
        return self.total > CANCELLED**2 * self.apart

    def fits(self, factor: float, slack: float) -> bool:
        """Tell whether the gradient is the sum times a factor; `slack` is the share of contributions that it may miss."""
        missed = self.grad - 2 * factor * self.both + factor**2 * self.total
        return math.sqrt(max(missed, 0.0)) <= TOLERANCE * math.sqrt(self.grad) + slack * abs(factor) * math.sqrt(self.apart)
