"""Kinds of layers that are held as a matrix: how their inputs, and the gradients of their outputs, become rows."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._parameters import state_dtype
from rwalk.anchors.factors import Arrangement
from rwalk.anchors.held import Product
from rwalk.distributed.wrappers import module_class
from rwalk.gradients.layer_rules import at_once, windows


class MeasuredLayer(NamedTuple):
    """A layer whose second moments are measured.

    Args:
        weight: the name of its weight; of an adapter, that of its factor `up`.
        parameter: that weight.
        arrangement: how its parameters lie in a matrix, or make it up.
        one_hot: whether inputs are tokens: row numbers of the weight.
        down: the other factor of an adapter, None for all other layers.
        head: the linear layers that share the weight of an embedding, as one layer; None for none.
    """

    weight: str
    parameter: nn.Parameter
    arrangement: Arrangement | Product
    one_hot: bool = False
    down: nn.Parameter | None = None
    head: "MeasuredLayer | None" = None

    @property
    def height(self) -> int:
        """How many outputs a group has."""
        return self._sizes[1]

    @property
    def width(self) -> int:
        """How many inputs a row has, the 1 for the bias included."""
        return self._sizes[2]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        if isinstance(self.arrangement, Arrangement):
            return self.arrangement.sizes(self.parameter.shape)
        return 1, self.parameter.shape[0], 0 if self.down is None else self.down.shape[1]

    def key(self) -> dict[str, str]:
        """Return what a state file needs to tell an adapter from a layer."""
        return {"down": self.arrangement.down} if isinstance(self.arrangement, Product) else {}

    def measured_as(self, other: "MeasuredLayer") -> bool:
        """Return whether sums of this layer are of the same kind as those of another."""
        return self.arrangement == other.arrangement and (self.head is None) == (other.head is None)

    def extended(self, rows: Tensor) -> Tensor:
        """Put the 1 for the bias in front of rows of inputs."""
        return rows if self.arrangement.bias is None else F.pad(rows, (1, 0), value=1.0)


class LayerRows(NamedTuple):
    """What one use of a layer in a backward pass contributes.

    Args:
        layer: the layer.
        inputs: (groups, n, inputs) without the 1 for the bias, or tokens.
        deltas: gradients of the outputs, (groups, n, outputs).
        dropped: whether inputs have gone through dropout, so that the weight's gradient does not follow from them.
    """

    layer: MeasuredLayer
    inputs: Tensor
    deltas: Tensor
    dropped: bool = False

    def of_weight(self) -> "LayerRows":
        """Return the rows of inputs that the weight itself is given: an adapter's factor `up` those of the other one."""
        layer = self.layer
        if layer.down is None or not isinstance(layer.arrangement, Product):
            return self
        down = layer.down.detach().to(state_dtype(layer.down))
        return self._replace(inputs=self.inputs.to(down.dtype) @ down.T * layer.arrangement.scale)

    def counting(self) -> Tensor:
        """Return 1 for each row that has a gradient, and 0 for others, such as those of padding, (n,).

        The Fisher information has nothing of the others, so A is the mean over those that have one.
        """
        return self.deltas.any(2).any(0).to(state_dtype(self.deltas))

    def gradient_times(self, columns: Tensor, turned: bool) -> Tensor:
        """Return the gradient of the weight as a matrix D, or `turned` as D^T, times some columns; D itself is never made."""
        deltas = self.deltas.to(columns.dtype)
        if not self.layer.one_hot:
            left, right = (deltas, self.inputs.to(columns.dtype))[:: -1 if turned else 1]
            return left.mT @ (right @ columns)
        if not turned:
            return deltas.mT @ columns[self.inputs]
        return columns.new_zeros(1, self.layer.width, columns.shape[1]).index_add_(1, self.inputs, deltas @ columns)


class LayerKind(NamedTuple):
    """How inputs of a class of layers, and gradients of their outputs, become rows.

    Args:
        inputs: takes the module, or what has its settings, and its input.
        deltas: takes the same and the gradient of its output.
        transposed: whether the weight's first dimension is that of the inputs.
        one_hot: whether inputs are tokens.
    """

    inputs: Callable[[Any, Tensor], Tensor]
    deltas: Callable[[Any, Tensor], Tensor]
    transposed: bool = False
    one_hot: bool = False

    def rows(self, layer: MeasuredLayer, module: Any, x: Tensor, g: Tensor) -> Iterator[LayerRows]:
        """Yield what a use of a layer contributes, in pieces where that takes much memory."""
        if hasattr(module, "kernel_size"):
            x, g = (t if t.dim() == len(module.kernel_size) + 2 else t.unsqueeze(0) for t in (x, g))
            places = g.shape[2:].numel()
            count = at_once(g.device, module.in_channels * math.prod(module.kernel_size) * places)
            pieces = list(zip(x.split(count), g.split(count), strict=True))
        else:
            pieces = [(x, g)]
        for some, gradient in pieces:
            yield from _without_padding(module, LayerRows(layer, self.inputs(module, some), self.deltas(module, gradient)))


def _without_padding(module: Any, rows: LayerRows) -> Iterator[LayerRows]:
    """Leave out an embedding's padding, which takes no part in training."""
    padding = getattr(module, "padding_idx", None)
    if rows.layer.one_hot and padding is not None:
        kept = rows.inputs != padding
        rows = rows._replace(inputs=rows.inputs[kept], deltas=rows.deltas[:, kept])
    yield rows


def flat_rows(_: nn.Module, x: Tensor) -> Tensor:
    """Return the rows of a linear layer's input, or of the gradient of its output."""
    return x.reshape(1, -1, x.shape[-1])


def _patches(module: Any, x: Tensor) -> Tensor:
    """Return the patches of all examples, with one copy, along whose rows memory runs."""
    last = 1 + len(module.kernel_size)
    x = windows(module, x).movedim(0, last)
    return x.reshape(module.groups, x.shape[:last].numel() // module.groups, x.shape[last:].numel()).mT


def _channels(module: Any, g: Tensor) -> Tensor:
    return g.transpose(0, 1).reshape(module.groups, g.shape[1] // module.groups, g.numel() // g.shape[1]).mT


def _tokens(_: nn.Module, x: Tensor) -> Tensor:
    return x.flatten()


def _before_scale(module: Any, g: Tensor) -> Tensor:
    rows: Tensor = flat_rows(module, g) * module.embed_scale
    return rows


LAYER_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(flat_rows, flat_rows),
    nn.Conv1d: LayerKind(_patches, _channels),
    nn.Conv2d: LayerKind(_patches, _channels),
    nn.Conv3d: LayerKind(_patches, _channels),
    nn.Embedding: LayerKind(_tokens, flat_rows, transposed=True, one_hot=True),
}
"""The classes of layers with one weight that can be measured."""

TRANSPOSED_LINEAR = LayerKind(flat_rows, flat_rows, transposed=True)
"""`Conv1D` of Hugging Face's Transformers: a linear layer whose weight is (inputs, outputs)."""


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is that one."""
    kind = module_class(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


SCALED_EMBEDDING = LayerKind(_tokens, _before_scale, transposed=True, one_hot=True)
"""Embeddings of Hugging Face's Transformers that multiply their outputs by a number, as those of Gemma and BART."""
