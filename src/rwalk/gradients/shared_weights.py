"""Weights that embeddings and linear layers share, as the input and output embeddings of a language model."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from rwalk.anchors.factors import Moments
from rwalk.anchors.spectrum import Addition, SecondMoment
from rwalk.distributed.ranks import Ranks
from rwalk.gradients.layer_kinds import LayerRows, MeasuredLayer
from rwalk.gradients.layer_moments import LayerSums


def sums_of(layer: MeasuredLayer, rank: int | None) -> LayerSums:
    """Start the sums of a layer.

    Args:
        layer: the layer.
        rank: how many directions will be kept; None for all.
    """
    return LayerSums(layer, rank) if layer.head is None else SharedSums(layer, rank)


class HeadSums(LayerSums):
    """Sums of linear layers with many outputs: of the matrix G only the diagonal.

    Args:
        layer: the layers, as one.
        rank: how many directions of A will be kept; None for all.
    """

    def _empty_outputs(self, like: Tensor) -> SecondMoment:
        return SecondMoment.diagonal(self.layer.height, like)

    def add_deltas(self, deltas: Tensor) -> None:
        """Add rows of gradients of outputs, without a second tensor of their size."""
        norms = torch.linalg.vector_norm(deltas, dim=1, dtype=self.outputs.total.dtype)
        self.outputs.add_diagonal(norms.square())


class SharedSums(LayerSums):
    """Sums of an embedding, and of the linear layers that share its weight.

    The sum of two Kronecker products, one for each kind of use, is approximated by one product with the same trace. It is
    arranged as that of the embedding: a diagonal over tokens, and a matrix of the size of a token's vector.

    Args:
        layer: the embedding.
        rank: how many directions of the second matrix will be kept; None for all.

    Attributes:
        head: the sums of the linear layers.
    """

    def __init__(self, layer: MeasuredLayer, rank: int | None) -> None:
        super().__init__(layer, rank)
        assert layer.head is not None
        self.head = HeadSums(layer.head, rank)

    @property
    def used(self) -> bool:
        """Whether any row reached one of the layers."""
        return super().used or self.head.used

    def add(self, part: LayerRows, with_inputs: bool = True) -> None:
        """Add what a use of either kind contributes."""
        if part.layer.one_hot:
            super().add(part, with_inputs)
        else:
            self.head.add(part, with_inputs)

    def joining(self, other: Self, factor: float) -> list[Addition]:
        """Return what is to be added for both: see `LayerSums.joining`."""
        return [*super().joining(other, factor), *self.head.joining(other.head, factor)]

    def reduce(self, ranks: Ranks) -> None:
        """Add up over ranks."""
        super().reduce(ranks)
        self.head.reduce(ranks)

    def scaled(self, factor: float) -> Self:
        """Return the sums multiplied by a number, while the count of rows stays."""
        other = super().scaled(factor)
        other.head = self.head.scaled(factor)
        return other

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held: sums, each with its trace."""
        return [*super().tensors(), *self.head.tensors()]

    def content(self, size: int = 1) -> dict[str, Any]:
        """Return the sums as tensors and plain values: see `LayerSums.content`."""
        return {**super().content(size), "head": self.head.content(size)}

    def read(self, content: Mapping[str, Any], size: int = 1) -> None:
        """Continue from this rank's share of a `content`: see `LayerSums.read`."""
        super().read(content, size)
        self.head.read(content["head"], size)

    def grown(self, layer: MeasuredLayer, rank: int | None) -> Self:
        """Return the sums of the same layers as they are now: the old ones are their leading block."""
        now = super().grown(layer, rank)
        now.head = self.head.grown(now.head.layer, rank)
        return now

    def moments(self, examples: float) -> Moments:
        """Return one pair of matrices for both kinds of uses: the one of the tokens has a trace of 1."""
        (a, g), (h, z) = _means(self, examples), _means(self.head, examples)
        total = _trace(a) * _trace(g) + _trace(h) * _trace(z)
        outputs = g.scaled(_trace(a))
        outputs.add_sum(h, _trace(z))
        if total == 0:
            return Moments(self.layer.arrangement, a, outputs)
        inputs = a.scaled(_trace(g) / total)
        inputs.add_sum(z, _trace(h) / total)
        return Moments(self.layer.arrangement, inputs, outputs)


def _means(sums: LayerSums, examples: float) -> tuple[SecondMoment, SecondMoment]:
    """Return the means over rows of inputs and over a number of examples; zero where no row came."""
    rows = float(sums.rows)
    return sums.inputs.scaled(1 / rows if rows else 0.0), sums.outputs.scaled(1 / examples)


def _trace(moment: SecondMoment) -> float:
    return float(moment.trace.sum())
