"""The anchor that holds layers by two matrices each, and everything else by importance."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from rwalk._parameters import copy, exact_copy, state_dtype
from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.anchors.factors import KroneckerFactor
from rwalk.anchors.old_factors import current_anchor
from rwalk.distributed import shards
from rwalk.distributed.shards import ShardGroup


class PullSteps(Protocol):
    """How long the steps of a pull are."""

    def each(self, name: str) -> Tensor | float:
        """Return the step of each element of a parameter."""

    def mean(self, name: str) -> float:
        """Return one number for all of a parameter."""


class HeldNames(NamedTuple):
    """How an anchor holds parameters.

    Args:
        biases: of each layer that is held as a whole, by its weight's name: its bias, None where that is no part of it.
        alone: the parameters that are held element by element.
    """

    biases: Mapping[str, str | None]
    alone: frozenset[str]


@final
@dataclass(frozen=True, eq=False)
class KroneckerAnchor(Anchor):
    """The quadratic strength * sum over layers of tr(D^T G D A), and elementwise for all parameters outside of such layers.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: the importance of those parameters that are outside of layers, by name.
        layers: the layers, by the names of their weights.
    """

    parts: ClassVar[tuple[str, ...]] = ("layers",)
    by_element: ClassVar[bool] = False
    layers: dict[str, KroneckerFactor] = field(default_factory=dict)

    @classmethod
    def of(cls, anchor: Anchor) -> "KroneckerAnchor":
        """Return an anchor of either kind as one of this kind, with the same quadratic."""
        return anchor if isinstance(anchor, cls) else cls(anchor.point, anchor.omega, origin=anchor.origin)

    @property
    def elementwise(self) -> ElementwiseAnchor:
        """The parameters that are held by importance alone."""
        point = {name: self.point[name].to(state_dtype(self.point[name])) for name in self.omega}
        return ElementwiseAnchor(point, self.omega)

    @cached_property
    def inside(self) -> frozenset[str]:
        """The names of parameters that belong to a layer."""
        return frozenset(name for weight, layer in self.layers.items() for name in layer.names(weight))

    def importance(self) -> dict[str, Tensor]:
        """Return the quadratic's diagonal, by name."""
        found = dict(self.omega)
        for weight, layer in self.layers.items():
            found |= zip(layer.names(weight), layer.importance(self.point[weight].shape), strict=True)
        return {name: found[name] for name in self.point}

    def align(self, theta: Mapping[str, Tensor]) -> "KroneckerAnchor":
        """Follow a model that changed, as `Anchor.align` does: grown layers keep their old block."""
        moved = {n: p for n, p in self.point.items() if n in theta and (p.shape, p.device) != (theta[n].shape, theta[n].device)}
        grown = ElementwiseAnchor(moved, moved).align(theta).point
        point = {name: grown.get(name, self.point[name]) for name in theta if name in self.point}
        omega = self.elementwise.align(theta).omega
        layers = {}
        for weight, layer in self.layers.items():
            if weight in point:
                followed = layer.aligned(point[weight], self.point[weight].shape, layer.arrangement.bias in point)
                if followed is None:
                    parts = dict(zip(layer.names(weight), layer.importance(self.point[weight].shape), strict=True))
                    omega |= ElementwiseAnchor({n: self.point[n] for n in parts}, parts).align(theta).omega
                else:
                    layers[weight] = followed
        return replace(self, point=point, omega=omega, layers=layers)

    def begun(self, theta: Mapping[str, Tensor], sharded: bool = False) -> "KroneckerAnchor":
        """Take up parameters as they are: see `Anchor.begun`."""
        new = {name: (copy if sharded else exact_copy)(p) for name, p in theta.items() if name not in self.point}
        nothing = {n: torch.zeros((), dtype=state_dtype(p), device=p.device).expand(p.shape) for n, p in new.items()}
        return replace(self, point=self.point | new, omega=self.omega | nothing)

    def renamed(self, names: Mapping[str, str]) -> "KroneckerAnchor":
        """Return the entries of some names under others."""
        point = {names[n]: p for n, p in self.point.items() if n in names}
        omega = {names[n]: o for n, o in self.omega.items() if n in names}
        return replace(self, point=point, omega=omega, layers={names[w]: f for w, f in self._renamed(names) if w in names})

    def scaled(self, factor: float) -> "KroneckerAnchor":
        """Multiply the importance by a number."""
        layers = {weight: layer.faded(factor) for weight, layer in self.layers.items()}
        return replace(self, omega={name: omega * factor for name, omega in self.omega.items()}, layers=layers)

    def _renamed(self, names: Mapping[str, str]) -> Iterator[tuple[str, KroneckerFactor]]:
        for weight, layer in self.layers.items():
            bias = layer.arrangement.bias
            kept = layer.aligned(self.point[weight], self.point[weight].shape, bias in names) or layer
            arrangement = kept.arrangement
            yield weight, replace(kept, arrangement=arrangement._replace(bias=names.get(arrangement.bias or "")))

    def held_names(self) -> HeldNames:
        """Tell which parameters are held in layers, and which alone."""
        return HeldNames({w: layer.arrangement.bias for w, layer in self.layers.items()}, _important(self.omega))

    def totals(self, shard_group: ShardGroup) -> dict[str, float]:
        """Return the sum of the importance of each parameter: see `Anchor.totals`."""
        found = self.elementwise.totals(shard_group)
        for weight, layer in self.layers.items():
            found |= zip(layer.names(weight), layer.totals(), strict=True)
        return {name: found[name] for name in self.point}

    def draw(self, theta: Mapping[str, Tensor], steps: PullSteps, parameters: Mapping[str, Tensor]) -> None:
        """Make the proximal pull, in place, of those parameters that are in `theta`.

        Args:
            theta: this rank's parts of parameters, by name.
            steps: how long the steps of the pull are.
            parameters: the parameters themselves, which may be sharded: then layers are pulled as a whole on each rank.
        """
        for weight, layer in self.layers.items():
            if weight in theta:
                self._draw_layer(weight, layer, theta, steps.mean(weight), parameters)
        for name, omega in self.omega.items():
            if name in theta:
                p = theta[name]
                w = omega.to(p.device, torch.promote_types(omega.dtype, p.dtype)) * steps.each(name)
                p.sub_(((w / (1 + w)) * (p - self.point[name].to(w.device, w.dtype))).to(p.dtype))

    def _draw_layer(
        self, weight: str, layer: KroneckerFactor, theta: Mapping[str, Tensor], step: float, parameters: Mapping[str, Tensor]
    ) -> None:
        move = layer.proximal_move(self._displacement(weight, layer, theta, parameters), step)
        for name, part in zip(layer.names(weight), layer.arrangement.split(move, parameters[weight].shape), strict=True):
            if name in theta:
                theta[name].sub_(shards.local_part(part, parameters[name]).to(theta[name].dtype))

    def _displacement(
        self, weight: str, layer: KroneckerFactor, theta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """Return D of a layer, gathered from all ranks where it is sharded."""
        if not shards.sharded(parameters.get(weight)):
            return layer.displacement(weight, theta, self.point)
        moved: dict[str, Tensor] = {}
        for name in layer.names(weight):
            part = theta[name] - self.point[name] if name in theta else torch.zeros_like(self.point[name])
            whole: Any = shards.full_tensor(shards.as_dtensor(part, parameters[name]))
            moved[name] = whole
        return layer.displacement(weight, moved, {name: torch.zeros_like(d) for name, d in moved.items()})

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, and of omega * (theta - point)^2 over the rest, without the strength."""
        return self.whole_penalty(theta, theta) + self.elementwise.penalty(theta)

    def whole_penalty(self, theta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, also where they are sharded."""
        held = [(weight, layer) for weight, layer in self.layers.items() if weight in theta]
        terms = [layer.penalty(self._displacement(weight, layer, theta, parameters)) for weight, layer in held]
        return sum(terms, 0.0)

    def kept(self, away: Callable[[Tensor], Tensor], narrow: Callable[[Tensor], Tensor]) -> "KroneckerAnchor":
        """Return the anchor as it is kept: see `Anchor.kept`."""
        layers = {weight: layer.changed(lambda t: away(narrow(t))) for weight, layer in self.layers.items()}
        return replace(super().kept(away, narrow), layers=layers)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held."""
        yield from super().tensors()
        for layer in self.layers.values():
            yield from layer.tensors()

    def content(self) -> dict[str, Any]:
        """Return the anchor as tensors and plain values in dictionaries, for state files."""
        return super().content() | {"layers": {weight: layer.content() for weight, layer in self.layers.items()}}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "KroneckerAnchor":
        """Return the anchor that `content` was made from."""
        content = current_anchor(content)
        point = content["point"]
        layers = {weight: KroneckerFactor.read(entry, weight, point) for weight, entry in content["layers"].items()}
        anchor = cls(point, {}, layers)
        return replace(anchor, omega={n: o for n, o in content["omega"].items() if n not in anchor.inside})

    @classmethod
    def damaged_parts(cls, content: Mapping[str, Any]) -> list[str]:
        """Name the layers that do not fit the content's points."""
        content = current_anchor(content)
        if not isinstance(content["layers"], Mapping):
            return ["layers"]
        wrong, inside = [], set()
        for weight, entry in content["layers"].items():
            try:
                inside |= {*KroneckerFactor.read(entry, weight, content["point"]).names(weight)}
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
                wrong.append(str(weight))
        return wrong or [n for n in content["point"] if n not in inside and n not in content["omega"]]


def _important(omega: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(name for name, o in omega.items() if bool(o.any()))


def held_names(anchor: Anchor) -> HeldNames:
    """Tell how an anchor of either kind holds parameters."""
    return anchor.held_names() if isinstance(anchor, KroneckerAnchor) else HeldNames({}, _important(anchor.omega))
