"""An anchor remembers where the weights were and how much they mattered, and pulls weights back there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwalk import kernels, parallel, states
from rwalk._errors import explain
from rwalk.parameters import carry, copies, copy, grown, zero


class Pull(NamedTuple):
    """The pull of an anchor at one step: columns of `rwalk.kernels.Visit`, None for parameters that it does not hold."""

    point: list[Tensor | None]
    omega: list[Tensor | None]
    strength: float


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

    def largest(self) -> float:
        """Return the largest importance of any element, 0 for an empty anchor."""
        return max((float(omega.max()) for omega in self.omega.values() if omega.numel()), default=0.0)

    def renew(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "Anchor":
        """Make an anchor at other weights with another importance; `omega` runs parallel to `point`."""
        names = list(point)
        return Anchor(dict(zip(names, copies(list(point.values())), strict=True)), dict(zip(names, omega, strict=True)))

    def merge(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "Anchor":
        """Add a second quadratic exactly: the sum of two is one with omega = a + b at the weighted mean of their points.

        Where both importances are 0 the newer point stands. The same weighted mean is Fisher merging of two models
        (Matena and Raffel 2022). `omega` runs parallel to `point`; parameters that are new here simply join.
        """
        merged = {name: self._both(name, p, b) for (name, p), b in zip(point.items(), omega, strict=True)}
        return Anchor({n: p for n, (p, _) in merged.items()}, {n: o for n, (_, o) in merged.items()})

    def _both(self, name: str, point: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        new = copy(point)
        if name not in self.point:
            return new, omega
        total = self.omega[name] + omega
        share = torch.where(total > 0, omega / total, 1.0).to(new.dtype)
        return self.point[name].lerp(new, share), total

    def align(self, theta: Mapping[str, Tensor]) -> "Anchor":
        """Follow a model that changed, by name and leading block.

        Entries that grew keep their old block; new elements have importance zero and rest where the model has them. Names that
        the anchor does not know stay unknown until the next task's end, and names that `theta` lacks are dropped.
        """
        both = [name for name in theta if name in self.point]
        return Anchor(
            {name: carry(self.point[name], theta[name], copy) for name in both},
            {name: carry(self.omega[name], theta[name], zero) for name in both},
        )

    def match(self, theta: Mapping[str, Tensor], rename: Mapping[str, str] | Callable[[str], str] | None = None) -> "Match":
        """Compare with a model by name and leading block.

        Args:
            theta: parameters by name.
            rename: from this anchor's names to those of `theta`; names that a mapping lacks stay.
        """
        change = rename if callable(rename) else lambda name: (rename or {}).get(name, name)
        names = {name: change(name) for name in self.point}
        if len(set(names.values())) < len(names):
            raise ValueError(
                explain("a `rename` that gives one name to several tensors", "different names", "Make its results differ.")
            )
        order = {name: i for i, name in enumerate(theta)}
        known = sorted((old for old, new in names.items() if new in order), key=lambda old: order[names[old]])
        fits = {old: names[old] for old in known if grown(self.point[old].shape, theta[names[old]].shape)}
        same = [new for old, new in fits.items() if self.point[old].shape == theta[new].shape]
        return Match(
            same=same,
            grown=[new for new in fits.values() if new not in same],
            misfits=[names[old] for old in known if old not in fits],
            unknown=[new for new in names.values() if new not in theta],
            missing=[name for name in theta if name not in names.values()],
            anchor=Anchor({n: self.point[o] for o, n in fits.items()}, {n: self.omega[o] for o, n in fits.items()}),
        )

    def save(self, path: str | Path) -> None:
        """Write the anchor to a safetensors file, whole or not at all: entries `point/NAME` and `omega/NAME`.

        If its tensors are DTensors all ranks have to call; the first one writes.
        """
        content = {"point": self.point, "omega": self.omega}
        parallel.write(content, parallel.Spread.of(self.point.values()), partial(states.save, path, "anchor"))

    @classmethod
    def load(cls, path: str | Path) -> "Anchor":
        """Read an anchor from a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else.
        """
        content = states.load(path, "anchor")
        shapes = [_shapes(content.get(part)) for part in ("point", "omega")]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(states.foreign(path, "anchor", "which is no anchor"))
        return cls(content["point"], content["omega"])

    def pull(self, names: Sequence[str], strength: float) -> Pull:
        """Say where parameters of these names are pulled, for `rwalk.kernels.visit_` to add to their gradients (equation 8)."""
        return Pull([self.point.get(name) for name in names], [self.omega.get(name) for name in names], strength)

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return sum of omega * (theta - point)^2, without the strength."""
        names = [name for name in theta if name in self.point]
        return kernels.penalty(*([column[n] for n in names] for column in (theta, self.point, self.omega)))


@dataclass(frozen=True, eq=False)
class Match:
    """How an anchor fits a model, by the model's names.

    Args:
        same: parameters of the same shape.
        grown: parameters whose leading block the anchor has.
        misfits: parameters that are smaller than in the anchor, or have other dimensions.
        unknown: names of the anchor that the model lacks.
        missing: names of the model that the anchor lacks.
        anchor: the entries that fit, under the model's names.
    """

    same: list[str]
    grown: list[str]
    misfits: list[str]
    unknown: list[str]
    missing: list[str]
    anchor: Anchor

    def __str__(self) -> str:
        """Name what matched and what did not."""
        words = {
            "the same shape": self.same,
            "grown": self.grown,
            "of another shape": self.misfits,
            "only in the anchor": self.unknown,
            "only in the model": self.missing,
        }
        return "; ".join(f"{len(names)} {word} ({', '.join(names)})" for word, names in words.items() if names)


def _shapes(tensors: Any) -> dict[str, torch.Size] | None:
    """Return the shapes of tensors by name, or None for anything else."""
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        return None
    return {name: tensor.shape for name, tensor in tensors.items()}
