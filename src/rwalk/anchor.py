"""An anchor remembers where the weights were and how much they mattered, and pulls weights back there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwalk import kernels
from rwalk.parameters import copies, extend, state_dtype, zeros


@dataclass(frozen=True, eq=False)
class Anchor:
    """The quadratic that consolidation adds to the loss: strength * sum of omega * (theta - point)^2, without a half.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: their importance, by name: non-negative, one weight for each element of `point`.
    """

    point: dict[str, Tensor] = field(default_factory=dict)
    omega: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the tensors held to."""
        return len(self.point)

    def renew(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "Anchor":
        """Make an anchor at other weights with another importance; `omega` runs parallel to `point`."""
        names = list(point)
        return Anchor(dict(zip(names, copies(list(point.values())), strict=True)), dict(zip(names, omega, strict=True)))

    def align(self, theta: Mapping[str, Tensor]) -> "Anchor":
        """Follow a model that changed, by name and leading block.

        Entries that grew keep their old block; new elements have importance zero and rest where the model has them. Names that
        the anchor does not know stay unknown until the next task's end, and names that `theta` lacks are dropped.
        """
        both = [name for name in theta if name in self.point]
        return Anchor(
            {name: self._follow(self.point[name], theta[name], copies) for name in both},
            {name: self._follow(self.omega[name], theta[name], zeros) for name in both},
        )

    def pull(self, theta: Mapping[str, Tensor], grad: Mapping[str, Tensor], strength: float) -> None:
        """Add the gradient of the penalty to the gradients of the parameters that the anchor holds (equation 8)."""
        names = [name for name in grad if name in self.point]
        kernels.pull_(*self._lists(grad, theta, names), *self._lists(self.point, self.omega, names), strength)

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return sum of omega * (theta - point)^2, without the strength."""
        names = [name for name in theta if name in self.point]
        return kernels.penalty([theta[n] for n in names], *self._lists(self.point, self.omega, names))

    @staticmethod
    def _follow(old: Tensor, theta: Tensor, fresh: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        return old.to(theta.device, state_dtype(theta)) if old.shape == theta.shape else extend(old, fresh([theta])[0])

    @staticmethod
    def _lists(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [a[n] for n in names], [b[n] for n in names]
