"""Whether the contributions of examples add up to a gradient, up to a common factor."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Relative difference up to which a sum of contributions counts as the gradient; products in bfloat16 are that exact."""

CANCELLED = 2.0**-10
"""The share of contributions that rounding may leave of their sum if they cancel."""


class GradientFit(NamedTuple):
    """Inner products of a sum of contributions and the gradient of the same parameter.

    Args:
        total: the sum with itself.
        both: the sum with the gradient.
        grad: the gradient with itself.
        bound: an upper bound of `total`, reached if all contributions are equal.
    """

    total: float
    both: float
    grad: float
    bound: float

    @classmethod
    def of(cls, total: Tensor, grad: Tensor, bound: Tensor) -> "GradientFit":
        """Compute the inner products, with one synchronisation of the device."""
        total = total.flatten()
        grad = grad.flatten().to(total)
        return cls(*torch.stack([total @ total, total @ grad, grad @ grad, bound.to(total)]).tolist())

    @property
    def factor(self) -> float:
        """The factor between the sum and the gradient."""
        return self.both / self.total if self.total else 1.0

    @property
    def significant(self) -> bool:
        """Whether the sum is more than rounding errors."""
        return self.total > CANCELLED**2 * self.bound

    def fits(self, factor: float, slack: float) -> bool:
        """Return whether the gradient is the sum times a factor, up to a share `slack` of the contributions."""
        missed = self.grad - 2 * factor * self.both + factor**2 * self.total
        return math.sqrt(max(missed, 0.0)) <= TOLERANCE * math.sqrt(self.grad) + slack * abs(factor) * math.sqrt(self.bound)


class CommonFactor(NamedTuple):
    """How the sums of several parameters' contributions relate to their gradients.

    Args:
        factor: the median factor between sum and gradient; 1 without any parameter.
        odd: the parameters whose gradient is not their sum times the factor.
        insignificant: the parameters whose sum may be rounding errors.
        agrees: whether the factor holds for any parameter with a significant sum.
    """

    factor: float
    odd: frozenset[str]
    insignificant: frozenset[str]
    agrees: bool

    @classmethod
    def of(cls, fits: Mapping[str, GradientFit]) -> "CommonFactor":
        """Find the factor of several parameters, by name."""
        significant = {n: fit for n, fit in fits.items() if fit.significant}
        telling = significant or fits
        factor = statistics.median_low([fit.factor for fit in telling.values()]) if telling else 1.0
        slack = CANCELLED if len(fits) > 1 else 0.0
        odd = frozenset(n for n, fit in fits.items() if not fit.fits(factor, slack))
        return cls(factor, odd, frozenset(fits.keys() - significant.keys()), not telling or not odd.issuperset(telling))

    @property
    def squared(self) -> float:
        """The factor between the squares, 1 if it is 1 up to `TOLERANCE`; it may overflow."""
        return 1.0 if abs(self.factor - 1) <= TOLERANCE else self.factor * self.factor
