"""The anchor that holds each weight alone: one importance for each element."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import copies, copy, grow_tensor, zero
from rwalk.anchors.base import Anchor


@final
@dataclass(frozen=True, eq=False, repr=False)
class ElementwiseAnchor(Anchor):
    """The quadratic strength * sum of omega * (theta - point)^2, without a half (equation 8)."""

    @classmethod
    def at(cls, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "ElementwiseAnchor":
        """Make an anchor at a copy of `point`; `omega` runs parallel to it."""
        copied = copies(list(point.values()))
        return cls(dict(zip(point, copied, strict=True)), dict(zip(point, omega, strict=True)))

    def merge(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "ElementwiseAnchor":
        """Add a second quadratic exactly: the sum of two is one with omega = a + b at the weighted mean of their points.

        Where both importances are 0 the newer point stands. The same weighted mean is Fisher merging of two models
        (Matena and Raffel 2022). `omega` runs parallel to `point`; parameters that are new here simply join.
        """
        merged = {name: self._both(name, p, b) for (name, p), b in zip(point.items(), omega, strict=True)}
        return ElementwiseAnchor({n: p for n, (p, _) in merged.items()}, {n: o for n, (_, o) in merged.items()})

    def _both(self, name: str, point: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        new = copy(point)
        if name not in self.point:
            return new, omega
        total = self.omega[name] + omega
        share = torch.where(total > 0, omega / total, 1.0).to(new.dtype)
        return self.point[name].lerp(new, share), total

    def align(self, theta: Mapping[str, Tensor]) -> "ElementwiseAnchor":
        """Follow a model that changed: see `Anchor.align`."""
        both = [name for name in theta if name in self.point]
        point = {name: grow_tensor(self.point[name], theta[name], copy) for name in both}
        return replace(self, point=point, omega={name: _followed(self.omega[name], theta[name]) for name in both})

    def begun(self, theta: Mapping[str, Tensor], sharded: bool = False) -> "ElementwiseAnchor":  # noqa: ARG002
        """Take up parameters as they are: see `Anchor.begun`."""
        new = {name: p for name, p in theta.items() if name not in self.point}
        point = self.point | {name: copy(p) for name, p in new.items()}
        return replace(self, point=point, omega=self.omega | {name: zero(p) for name, p in new.items()})

    def renamed(self, names: Mapping[str, str]) -> "ElementwiseAnchor":
        """Return the entries of some names under others."""
        point, omega = ({new: column[old] for old, new in names.items()} for column in (self.point, self.omega))
        return replace(self, point=point, omega=omega)

    def scaled(self, factor: float) -> "ElementwiseAnchor":
        """Multiply the importance by a number."""
        return replace(self, omega={name: omega * factor for name, omega in self.omega.items()})

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return sum of omega * (theta - point)^2, without the strength."""
        names = [name for name in theta if name in self.point]
        return kernels.penalty(*([column[n] for n in names] for column in (theta, self.point, self.omega)))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "ElementwiseAnchor":
        """Return the anchor that `content` was made from."""
        return cls(content["point"], content["omega"])


def _followed(omega: Tensor, theta: Tensor) -> Tensor:
    """Carry importance over to a parameter as it is now; in bfloat16 it stays so, as that is widened where it is used."""
    narrow = omega.dtype is torch.bfloat16 and (omega.shape, omega.device) == (theta.shape, theta.device)
    return omega if narrow else grow_tensor(omega, theta, zero)
