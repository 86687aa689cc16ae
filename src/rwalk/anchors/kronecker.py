"""The anchor that holds linear layers by two matrices each, and everything else by importance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.anchors.factors import KroneckerFactor


@final
@dataclass(frozen=True, eq=False)
class KroneckerAnchor(Anchor):
    """The quadratic strength * sum over layers of tr(D^T G D A), and elementwise for all parameters outside of such layers.

    The proximal pull turns a layer's displacement from the anchor into the bases in which A and G are diagonal, shrinks it
    there, and turns it back. That takes four matrix products, so it is done every few steps, with the sum of their sizes.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: their importance, by name: for layers the quadratic's diagonal, which says how much is held but does not pull.
        layers: the layers, by the names of their weights.
        every: after how many steps a layer is pulled.
    """

    parts: ClassVar[tuple[str, ...]] = ("layers", "every")
    allows_gradient_pull: ClassVar[bool] = False
    allows_shards: ClassVar[bool] = False
    reads_skip_flag: ClassVar[bool] = False
    layers: dict[str, KroneckerFactor] = field(default_factory=dict)
    every: int = 10

    @property
    def elementwise(self) -> ElementwiseAnchor:
        """The parameters that are held by importance alone."""
        names = [name for name in self.point if name not in self._inside]
        return ElementwiseAnchor({n: self.point[n] for n in names}, {n: self.omega[n] for n in names})

    @cached_property
    def _inside(self) -> set[str]:
        """The names of parameters that belong to a layer."""
        return {name for weight, layer in self.layers.items() for name in layer.names(weight)}

    def align(self, theta: Mapping[str, Tensor]) -> "KroneckerAnchor":
        """Follow a model that changed, as `Anchor.align` does: grown layers keep their old block."""
        both = ElementwiseAnchor(self.point, self.omega).align(theta)
        kept = {weight: layer for weight, layer in self.layers.items() if weight in both.point}
        layers = {weight: layer.aligned(theta[weight], layer.bias in both.point) for weight, layer in kept.items()}
        return replace(self, point=both.point, omega=both.omega, layers=layers)

    def renamed(self, names: Mapping[str, str]) -> "KroneckerAnchor":
        """Return the entries of some names under others."""
        both = ElementwiseAnchor(self.point, self.omega).renamed(names)
        layers = {names[w]: self._renamed(w, layer, names) for w, layer in self.layers.items() if w in names}
        return replace(self, point=both.point, omega=both.omega, layers=layers)

    def _renamed(self, weight: str, layer: KroneckerFactor, names: Mapping[str, str]) -> KroneckerFactor:
        aligned = layer.aligned(self.point[weight], layer.bias in names)
        return replace(aligned, bias=names.get(layer.bias or ""), deferred=[0.0, 0])

    def columns(self, names: Sequence[str]) -> dict[str, list[Tensor | None]]:
        """Return "point" and "omega" of parameters that are held element by element: see `Anchor.columns`."""
        inside = self._inside
        apart = [None if name in inside else name for name in names]
        return {"point": [self.point.get(n or "") for n in apart], "omega": [self.omega.get(n or "") for n in apart]}

    def draw(self, theta: Mapping[str, Tensor], step_size: Callable[[str], float]) -> None:
        """Pull the layers whose turn it is: see `Anchor.draw`."""
        for weight, layer in self.layers.items():
            if weight in theta:
                layer.deferred[0] += step_size(weight)
                layer.deferred[1] += 1
                if layer.deferred[1] >= self.every:
                    self._draw_layer(weight, theta)

    def apply_deferred_pull(self, theta: Mapping[str, Tensor]) -> Callable[[], None]:
        """Pull the layers that have moved since their last turn; return a function that undoes it."""
        deferred = {weight: list(layer.deferred) for weight, layer in self.layers.items() if layer.deferred[0]}
        names = [name for weight in deferred for name in self.layers[weight].names(weight) if name in theta]
        before = {name: theta[name].detach().clone() for name in names}

        def undo() -> None:
            for name, value in before.items():
                theta[name].detach().copy_(value)
            for weight, sums in deferred.items():
                self.layers[weight].deferred[:] = sums

        for weight in deferred:
            self._draw_layer(weight, {name: p for name, p in theta.items() if p.requires_grad})
        return undo

    def drop_deferred_pull(self) -> None:
        """Forget deferred pulls."""
        for layer in self.layers.values():
            layer.deferred[:] = [0.0, 0]

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, and of omega * (theta - point)^2 over the rest, without the strength."""
        held = [(weight, layer) for weight, layer in self.layers.items() if weight in theta]
        terms = [layer.penalty(layer.displacement(weight, theta, self.point)) for weight, layer in held]
        return sum(terms, self.elementwise.penalty(theta))

    def _draw_layer(self, weight: str, theta: Mapping[str, Tensor]) -> None:
        """Pull those parameters of a layer that are in `theta`."""
        layer = self.layers[weight]
        move = layer.proximal_move(layer.displacement(weight, theta, self.point), layer.deferred[0])
        for name, part in zip(layer.names(weight), layer.split(move), strict=True):
            if name in theta:
                theta[name].sub_(part.to(theta[name].dtype))
        layer.deferred[:] = [0.0, 0]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held."""
        yield from super().tensors()
        for layer in self.layers.values():
            yield from layer.tensors()

    def content(self) -> dict[str, Any]:
        """Return the anchor as tensors and plain values in dictionaries, for state files."""
        layers = {weight: layer.content() for weight, layer in self.layers.items()}
        return super().content() | {"layers": layers, "every": self.every}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "KroneckerAnchor":
        """Return the anchor that `content` was made from."""
        layers = {weight: KroneckerFactor.read(entry, weight, content["point"]) for weight, entry in content["layers"].items()}
        return cls(content["point"], content["omega"], layers, content["every"])

    @classmethod
    def damaged_parts(cls, content: Mapping[str, Any]) -> list[str]:
        """Name the layers that do not fit the content's points, and `every` if it is no number of steps."""
        if not isinstance(content["layers"], Mapping):
            return ["layers"]
        wrong = []
        for weight, entry in content["layers"].items():
            try:
                KroneckerFactor.read(entry, weight, content["point"])
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
                wrong.append(str(weight))
        return wrong if type(content["every"]) is int and content["every"] >= 1 else [*wrong, "every"]
