"""Second moments of layers: the sums, and the rows that inputs and gradients of outputs become."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._errors import warn
from rwalk._parameters import listed, state_dtype
from rwalk.anchors.factors import Arrangement, Moments
from rwalk.anchors.held import Product
from rwalk.anchors.spectrum import Addition, SecondMoment, add_sums
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.wrappers import module_class
from rwalk.gradients.comparison import CANCELLED, GradientFit
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

    def gradient(self) -> Tensor:
        """Return the gradient of the weight as a matrix D."""
        deltas = self.deltas.to(state_dtype(self.deltas))
        if self.layer.one_hot:
            total = deltas.new_zeros(self.layer.width, deltas.shape[2])
            return total.index_add_(0, self.inputs, deltas[0]).T.unsqueeze(0)
        return deltas.mT @ self.inputs.to(deltas.dtype)


class LayerSums:
    """Sums of second moments of one layer.

    Args:
        layer: the layer.
        rank: how many directions will be kept; None for all.

    Attributes:
        rows: how many rows of inputs there were.
    """

    def __init__(self, layer: MeasuredLayer, rank: int | None) -> None:
        self.layer, self._rank = layer, rank
        like = torch.empty(0, dtype=state_dtype(layer.parameter), device=layer.parameter.device)
        if layer.one_hot:
            self.inputs = SecondMoment.diagonal(layer.width, like)
        else:
            self.inputs = SecondMoment.zeros(layer.arrangement.groups, layer.width, rank, like)
        self.outputs = self._empty_outputs(like)
        self.rows = 0.0

    def _empty_outputs(self, like: Tensor) -> SecondMoment:
        return SecondMoment.zeros(self.layer.arrangement.groups, self.layer.height, self._rank, like)

    @property
    def used(self) -> bool:
        """Whether any row reached the layer."""
        return self.rows > 0

    def add(self, part: LayerRows, with_inputs: bool = True) -> None:
        """Add what a use contributes."""
        if with_inputs:
            self.add_inputs(part.inputs)
        self.add_deltas(part.deltas)

    def add_inputs(self, inputs: Tensor) -> None:
        """Add rows of inputs, or tokens."""
        if self.layer.one_hot:
            self.inputs.add_diagonal(torch.bincount(inputs, minlength=self.layer.width).unsqueeze(0))
            self.rows += len(inputs)
        else:
            self.inputs.add(self.layer.extended(inputs.to(self.inputs.total.dtype)))
            self.rows += inputs.shape[1]

    def add_deltas(self, deltas: Tensor) -> None:
        """Add rows of gradients of outputs."""
        self.outputs.add(deltas.to(self.outputs.total.dtype))

    def add_sums(self, other: Self, factor: float) -> None:
        """Add other sums, their gradients' squares multiplied by a factor."""
        add_sums(self.joining(other, factor))

    def joining(self, other: Self, factor: float) -> list[Addition]:
        """Count the rows of other sums; return what `add_sums` is to add, so that it can be done for many layers at once."""
        self.rows += other.rows
        return [(self.inputs, other.inputs, 1.0), (self.outputs, other.outputs, factor)]

    def reduce(self, ranks: Ranks) -> None:
        """Add up over ranks."""
        self.inputs.reduce(ranks)
        self.outputs.reduce(ranks)
        self.rows = ranks.sums([self.rows], self.inputs.total.device)[0]

    def scaled(self, factor: float) -> Self:
        """Return the sums multiplied by a number, while the count of rows stays."""
        if factor == 1:
            return self
        other = type(self)(self.layer, self._rank)
        other.inputs, other.outputs, other.rows = self.inputs.scaled(factor), self.outputs.scaled(factor), self.rows
        return other

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held: sums, each with its trace."""
        return self._sides()

    def _sides(self) -> list[Tensor]:
        return [self.inputs.total, self.inputs.trace, self.outputs.total, self.outputs.trace]

    def content(self, size: int = 1) -> dict[str, Any]:
        """Return the sums, multiplied by a number of ranks, as tensors and plain values."""
        return {"rows": self.rows * size, "sums": self.scaled(size)._sides(), **self.layer.key()}

    def read(self, content: Mapping[str, Any], size: int = 1) -> None:
        """Continue from this rank's share of a `content`.

        Raises:
            ValueError: if it does not fit the layer.
        """
        tensors = content["sums"]
        for side, total, trace in zip(("inputs", "outputs"), tensors[::2], tensors[1::2], strict=True):
            mine = getattr(self, side)
            if total.dim() != mine.total.dim() or trace.shape != mine.trace.shape or total.shape[-1] != mine.total.shape[-1]:
                raise ValueError(f"the sums of `{self.layer.weight}`")
            mine.total, mine.trace = (t.to(mine.trace.device, mine.trace.dtype) for t in (total, trace))
            setattr(self, side, mine if size == 1 else mine.scaled(1 / size))
        self.rows = content["rows"] / size

    def grown(self, layer: MeasuredLayer, rank: int | None) -> Self:
        """Return the sums of the same layer as it is now: the old ones are their leading block."""
        now = type(self)(layer, rank)
        now.rows = self.rows
        for mine, theirs in zip((now.inputs, now.outputs), (self.inputs, self.outputs), strict=True):
            theirs.put_into(mine)
        return now

    def moments(self, examples: float) -> Moments:
        """Return the means over rows of inputs and over a number of examples."""
        return Moments(self.layer.arrangement, self.inputs.scaled(1 / self.rows), self.outputs.scaled(1 / examples))


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
            places = g[0, 0].numel()
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
    x = windows(module, x).movedim(0, 1 + len(module.kernel_size))
    return x.reshape(module.groups, -1, x.shape[1 + len(module.kernel_size) :].numel()).mT


def _channels(module: Any, g: Tensor) -> Tensor:
    return g.transpose(0, 1).reshape(module.groups, -1, g.numel() // g.shape[1]).mT


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


def _squares(rows: Tensor) -> Tensor:
    return rows.to(state_dtype(rows)).square().sum()


class WeightGradient:
    """The gradient of a layer's weight as it follows from inputs and gradients of outputs, over all kinds of its uses."""

    def __init__(self, layer: MeasuredLayer) -> None:
        self._layer = layer
        self._total: Tensor | None = None
        self._bound: Any = 0

    def add(self, part: LayerRows) -> None:
        """Add what one use contributes."""
        part = part.of_weight()
        gradient = part.gradient()
        if part.layer.arrangement.transposed != self._layer.arrangement.transposed:
            gradient = gradient.mT
        self._total = gradient if self._total is None else self._total.add_(gradient)
        norm = part.inputs.numel() if part.layer.one_hot else _squares(part.inputs)
        self._bound = self._bound + _squares(part.deltas) * norm

    def fits(self, gradient: Tensor | None) -> bool:
        """Return whether the weight has this gradient."""
        total = self._total
        if total is None:
            return True
        given = torch.zeros_like(total) if gradient is None else self._layer.arrangement.weight_matrix(gradient)
        return GradientFit.of(total, given, torch.as_tensor(self._bound)).fits(1.0, CANCELLED)


def warn_of_odd_layers(odd: list[str]) -> None:
    """Name the layers that are left out."""
    if odd:
        warn(
            f"The weights of some layers have other gradients than inputs and outputs give ({listed(odd)}): they are "
            "used elsewhere too, or a hook on all modules changes outputs. Such weights are held one by one, as under `EWC`; "
            "what earlier tasks have measured of them stays as it is."
        )
