"""The anchor that holds layers by two matrices each, and everything else by importance."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from rwalk._errors import warn
from rwalk._parameters import copy, exact_copy, listed, state_dtype
from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.anchors.factors import Cut, KroneckerFactor, Moments
from rwalk.anchors.held import HeldLayer, Product
from rwalk.anchors.old_factors import current_anchor
from rwalk.anchors.products import ProductFactor
from rwalk.distributed import shards
from rwalk.distributed.shards import ShardGroup
from rwalk.kernels.reference import share_of_way_


class PullSteps(Protocol):
    """How long the steps of a pull are."""

    def each(self, name: str) -> Tensor | float:
        """Return the step of each element of a parameter."""

    def mean(self, name: str) -> Tensor | float:
        """Return one number for all of a parameter."""


class HeldNames(NamedTuple):
    """How an anchor holds parameters.

    Args:
        biases: of each layer that is held as a whole, by its weight's name: its bias, None where that is no part of it.
        alone: the parameters that are held element by element.
        products: of each adapter that is held by its product, by the name of its factor `up`: that of `down`.
        transposed: the weights of layers whose first dimension is that of the inputs.
    """

    biases: Mapping[str, str | None]
    alone: frozenset[str]
    products: Mapping[str, str]
    transposed: frozenset[str] = frozenset()


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerAnchor(Anchor):
    """The quadratic strength * sum over layers of tr(D^T G D A), and elementwise for all parameters outside of such layers.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: the importance of those parameters that are outside of layers, by name; and of those in a layer what tasks have
            measured in which they could not be measured as one. Such a parameter is held by both.
        layers: the layers, by the names of their weights, and adapters, by the names of their factors `up`.
    """

    parts: ClassVar[tuple[str, ...]] = ("layers",)
    by_element: ClassVar[bool] = False
    layers: dict[str, HeldLayer] = field(default_factory=dict)

    @classmethod
    def of(cls, anchor: Anchor) -> "KroneckerAnchor":
        """Return an anchor of either kind as one of this kind, with the same quadratic."""
        return anchor if isinstance(anchor, cls) else cls(anchor.point, anchor.omega, origin=anchor.origin)

    @property
    def elementwise(self) -> ElementwiseAnchor:
        """What is held by importance, element by element."""
        point = {name: self.point[name].to(state_dtype(self.point[name])) for name in self.omega}
        return ElementwiseAnchor(point, self.omega)

    @cached_property
    def inside(self) -> frozenset[str]:
        """The names of parameters that belong to a layer."""
        return frozenset(name for weight, layer in self.layers.items() for name in layer.names(weight))

    def importance(self) -> dict[str, Tensor]:
        """Return the quadratic's diagonal, by name."""
        found = self.omega
        for weight, layer in self.layers.items():
            found = _added(found, self._spread(weight, layer))
        return {name: found[name] for name in self.point}

    def align(self, theta: Mapping[str, Tensor]) -> "KroneckerAnchor":
        """Follow a model that changed, as `Anchor.align` does: grown layers keep their old block."""
        moved = {n: p for n, p in self.point.items() if n in theta and (p.shape, p.device) != (theta[n].shape, theta[n].device)}
        grown = ElementwiseAnchor(moved, moved).align(theta).point
        point = {name: grown.get(name, self.point[name]) for name in theta if name in self.point}
        omega = self.elementwise.align(theta).omega
        layers = {}
        for weight, layer in self.layers.items():
            followed = layer.followed(weight, self.point, point)
            if followed is None:
                spread = self._spread(weight, layer)
                omega = _added(omega, ElementwiseAnchor({n: self.point[n] for n in spread}, spread).align(theta).omega)
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
        layers = {}
        for weight, layer in self.layers.items():
            renamed = layer.renamed(weight, names)
            if renamed is None:
                omega = _added(omega, {names[n]: o for n, o in self._spread(weight, layer).items() if n in names})
            else:
                layers[names[weight]] = renamed
        return replace(self, point=point, omega=omega, layers=layers)

    def scaled(self, factor: float) -> "KroneckerAnchor":
        """Multiply the importance by a number."""
        layers = {weight: layer.faded(factor) for weight, layer in self.layers.items()}
        return replace(self, omega={name: omega * factor for name, omega in self.omega.items()}, layers=layers)

    def without_products(self) -> "KroneckerAnchor":
        """Return the anchor with adapters held element by element, after a warning: where parameters are sharded."""
        products = {weight: layer for weight, layer in self.layers.items() if isinstance(layer, ProductFactor)}
        if not products:
            return self
        warn(
            f"The adapters of {listed(list(products))} were held by their products. As parameters are sharded here, they are "
            "held element by element from now on."
        )
        whole: Any = {name: shards.full_tensor(self.point[name]) for w, layer in products.items() for name in layer.names(w)}
        spread = [zip(layer.names(w), layer.importance(w, whole), strict=True) for w, layer in products.items()]
        layers = {weight: layer for weight, layer in self.layers.items() if weight not in products}
        return replace(self, omega=_added(self.omega, dict(chain(*spread))), layers=layers)

    def _spread(self, weight: str, layer: HeldLayer) -> dict[str, Tensor]:
        """Return the importance of each element of a layer's parameters, by name."""
        return dict(zip(layer.names(weight), layer.importance(weight, self.point), strict=True))

    def held_names(self) -> HeldNames:
        """Tell which parameters are held in layers, and which alone."""
        whole = {w: layer for w, layer in self.layers.items() if not isinstance(layer, ProductFactor)}
        products = {w: layer.arrangement.down for w, layer in self.layers.items() if w not in whole}
        biases = {w: layer.arrangement.bias for w, layer in whole.items()}
        transposed = frozenset(w for w, layer in whole.items() if layer.arrangement.transposed)
        return HeldNames(biases, _important(self.omega), products, transposed)

    def totals(self, shard_group: ShardGroup) -> dict[str, float]:
        """Return the sum of the importance of each parameter: see `Anchor.totals`."""
        found = self.elementwise.totals(shard_group)
        for weight, layer in self.layers.items():
            for name, total in zip(layer.names(weight), layer.totals(weight, self.point), strict=True):
                found[name] = found.get(name, 0.0) + total
        return {name: found[name] for name in self.point}

    def draw(self, theta: Mapping[str, Tensor], steps: PullSteps, parameters: Mapping[str, Tensor]) -> None:
        """Make the proximal pull, in place, of those parameters that are in `theta`.

        Args:
            theta: this rank's parts of parameters, by name.
            steps: how long the steps of the pull are.
            parameters: the parameters themselves, which may be sharded: then layers are pulled as a whole on each rank.
        """
        for weight, layer in self.layers.items():
            lengths = {name: steps.mean(name) for name in layer.pulled_for(weight, theta)}
            if lengths:
                for name, move in layer.moves(weight, *self._whole(weight, layer, theta, parameters), lengths):
                    if name in theta:
                        theta[name].sub_(shards.local_part(move, parameters[name]).to(theta[name].dtype))
        for name, omega in self.omega.items():
            if name in theta:
                p = theta[name]
                w = omega.to(p.device, torch.promote_types(omega.dtype, p.dtype)) * steps.each(name)
                p.sub_((share_of_way_(w.reciprocal_()) * (p - self.point[name].to(w.device, w.dtype))).to(p.dtype))

    def _whole(
        self, weight: str, layer: HeldLayer, theta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return a layer's parameters and their point; gathered from all ranks where they are sharded, with a point of zero."""
        still = {name: shards.local(parameters[name]) for name in layer.leading(weight) if name in parameters}
        here = still | {name: theta[name] for name in layer.names(weight) if name in theta}
        if not shards.sharded(parameters.get(weight)):
            return here, self.point
        moved: dict[str, Tensor] = {}
        for name in layer.names(weight):
            part = here[name] - self.point[name] if name in here else torch.zeros_like(self.point[name])
            whole: Any = shards.full_tensor(shards.as_dtensor(part, parameters[name]))
            moved[name] = whole
        return moved, {name: torch.zeros_like(d) for name, d in moved.items()}

    @torch.no_grad()
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, and of omega * (theta - point)^2, without the strength."""
        return self.whole_penalty(theta, theta) + self.elementwise.penalty(theta)

    def whole_penalty(self, theta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float | Tensor:
        """Return the sum of tr(D^T G D A) over layers, also where they are sharded."""
        held = [(w, layer) for w, layer in self.layers.items() if layer.pulled_for(w, theta)]
        return sum((layer.penalty_at(w, *self._whole(w, layer, theta, parameters)) for w, layer in held), 0.0)

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
        layers = {weight: _read(entry, weight, point) for weight, entry in content["layers"].items()}
        return cls(point, dict(content["omega"]), layers)

    @classmethod
    def damaged_parts(cls, content: Mapping[str, Any]) -> list[str]:
        """Name the layers that do not fit the content's points."""
        content = current_anchor(content)
        if not isinstance(content["layers"], Mapping):
            return ["layers"]
        wrong, inside = [], set()
        for weight, entry in content["layers"].items():
            try:
                inside |= {*_read(entry, weight, content["point"]).names(weight)}
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
                wrong.append(str(weight))
        return wrong or [n for n in content["point"] if n not in inside and n not in content["omega"]]


def _read(entry: Mapping[str, Any], weight: str, point: Mapping[str, Tensor]) -> HeldLayer:
    kind = ProductFactor if "down" in entry else KroneckerFactor
    return kind.read(entry, weight, point)


def joined_layer(moments: Moments, cut: Cut, unit: float, earlier: HeldLayer | None, fade: float) -> HeldLayer:
    """Join what was measured of a layer, or of an adapter, with what earlier tasks left: see `HeldLayer.of`."""
    kind = ProductFactor if isinstance(moments.arrangement, Product) else KroneckerFactor
    return kind.of(moments, cut, unit, earlier, fade)


def _added(omega: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add importance of whole parameters to what is there, by name."""
    there: dict[str, Any] = {name: shards.full_tensor(omega[name]) for name in more if name in omega}
    return {**omega, **{name: there[name].to(o) + o if name in there else o for name, o in more.items()}}


def _important(omega: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(name for name, o in omega.items() if bool(o.any()))


def held_names(anchor: Anchor) -> HeldNames:
    """Tell how an anchor of either kind holds parameters."""
    return anchor.held_names() if isinstance(anchor, KroneckerAnchor) else HeldNames({}, _important(anchor.omega), {})
