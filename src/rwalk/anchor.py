"""An anchor remembers where the weights were and how much they mattered, and pulls weights back there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwalk import kernels, parallel, states
from rwalk._errors import explain
from rwalk.factors import Layer
from rwalk.kernels import After, counted
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
            anchor=self.renamed(fits),
        )

    def renamed(self, names: Mapping[str, str]) -> "Anchor":
        """Return the entries of some names under others."""
        return Anchor({n: self.point[o] for o, n in names.items()}, {n: self.omega[o] for o, n in names.items()})

    def save(self, path: str | Path) -> None:
        """Write the anchor to a safetensors file, whole or not at all: entries `point/NAME` and `omega/NAME`.

        If its tensors are DTensors all ranks have to call; the first one writes.
        """
        parallel.write(self.content(), parallel.Spread.of(self.point.values()), partial(states.save, path, "anchor"))

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | Path) -> "Anchor":
        """Read an anchor from a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else.
        """
        content = states.load(path, "anchor")
        shapes = [_shapes(content.get(part)) for part in ("point", "omega")]
        if None in shapes or shapes[0] != shapes[1] or damaged_layers(content):
            raise ValueError(states.foreign(path, "anchor", "which is no anchor"))
        return Anchor.of(content)

    def content(self) -> dict[str, Any]:
        """Return the anchor as tensors and plain values in dictionaries, for state files."""
        return {"point": self.point, "omega": self.omega}

    @staticmethod
    def of(content: Mapping[str, Any]) -> "Anchor":
        """Make the anchor, of either geometry, that `content` was taken of."""
        point, omega = content["point"], content["omega"]
        if "layers" not in content:
            return Anchor(point, omega)
        layers = {weight: Layer.read(entry, weight, point) for weight, entry in content["layers"].items()}
        return KroneckerAnchor(point, omega, layers, content["every"])

    def tensors(self) -> Iterator[Tensor]:
        """Go through all tensors that are held."""
        yield from self.point.values()
        yield from self.omega.values()

    def pull(self, names: Sequence[str], strength: float) -> Pull:
        """Say where parameters of these names are pulled, for `rwalk.kernels.visit_` to add to their gradients (equation 8)."""
        return Pull([self.point.get(name) for name in names], [self.omega.get(name) for name in names], strength)

    def draw(self, rows: Mapping[str, After]) -> dict[str, After]:
        """Have the visits of parameters that have just moved pull them here, proximally.

        Args:
            rows: what is done to each parameter after the step, by name, with the metric of the pull filled in.
        """
        return {name: After(row.theta, self.point[name], self.omega[name], *row[3:]) for name, row in rows.items()}

    def settle(self, theta: Mapping[str, Tensor]) -> Callable[[], None]:  # noqa: ARG002
        """Make up for pulls that were put off, when a task ends; return what undoes it."""
        return lambda: None

    def waive(self) -> None:
        """Forget pulls that were put off."""

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return sum of omega * (theta - point)^2, without the strength."""
        names = [name for name in theta if name in self.point]
        return kernels.penalty(*([column[n] for n in names] for column in (theta, self.point, self.omega)))


@dataclass(frozen=True, eq=False)
class KroneckerAnchor(Anchor):
    """An anchor that holds linear layers by two matrices each, strength * sum of tr(D^T G D A), and all else by importance.

    The proximal pull turns a layer's way from the anchor into the bases in which A and G are diagonal, shortens it there, and
    turns it back. That takes four matrix products, so it is done every few steps, with the sum of their sizes.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: their importance, by name: for layers the quadratic's diagonal, which says how much is held but does not pull.
        layers: the layers, by the names of their weights.
        every: after how many steps a layer is pulled.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    every: int = 10

    def elementwise(self) -> list[str]:
        """Name the parameters that are held by importance alone."""
        inside = {name for weight, layer in self.layers.items() for name in layer.names(weight)}
        return [name for name in self.point if name not in inside]

    def merge(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "Anchor":  # noqa: ARG002
        """Refuse: a sum of two such quadratics is none."""
        raise TypeError(
            explain(
                "a quadratic to merge into a `KroneckerAnchor`",
                "anchors that hold each weight alone, whose sum is another one",
                "Let the rule `Kronecker()` add tasks up, or merge plain anchors.",
            )
        )

    def align(self, theta: Mapping[str, Tensor]) -> "KroneckerAnchor":
        """Follow a model that changed, as `Anchor.align` does: grown layers keep their old block."""
        both = super().align(theta)
        kept = {weight: layer for weight, layer in self.layers.items() if weight in both.point}
        layers = {weight: layer.aligned(theta[weight], layer.bias in both.point) for weight, layer in kept.items()}
        return KroneckerAnchor(both.point, both.omega, layers, self.every)

    def renamed(self, names: Mapping[str, str]) -> "KroneckerAnchor":
        """Return the entries of some names under others."""
        both = super().renamed(names)
        kept = {weight: layer for weight, layer in self.layers.items() if weight in names}
        layers = {
            names[weight]: replace(
                layer.aligned(self.point[weight], layer.bias in names), bias=names.get(layer.bias or ""), owed=[0.0, 0]
            )
            for weight, layer in kept.items()
        }
        return KroneckerAnchor(both.point, both.omega, layers, self.every)

    def content(self) -> dict[str, Any]:
        """Return the anchor as tensors and plain values in dictionaries, for state files."""
        layers = {weight: layer.content() for weight, layer in self.layers.items()}
        return super().content() | {"layers": layers, "every": self.every}

    def tensors(self) -> Iterator[Tensor]:
        """Go through all tensors that are held."""
        yield from super().tensors()
        for layer in self.layers.values():
            yield from layer.tensors()

    def pull(self, names: Sequence[str], strength: float) -> Pull:  # noqa: ARG002
        """Refuse: this pull is for after the step."""
        raise TypeError(explain("the gradient pull to a `KroneckerAnchor`", "the proximal one", 'Pass `pull="proximal"`.'))

    def draw(self, rows: Mapping[str, After]) -> dict[str, After]:
        """Have visits pull what is held by importance, and pull the layers whose turn it is."""
        rows = dict(zip(rows, counted(rows.values()), strict=True))
        for weight, layer in self.layers.items():
            if weight in rows:
                layer.owed[0] += _pace(rows[weight])
                layer.owed[1] += 1
                if layer.owed[1] >= self.every:
                    self._draw(weight, {name: row.theta for name, row in rows.items()})
        alone = super().draw({name: rows[name] for name in self.elementwise() if name in rows})
        return {name: alone.get(name, After(row.theta)) for name, row in rows.items()}

    def settle(self, theta: Mapping[str, Tensor]) -> Callable[[], None]:
        """Pull the layers that have moved since their last turn; return what undoes it."""
        owing = {weight: list(layer.owed) for weight, layer in self.layers.items() if layer.owed[0]}
        names = [name for weight in owing for name in self.layers[weight].names(weight) if name in theta]
        before = {name: theta[name].detach().clone() for name in names}

        def undo() -> None:
            for name, value in before.items():
                theta[name].detach().copy_(value)
            for weight, owed in owing.items():
                self.layers[weight].owed[:] = owed

        for weight in owing:
            self._draw(weight, {name: p for name, p in theta.items() if p.requires_grad})
        return undo

    def waive(self) -> None:
        """Forget pulls that were put off."""
        for layer in self.layers.values():
            layer.owed[:] = [0.0, 0]

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, and of omega * (theta - point)^2 over all else, without the strength."""
        alone = super().penalty({name: theta[name] for name in self.elementwise() if name in theta})
        inside = {weight: layer for weight, layer in self.layers.items() if weight in theta}
        return sum((layer.penalty(layer.moved(weight, theta, self.point)) for weight, layer in inside.items()), alone)

    def _draw(self, weight: str, theta: Mapping[str, Tensor]) -> None:
        """Pull those parameters of a layer that are in `theta`."""
        layer = self.layers[weight]
        way = layer.way(layer.moved(weight, theta, self.point), layer.owed[0])
        for name, part in zip(layer.names(weight), layer.split(way), strict=True):
            if name in theta:
                theta[name].sub_(part.to(theta[name].dtype))
        layer.owed[:] = [0.0, 0]


def _pace(row: After) -> float:
    """Return 2 * strength * the optimiser's step of a layer: one number for all of it, from the mean of Adam's denominators."""
    if row.second is None:
        return row.step
    return row.step / float((row.second / row.correction).sqrt().mean() + row.eps)


def damaged_layers(content: Mapping[str, Any]) -> list[str]:
    """Name the layers in an anchor's content that do not fit its points."""
    layers, wrong = content.get("layers", {}), []
    if not isinstance(layers, Mapping):
        return ["layers"]
    for weight, entry in layers.items():
        try:
            Layer.read(entry, weight, content["point"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            wrong.append(str(weight))
    every = content.get("every") if "layers" in content else 1
    return wrong if type(every) is int and every >= 1 else [*wrong, "every"]


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
    """Return the shapes of tensors of floating point by name, or None for anything else."""
    if not isinstance(tensors, dict):
        return None
    if not all(isinstance(n, str) and isinstance(t, Tensor) and t.is_floating_point() for n, t in tensors.items()):
        return None
    return {name: tensor.shape for name, tensor in tensors.items()}
