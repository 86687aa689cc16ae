"""Adapters: layers to whose weight a product of two small factors is added, as LoRA of PEFT does, which is not imported."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from rwalk._errors import warn
from rwalk._parameters import listed, state_dtype
from rwalk.anchors.held import Product
from rwalk.anchors.incremental import probe
from rwalk.anchors.kronecker import HeldNames
from rwalk.distributed.shards import sharded
from rwalk.gradients.layer_kinds import LayerRows, MeasuredLayer, flat_rows, is_transposed_linear

WARNED: WeakSet[nn.Module] = WeakSet()
"""Layers with adapters of another kind, which were named in a warning."""
PIECE = 2**20
"""Elements of a weight that are looked at in state precision at a time."""


class AdapterPair(NamedTuple):
    """The two factors of an adapter.

    Args:
        module: the layer with the adapter, which adds scale * up(down(x)) to what the layer inside of it returns.
        key: the adapter's name in that layer.
        up: the weight of the factor of the outputs, (outputs, rank).
        down: the weight of the factor of the inputs, (rank, inputs).
        usual: whether nothing else is done to the layer, as DoRA does.
    """

    module: nn.Module
    key: str
    up: nn.Parameter
    down: nn.Parameter
    usual: bool


def _pairs(root: nn.Module) -> Iterator[AdapterPair]:
    """Yield the adapters of linear layers."""
    for module in root.modules():
        base, downs, ups = (getattr(module, name, None) for name in ("base_layer", "lora_A", "lora_B"))
        if not (_linear(base) and isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict)):
            continue
        for key, down in downs.items():
            up = dict(ups).get(key)
            if isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and up.bias is down.bias is None:
                yield AdapterPair(module, key, up.weight, down.weight, _usual(module, key))


def _linear(base: Any) -> bool:
    return isinstance(base, nn.Linear) or (isinstance(base, nn.Module) and is_transposed_linear(base))


def _usual(module: Any, key: str) -> bool:
    """Return whether an adapter adds its product and does nothing else."""
    variants, dora = getattr(module, "lora_variant", {}), getattr(module, "use_dora", {})
    return key in getattr(module, "scaling", {}) and key not in variants and not dora.get(key, False)


def find_adapters(root: nn.Module, names: Mapping[int, str], held: HeldNames) -> dict[nn.Module, dict[str, MeasuredLayer]]:
    """Return the adapters that are measured as one layer each, by the layers that they are in and their names there.

    Args:
        root: the model.
        names: the names of the parameters to measure, by their ids.
        held: how an anchor holds parameters: factors that are held each by itself stay so.
    """
    uses = Counter(id(p) for module in root.modules() for p in module._parameters.values())
    found: dict[nn.Module, dict[str, MeasuredLayer]] = {}
    odd: dict[nn.Module, str] = {}
    for pair in _pairs(root):
        up, down = (names.get(id(p)) for p in (pair.up, pair.down))
        if up is None or down is None or not _together(pair, uses) or not _may_join(up, down, held):
            continue
        if pair.usual:
            arrangement = Product(down, float(pair.module.scaling[pair.key]))  # type: ignore[index]
            found.setdefault(pair.module, {})[pair.key] = MeasuredLayer(up, pair.up, arrangement, down=pair.down)
        else:
            odd[pair.module] = up
    _warn_of_odd_adapters(odd)
    return found


def _together(pair: AdapterPair, uses: Mapping[int, int]) -> bool:
    """Return whether both factors are real, are used here alone, and learn or rest together."""
    return (
        uses[id(pair.up)] == uses[id(pair.down)] == 1
        and pair.up.requires_grad == pair.down.requires_grad
        and not (pair.up.is_complex() or pair.down.is_complex())
    )


def _may_join(up: str, down: str, held: HeldNames) -> bool:
    """Return whether an anchor leaves it open to hold two factors as one, or does so."""
    apart = any(name in held.alone or name in held.biases for name in (up, down))
    return not apart and (held.products.get(up, down) == down)


def _warn_of_odd_adapters(odd: Mapping[nn.Module, str]) -> None:
    """Name adapters of another kind, once."""
    fresh = [name for module, name in odd.items() if module not in WARNED]
    WARNED.update(odd)
    if fresh:
        warn(
            f"The adapters of {listed(fresh)} do more than add the product of two factors (as DoRA does), so their factors are "
            "held each by itself. Plain LoRA is held by its product."
        )


def adapter_rows(
    adapters: Mapping[str, MeasuredLayer], module: Any, args: Any, kwargs: Mapping[str, Any]
) -> Callable[[Sequence[Tensor | None]], Iterator[LayerRows]] | None:
    """Return what a call of a layer contributes to its adapters, given the gradient of its output; None for nothing.

    Args:
        adapters: those that are measured, by their names in the layer.
        module: the layer.
        args: what it was called with.
        kwargs: what it was called with by name.
    """
    active = [key for key in _active(module, kwargs) if key in adapters]
    working = [(_scaled(adapters[key], float(module.scaling[key])), _drops(module, key)) for key in active]
    working = [(a, drops) for a, drops in working if a.parameter.requires_grad and a.down is not None and a.down.requires_grad]
    if not working:
        return None
    x = args[0] if args else next(iter(kwargs.values()))

    def rows(gradients: Sequence[Tensor | None]) -> Iterator[LayerRows]:
        for g in gradients:
            if g is not None:
                inputs, deltas = flat_rows(module, x.detach()), flat_rows(module, g.detach())
                yield from (LayerRows(adapter, inputs, deltas, dropped) for adapter, dropped in working)

    return rows


def _scaled(adapter: MeasuredLayer, scale: float) -> MeasuredLayer:
    """Return an adapter as it is multiplied now."""
    return adapter._replace(arrangement=adapter.arrangement._replace(scale=scale))  # type: ignore[call-arg]


def _active(module: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """List the adapters that take part in a call of a layer, each with all of its rows."""
    at_rest = getattr(module, "merged", False) or getattr(module, "disable_adapters", False)
    if at_rest or kwargs.get("adapter_names") is not None:
        return []
    active: Any = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", ())
    return [active] if isinstance(active, str) else list(active)


def _drops(module: Any, key: str) -> bool:
    """Return whether an adapter's inputs go through dropout."""
    dropout = dict(getattr(module, "lora_dropout", {})).get(key)
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


class ProbedBase(NamedTuple):
    """The weight of a layer with adapters, times a fixed vector.

    Args:
        ups: the names of the factors `up` of its adapters.
        value: the product.
        vector: the vector.
        eps: the precision of the weight.
    """

    ups: list[str]
    value: Tensor
    vector: Tensor
    eps: float


def adapter_scales(root: nn.Module, names: Mapping[int, str]) -> dict[str, float]:
    """Return what the products of adapters are multiplied by now, by the names of their factors `up`.

    Args:
        root: the model.
        names: the names of the parameters of adapters, by their ids.
    """
    pairs: Any = (pair for pair in _pairs(root) if pair.usual and id(pair.up) in names)
    return {names[id(pair.up)]: float(pair.module.scaling[pair.key]) for pair in pairs}


def probed_bases(root: nn.Module, names: Mapping[int, str]) -> Iterator[ProbedBase]:
    """Yield what the frozen weights of layers with adapters make of a fixed vector, except where an adapter is merged now.

    Args:
        root: the model.
        names: the names of the parameters of adapters, by their ids.
    """
    ups: dict[nn.Module, list[str]] = {}
    for pair in _pairs(root):
        if pair.usual and id(pair.up) in names and not getattr(pair.module, "merged", False):
            ups.setdefault(pair.module, []).append(names[id(pair.up)])
    for module, found in ups.items():
        base: Any = module.base_layer
        weight = base._parameters.get("weight")
        if weight is None or weight.requires_grad or not weight.is_floating_point() or weight.is_meta or sharded(weight):
            continue
        matrix = weight.detach().T if is_transposed_linear(base) else weight.detach()
        vector = probe(matrix.shape[1], 1, state_dtype(weight), weight.device)[:, 0]
        pieces = matrix.split(max(1, PIECE // matrix.shape[1]))
        with torch.autocast(weight.device.type, enabled=False):
            value = torch.cat([piece.to(vector.dtype) @ vector for piece in pieces])
        yield ProbedBase(found, value, vector, torch.finfo(weight.dtype).eps)
