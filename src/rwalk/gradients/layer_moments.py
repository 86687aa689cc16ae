"""Second moments of layers: their sums, and what they say of the gradient of a weight."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from rwalk._errors import warn
from rwalk._parameters import listed, state_dtype
from rwalk.anchors.factors import Moments
from rwalk.anchors.incremental import probe
from rwalk.anchors.spectrum import Addition, SecondMoment, add_sums
from rwalk.distributed.ranks import Ranks
from rwalk.gradients.comparison import CANCELLED, GradientFit
from rwalk.gradients.layer_kinds import LayerRows, MeasuredLayer


class LayerSums:
    """Sums of second moments of one layer.

    Args:
        layer: the layer.
        rank: how many directions will be kept; None for all.

    Attributes:
        rows: how many rows of inputs there were whose outputs had a gradient; a tensor once there are any.
    """

    def __init__(self, layer: MeasuredLayer, rank: int | None) -> None:
        self.layer, self._rank = layer, rank
        like = torch.empty(0, dtype=state_dtype(layer.parameter), device=layer.parameter.device)
        if layer.one_hot:
            self.inputs = SecondMoment.diagonal(layer.width, like)
        else:
            self.inputs = SecondMoment.zeros(layer.arrangement.groups, layer.width, rank, like)
        self.outputs = self._empty_outputs(like)
        self.rows: Tensor | float = 0.0

    def _empty_outputs(self, like: Tensor) -> SecondMoment:
        return SecondMoment.zeros(self.layer.arrangement.groups, self.layer.height, self._rank, like)

    @property
    def used(self) -> bool:
        """Whether any row reached the layer."""
        return float(self.rows) > 0

    def add(self, part: LayerRows, with_inputs: bool = True) -> None:
        """Add what a use contributes."""
        if with_inputs:
            self.add_inputs(part.inputs, part.counting())
        self.add_deltas(part.deltas)

    def add_inputs(self, inputs: Tensor, counting: Tensor) -> None:
        """Add rows of inputs, or tokens; only those that count, where `counting` has 1 and not 0."""
        self.rows = self.rows + counting.sum()
        if self.layer.one_hot:
            self.inputs.add_diagonal(torch.bincount(inputs, counting, minlength=self.layer.width).unsqueeze(0))
        else:
            self.inputs.add(self.layer.extended(inputs.to(self.inputs.total.dtype)), counting)

    def add_deltas(self, deltas: Tensor) -> None:
        """Add rows of gradients of outputs."""
        self.outputs.add(deltas.to(self.outputs.total.dtype))

    def add_sums(self, other: Self, factor: float) -> None:
        """Add other sums, their gradients' squares multiplied by a factor."""
        add_sums(self.joining(other, factor))

    def joining(self, other: Self, factor: float) -> list[Addition]:
        """Count the rows of other sums; return what `add_sums` is to add, so that it can be done for many layers at once."""
        self.rows = self.rows + other.rows
        return [(self.inputs, other.inputs, 1.0), (self.outputs, other.outputs, factor)]

    def reduce(self, ranks: Ranks) -> None:
        """Add up over ranks."""
        self.inputs.reduce(ranks)
        self.outputs.reduce(ranks)
        self.rows = ranks.sums([float(self.rows)], self.inputs.total.device)[0]

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
        return {"rows": float(self.rows) * size, "sums": self.scaled(size)._sides(), **self.layer.key()}

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
        return Moments(self.layer.arrangement, self.inputs.scaled(1 / float(self.rows)), self.outputs.scaled(1 / examples))


def _squares(rows: Tensor) -> Tensor:
    return rows.to(state_dtype(rows)).square().sum()


COLUMNS = 16
"""Random columns by which gradients of weights are multiplied to be compared."""


def _columns(layer: MeasuredLayer) -> Tensor:
    """Return the columns for a layer's weight: a matrix times them is as long as the matrix, on average."""
    matrix = layer.arrangement.weight_matrix(layer.parameter)
    return probe(matrix.shape[2], COLUMNS, state_dtype(matrix), matrix.device) / math.sqrt(COLUMNS)


def probed(layer: MeasuredLayer, gradient: Tensor) -> Tensor:
    """Return the gradient of a layer's weight times some columns, as `WeightGradient` compares it."""
    columns = _columns(layer)
    return layer.arrangement.weight_matrix(gradient.detach()).to(columns.dtype) @ columns


class WeightGradient:
    """The gradient of a layer's weight as it follows from inputs and gradients of outputs, over all kinds of its uses.

    Only its product with a few columns is kept, which shows nearly any difference.
    """

    def __init__(self, layer: MeasuredLayer) -> None:
        self._layer = layer
        self._total: Tensor | None = None
        self._bound: Any = 0

    def add(self, part: LayerRows) -> None:
        """Add what one use contributes."""
        part = part.of_weight()
        turned = part.layer.arrangement.transposed != self._layer.arrangement.transposed
        gradient = part.gradient_times(_columns(self._layer), turned)
        self._total = gradient if self._total is None else self._total.add_(gradient)
        norm = part.inputs.numel() if part.layer.one_hot else _squares(part.inputs)
        self._bound = self._bound + _squares(part.deltas) * norm

    def fits(self, given: Tensor | None) -> bool:
        """Return whether the weight has a gradient that is `probed` as this; None stands for one of zero."""
        total = self._total
        if total is None:
            return True
        given = torch.zeros_like(total) if given is None else given
        return GradientFit.of(total, given, torch.as_tensor(self._bound)).fits(1.0, CANCELLED)


def warn_of_odd_layers(odd: list[str]) -> None:
    """Name the layers that are left out."""
    if odd:
        warn(
            f"The weights of some layers have other gradients than inputs and outputs give ({listed(odd)}): they are "
            "used elsewhere too, or a hook on all modules changes outputs. Such weights are held one by one, as under `EWC`; "
            "what earlier tasks have measured of them stays as it is."
        )


def warn_of_unseen_layers(unseen: list[str]) -> None:
    """Name the layers that could not be measured."""
    if unseen:
        warn(
            f"The layers of {listed(unseen)} were not seen at work, though these weights have gradients: their modules are "
            "not called, are compiled, or compute with other weights made of them. They are held one by one. If the model "
            "is compiled, give the compiled one to the consolidator."
        )
