"""Layers that are seen by what they pass to a function: inside attention, and those with a forward of their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rwalk.distributed.wrappers import module_class
from rwalk.gradients.layer_kinds import LayerKind, LayerRows, MeasuredLayer
from rwalk.gradients.shared import HeardFunction

Rows = Callable[[Sequence[Tensor | None]], Iterator[LayerRows]]
"""Takes the gradients of a use's outputs, None where there is none, and yields what the use contributes."""

Noted = Callable[[list[Tensor], Rows], list[Tensor]]
"""Takes the outputs of a use and what their gradients will tell; returns what takes the place of the outputs."""

FUNCTIONS: dict[type[nn.Module], str] = {
    nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
}  # fmt: skip
"""The function of `torch.nn.functional` that layers of each class call."""

HEARD = {name: HeardFunction(name) for name in FUNCTIONS.values()}
"""These functions, by name."""


def layer_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; of one derived from a class of `FUNCTIONS`, that one."""
    kind = module_class(module)
    if kind is NonDynamicallyQuantizableLinear:  # of `MultiheadAttention`, which never calls it
        return kind
    return next((base for base in kind.__mro__ if base in FUNCTIONS), kind)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a layer of a derived class does something of its own."""
    kind, base = module_class(module), layer_class(module)
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward"))


def takes_gradients(output: Any) -> bool:
    """Return whether an output will have a gradient."""
    return torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_floating_point()


class FunctionCalls:
    """While a module runs, a function in `torch.nn.functional` also tells of its calls in the same thread.

    Args:
        name: the function.
        noted: takes each use.
    """

    def __init__(self, name: str, noted: Noted) -> None:
        self._name, self._noted = name, noted

    def enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        """Begin a call of the module."""
        HEARD[self._name].listen(self, partial(self._tell, module))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """End it."""
        HEARD[self._name].leave(self)

    def _tell(self, module: nn.Module, output: Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        """Note a call of the function."""
        x, weight, *settings = *args, *(named[key] for key in ("input", "weight") if key in named)
        others = {key: value for key, value in named.items() if key not in ("input", "weight")}
        rows = self._rows(module, x, weight, tuple(settings), others) if takes_gradients(output) else None
        return output if rows is None else self._noted([output], rows)[0]

    def _rows(self, module: Any, x: Tensor, weight: Tensor, settings: tuple[Any, ...], named: Mapping[str, Any]) -> Rows | None:
        """Return what the gradient of the output will tell; None if the weight is not one to measure."""
        raise NotImplementedError


class AttentionCalls(FunctionCalls):
    """The linear maps inside `MultiheadAttention`, whose function is given its weights.

    Args:
        layers: the layers, by the names of their weights in the module.
        noted: takes each use.
    """

    def __init__(self, layers: Mapping[str, MeasuredLayer], noted: Noted) -> None:
        super().__init__("linear", noted)
        self._layers = layers

    def _rows(
        self,
        module: Any,
        x: Tensor,
        weight: Tensor,
        settings: tuple[Any, ...],  # noqa: ARG002
        named: Mapping[str, Any],  # noqa: ARG002
    ) -> Rows | None:
        """Tell of a weight, or of some of its rows."""
        for key, layer in self._layers.items():
            p = (module.out_proj if key.startswith("out_proj.") else module)._parameters[key.rpartition(".")[2]]
            if weight is p:
                return partial(_placed_rows, layer, 0, x)
            if isinstance(p, Tensor) and weight._base is p and weight.stride() == p.stride():
                return partial(_placed_rows, layer, (weight.storage_offset() - p.storage_offset()) // p.stride(0), x)
        return None


class OwnForward(FunctionCalls):
    """A layer of a derived class with a forward of its own, as it gives its weight to the function.

    Args:
        layer: the layer.
        kind: how inputs and gradients become rows.
        name: the function.
        noted: takes each use.
    """

    def __init__(self, layer: MeasuredLayer, kind: LayerKind, name: str, noted: Noted) -> None:
        super().__init__(name, noted)
        self._layer, self._kind = layer, kind

    def _rows(self, module: Any, x: Tensor, weight: Tensor, settings: tuple[Any, ...], named: Mapping[str, Any]) -> Rows | None:
        """Tell of the weight as it is, not of one that was made from it."""
        if weight is not module._parameters.get("weight"):
            return None
        told = module if self._name == "linear" else _convolution(weight, *settings, **named)
        return partial(plain_rows, self._layer, self._kind, told, x)


class Convolution(NamedTuple):
    """What a convolution was told, under the names of a module's attributes."""

    kernel_size: tuple[int, ...]
    in_channels: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"


def _convolution(
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolution:
    """Return what a function's arguments mean."""
    dims = weight.dim() - 2

    def each(value: Any) -> Any:
        return value if isinstance(value, str) else (value,) * dims if isinstance(value, int) else tuple(value)

    sizes = tuple(weight.shape[2:]), weight.shape[1] * groups
    return Convolution(*sizes, each(stride), each(padding), each(dilation), groups)


def plain_rows(
    layer: MeasuredLayer, kind: LayerKind, module: Any, x: Tensor, gradients: Sequence[Tensor | None]
) -> Iterator[LayerRows]:
    """Yield the rows of a layer with one weight."""
    for g in gradients:
        if g is not None:
            yield from kind.rows(layer, module, x.detach(), g.detach())


def _placed_rows(layer: MeasuredLayer, offset: int, x: Tensor, gradients: Sequence[Tensor | None]) -> Iterator[LayerRows]:
    """Yield rows of some of a layer's outputs, as rows of all of them."""
    for g in gradients:
        if g is not None:
            d = g.detach().reshape(1, -1, g.shape[-1])
            d = F.pad(d, (offset, layer.height - offset - d.shape[2]))
            yield LayerRows(layer, x.detach().reshape(1, -1, x.shape[-1]), d)
