"""Uses of layers in a forward pass: where their inputs are, and what gradients of their outputs will tell."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rwalk.anchors.factors import Arrangement
from rwalk.anchors.kronecker import HeldNames
from rwalk.distributed.shards import sharded
from rwalk.gradients.adapters import adapter_rows, find_adapters
from rwalk.gradients.function_calls import (
    FUNCTIONS,
    AttentionCalls,
    FunctionCalls,
    Noted,
    OwnForward,
    has_own_forward,
    layer_class,
    plain_rows,
    takes_gradients,
)
from rwalk.gradients.layer_kinds import (
    LAYER_KINDS,
    SCALED_EMBEDDING,
    TRANSPOSED_LINEAR,
    LayerKind,
    LayerRows,
    MeasuredLayer,
    is_transposed_linear,
)
from rwalk.gradients.recurrent import Gates, measurable

NOTHING_HELD = HeldNames({}, frozenset(), {})


class Claim(NamedTuple):
    """A module's use of a weight.

    Args:
        module: the module.
        key: the weight's name in it.
        kind: how inputs and gradients become rows.
        bias: its bias, None for none.
        groups: how many groups a convolution has.
    """

    module: nn.Module
    key: str
    kind: LayerKind
    bias: nn.Parameter | None = None
    groups: int = 1


def _claims(module: nn.Module) -> Iterator[Claim]:
    """Yield the weights that a module uses in a way that can be measured."""
    kind = layer_class(module)
    own = module._parameters
    if kind in LAYER_KINDS and not _odd_embedding(module):
        yield Claim(module, "weight", LAYER_KINDS[kind], own.get("bias"), getattr(module, "groups", 1))
    elif is_transposed_linear(module):
        yield Claim(module, "weight", TRANSPOSED_LINEAR, own.get("bias"))
    elif kind.__module__.startswith("transformers.") and kind.__name__.endswith("ScaledWordEmbedding"):
        if not _odd_embedding(module):
            yield Claim(module, "weight", SCALED_EMBEDDING)
    elif kind is nn.MultiheadAttention:
        linear = LAYER_KINDS[nn.Linear]
        yield Claim(module, "in_proj_weight", linear, own.get("in_proj_bias"))
        for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Claim(module, key, linear)
        yield Claim(module, "out_proj.weight", linear, module.out_proj._parameters.get("bias"))  # type: ignore[union-attr]
    elif measurable(module) and not any(map(sharded, own.values())):
        for key in own:
            if key.startswith("weight"):
                yield Claim(module, key, LAYER_KINDS[nn.Linear], own.get(key.replace("weight", "bias")))


def _odd_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding that changes its weight or its gradients."""
    return isinstance(module, nn.Embedding) and bool(module.max_norm is not None or module.scale_grad_by_freq or module.sparse)


def _weight(claim: Claim) -> nn.Parameter | None:
    module = claim.module.out_proj if claim.key.startswith("out_proj.") else claim.module
    return module._parameters.get(claim.key.rpartition(".")[2])  # type: ignore[union-attr]


class ModelHook(partial[Any]):
    """A hook of a model for one step; copies of the model, and files, hold one that does nothing."""

    def __reduce__(self) -> Any:
        """Make copies do nothing."""
        return ModelHook, (_nothing,)

    @property
    def __name__(self) -> str:
        """Raise an error with the remedy: `torch.jit.script`, which compiles hooks, is the only caller that asks for it."""
        raise AttributeError(
            "`torch.jit.script` cannot compile a model whose next step a consolidator measures. Call `detach()` before, and "
            "`attach` afterwards."
        )


def _nothing(*_: Any, **__: Any) -> None:
    """Change nothing."""


class LayerUses:
    """The layers of a model that can be measured, and hooks that note their uses.

    Args:
        root: the model.
        names: the names of the parameters to measure, by their ids.
        held: how an anchor holds parameters: layers stay as they are, and what is held alone stays alone.
        whole: whether no parameter is sharded; only then are adapters measured as one layer each.

    Attributes:
        layers: the layers, by the names of their weights, and adapters, by the names of their factors `up`.
    """

    def __init__(self, root: nn.Module, names: Mapping[int, str], held: HeldNames = NOTHING_HELD, whole: bool = True) -> None:
        self._adapters = find_adapters(root, names, held) if whole else {}
        adapters = [layer for found in self._adapters.values() for layer in found.values()]
        taken = {*held.alone, *held.products, *held.products.values()}
        taken |= {name for layer in adapters for name in layer.arrangement.names(layer.weight)}
        claims: dict[int, list[Claim]] = {}
        for module in root.modules():
            for claim in _claims(module):
                weight = _weight(claim)
                if weight is not None and id(weight) in names and names[id(weight)] not in taken:
                    claims.setdefault(id(weight), []).append(claim)
        biases = [id(b) for uses in claims.values() for b in {id(c.bias): c.bias for c in uses}.values() if b is not None]
        self.layers: dict[str, MeasuredLayer] = {layer.weight: layer for layer in adapters}
        self._used: dict[nn.Module, dict[str, tuple[MeasuredLayer, LayerKind]]] = {}
        for uses in claims.values():
            layer = _layer(uses, names, biases, held)
            if layer is not None:
                self.layers[layer.weight] = layer
                for claim in uses:
                    part = layer if layer.head is None or claim.kind.one_hot else layer.head
                    self._used.setdefault(claim.module, {})[claim.key] = part, claim.kind
        self._handles: list[Any] = []

    def open(self, noted: Noted) -> None:
        """Note uses from now on."""
        for module, adapters in self._adapters.items():
            adapted: Any = ModelHook(_adapted, adapters, noted)
            self._handles.append(module.register_forward_hook(adapted, with_kwargs=True, prepend=True))
        for module, used in self._used.items():
            watch = _function_calls(module, used, noted)
            if watch is not None:
                self._handles.append(module.register_forward_pre_hook(ModelHook(watch.enter)))
                self._handles.append(module.register_forward_hook(ModelHook(watch.leave), prepend=True, always_call=True))
                continue
            hook: Any = ModelHook(_plain, *used["weight"], noted) if "weight" in used else ModelHook(_recurrent, used, noted)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _function_calls(
    module: nn.Module, used: Mapping[str, tuple[MeasuredLayer, LayerKind]], noted: Noted
) -> FunctionCalls | None:
    """Return what notes the uses of a module inside its forward; None for one whose input and output tell."""
    if isinstance(module, nn.MultiheadAttention):
        return AttentionCalls({key: layer for key, (layer, _) in used.items()}, noted)
    name = FUNCTIONS.get(layer_class(module))
    return OwnForward(*used["weight"], name, noted) if name and has_own_forward(module) else None


def _layer(uses: list[Claim], names: Mapping[int, str], biases: list[int], held: HeldNames) -> MeasuredLayer | None:
    """Return the layer of a weight; None where its uses cannot be measured as one."""
    first, parameter = uses[0], _weight(uses[0])
    if parameter is None or parameter.is_complex():
        return None
    weight = names[id(parameter)]
    if any((u.kind, u.groups) != (first.kind, first.groups) for u in uses):
        return _shared_layer(weight, parameter, held) if _read_and_written(uses) else None
    bias = first.bias if len({id(u.bias) for u in uses}) == 1 else None
    name = None if bias is None or biases.count(id(bias)) > 1 else names.get(id(bias))
    if weight in held.biases:
        name = held.biases[weight] if held.biases[weight] == name else None
    elif name in held.alone:
        name = None
    arrangement = Arrangement(name, first.groups, first.kind.transposed)
    return MeasuredLayer(weight, parameter, arrangement, first.kind.one_hot) if _continues(weight, arrangement, held) else None


def _read_and_written(uses: list[Claim]) -> bool:
    """Return whether uses are those of embeddings and of linear layers, as a language model's head is one."""
    return all(u.kind.one_hot or layer_class(u.module) is nn.Linear for u in uses) and any(u.kind.one_hot for u in uses)


def _shared_layer(weight: str, parameter: nn.Parameter, held: HeldNames) -> MeasuredLayer | None:
    """Return the layer of a weight that embeddings and linear layers share, arranged as that of an embedding."""
    arrangement = Arrangement(transposed=True)
    head = MeasuredLayer(weight, parameter, Arrangement())
    layer = MeasuredLayer(weight, parameter, arrangement, one_hot=True, head=head)
    return layer if _continues(weight, arrangement, held) else None


def _continues(weight: str, arrangement: Arrangement, held: HeldNames) -> bool:
    """Return whether a layer is arranged as an anchor holds it, or the anchor leaves that open."""
    if weight not in held.biases:
        return True
    return (held.biases[weight], weight in held.transposed) == (arrangement.bias, arrangement.transposed)


def _plain(layer: MeasuredLayer, kind: LayerKind, noted: Noted, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Note the use of a layer with one weight."""
    if not takes_gradients(output):
        return output
    x = args[0] if args else next(iter(kwargs.values()))
    return noted([output], partial(plain_rows, layer, kind, module, x))[0]


def _adapted(
    adapters: Mapping[str, MeasuredLayer], noted: Noted, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    """Note the use of a layer with adapters."""
    if not takes_gradients(output):
        return output
    rows = adapter_rows(adapters, module, args, kwargs)
    return output if rows is None else noted([output], rows)[0]


def _recurrent(
    used: Mapping[str, tuple[MeasuredLayer, LayerKind]], noted: Noted, module: Any, args: Any, kwargs: Any, output: Any
) -> Any:
    """Note the use of a recurrent module; one of sequences of different lengths is not noted."""
    named = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    x, start = named["input"], named.get("hx")
    if isinstance(x, PackedSequence) or not takes_gradients(output[0]):
        return output
    layers = {key: layer for key, (layer, _) in used.items()}
    ends = output[1] if isinstance(output[1], tuple) else (output[1],)

    def rows(gradients: Sequence[Tensor | None]) -> Iterator[LayerRows]:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            gates = Gates(module, x.detach().to(module.weight_ih_l0.dtype), start)
            yield from gates.rows(layers, gradients)

    first, *others = noted([output[0], *ends], rows)
    return first, tuple(others) if isinstance(module, nn.LSTM) else others[0]
