"""Adapters that were merged into the weights of their layers: what is held is a layer's weight and its product together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rwalk._errors import warn
from rwalk._parameters import bare, listed, named_parameters
from rwalk.anchors.base import Anchor
from rwalk.anchors.kronecker import KroneckerAnchor
from rwalk.anchors.products import ProductFactor
from rwalk.gradients.adapters import ProbedBase, adapter_scales, probed_bases

if TYPE_CHECKING:
    from rwalk.consolidation.memory import Memory

MOST = 8
"""Of how many adapters in a layer all combinations may have been merged; of more, one or all."""


def note_bases(anchor: Anchor, model: nn.Module) -> Anchor:
    """Return an anchor that knows what adapters are multiplied by now, and what the weights of their layers are like."""
    if not isinstance(anchor, KroneckerAnchor) or not (held := _products(anchor)):
        return anchor
    scales = adapter_scales(bare(model), _names(model, held))
    held = {up: layer.multiplied(scales.get(up, layer.arrangement.scale)) for up, layer in held.items()}
    layers = held | {up: replace(held[up], base=base.value) for base in _bases(model, held) for up in base.ups}
    return replace(anchor, layers={**anchor.layers, **layers})


def follow_merged(memory: "Memory") -> None:
    """Let an adapter's product at the point be 0 where the layer's own weight has taken it up since; drop what fits no more."""
    anchor = memory.anchor = _rescaled(memory.anchor, memory.model)
    held = {up: layer for up, layer in _products(anchor).items() if layer.base is not None}
    if not held or not isinstance(anchor, KroneckerAnchor):
        return
    point, layers = dict(anchor.point), dict(anchor.layers)
    lost: list[str] = []
    for base in _bases(memory.model, held):
        merged = _merged(base, held, point)
        lost += base.ups if merged is None else []
        for up in merged or ():
            down = held[up].arrangement.down
            point[up] = torch.zeros_like(point[up])
            point[down] = memory.protected.theta[down].detach().to(point[down], copy=True)
        layers |= {up: replace(held[up], base=base.value) for up in base.ups if merged}
    if lost or layers != anchor.layers:
        gone = {name for up in lost for name in held[up].names(up)}
        point, omega = ({n: t for n, t in column.items() if n not in gone} for column in (point, anchor.omega))
        kept = {w: layer for w, layer in layers.items() if w not in gone}
        memory.anchor = replace(anchor, point=point, omega=omega, layers=kept)
        _warn_of_lost(lost)


def _rescaled(anchor: Anchor, model: nn.Module) -> Anchor:
    """Return an anchor with the products as they were, where adapters are multiplied by other numbers now."""
    if not isinstance(anchor, KroneckerAnchor) or not (held := _products(anchor)):
        return anchor
    scales = adapter_scales(bare(model), _names(model, held))
    changed = {up: new for up, new in scales.items() if new and new != held[up].arrangement.scale}
    if not changed:
        return anchor
    point = {up: anchor.point[up] * (held[up].arrangement.scale / new) for up, new in changed.items()}
    layers = {up: held[up].multiplied(new) for up, new in changed.items()}
    return replace(anchor, point={**anchor.point, **point}, layers={**anchor.layers, **layers})


def _names(model: nn.Module, held: Mapping[str, ProductFactor]) -> dict[int, str]:
    return {id(p): name for name, p in named_parameters(model, held).items()}


def _products(anchor: Anchor) -> dict[str, ProductFactor]:
    layers = anchor.layers if isinstance(anchor, KroneckerAnchor) else {}
    return {up: layer for up, layer in layers.items() if isinstance(layer, ProductFactor)}


def _bases(model: nn.Module, held: Mapping[str, ProductFactor]) -> Iterator[ProbedBase]:
    """Yield the weights of layers with adapters that are held, with the names of these adapters."""
    yield from probed_bases(bare(model), _names(model, held))


def _merged(base: ProbedBase, held: Mapping[str, ProductFactor], point: Mapping[str, Tensor]) -> list[str] | None:
    """Name the adapters of a layer whose products its weight has taken up; None if it has changed in another way."""
    old = held[base.ups[0]].base
    assert old is not None
    gains = {up: held[up].gain(up, point, base.vector) for up in base.ups}
    some = range(len(gains) + 1) if len(gains) <= MOST else (0, 1, len(gains))
    subsets = list(chain.from_iterable(combinations(gains, n) for n in some))
    left = torch.stack([base.value - old.to(base.value) - sum(gains[up] for up in subset) for subset in subsets])
    sizes = torch.stack([base.value, old.to(base.value), *gains.values()]).norm(dim=1).sum()
    off, limit = left.norm(dim=1), (8 * base.eps + 64 * torch.finfo(base.value.dtype).eps) * sizes
    nearest = int(off.argmin())
    return list(subsets[nearest]) if bool(off[nearest] <= limit) else None


def _warn_of_lost(lost: list[str]) -> None:
    if lost:
        warn(
            f"The weights of the layers of {listed(lost)} have changed since the last task, and not by the products of their "
            "adapters. What was held of these adapters no longer fits and is dropped; they join again with the next task."
        )
