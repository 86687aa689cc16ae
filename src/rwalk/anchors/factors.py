"""Kronecker factors of a layer: the quadratic tr(D^T G D A) of its displacement D, and what it is measured by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwalk._parameters import state_dtype
from rwalk.anchors.spectrum import SecondMoment, Spectrum


class Arrangement(NamedTuple):
    """How a layer's parameters lie in the matrix D, (groups, outputs of a group, inputs of a group).

    Args:
        bias: the name of its bias, which is the first column; None where it has none or that one is no part of it.
        groups: how many groups a convolution has, 1 for all other layers.
        transposed: whether the weight's first dimension is that of the inputs, as an embedding's.
    """

    bias: str | None = None
    groups: int = 1
    transposed: bool = False

    def names(self, weight: str) -> list[str]:
        """Name the layer's parameters, in the order of the columns of D."""
        return [weight] if self.bias is None else [self.bias, weight]

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Arrange parameters as D."""
        d = self.weight_matrix(weight)
        return d if bias is None else torch.cat([bias.reshape(*d.shape[:2], 1), d], 2)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Arrange a weight alone."""
        return weight.T.unsqueeze(0) if self.transposed else weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def sizes(self, shape: torch.Size) -> tuple[int, int, int]:
        """Return the shape of D for a weight of some shape."""
        rows, columns = shape[0] // self.groups, shape[1:].numel()
        if self.transposed:
            rows, columns = columns, rows
        return self.groups, rows, columns + (self.bias is not None)

    def split(self, matrix: Tensor, shape: torch.Size) -> list[Tensor]:
        """Return the parts of D in the order of `names`, the weight's in its own shape."""
        weight = matrix if self.bias is None else matrix[:, :, 1:]
        whole = weight[0].T if self.transposed else weight.reshape(shape)
        return [whole] if self.bias is None else [matrix[:, :, 0].flatten(), whole]


class Moments(NamedTuple):
    """What was measured of a layer over a task.

    Args:
        arrangement: how its parameters lie in D.
        inputs: A, the mean over all rows that reached it of x x^T for inputs x, with a 1 in front for the bias.
        outputs: G, the mean over examples of the sum over their rows of d d^T for gradients d at its outputs.
    """

    arrangement: Arrangement
    inputs: SecondMoment
    outputs: SecondMoment

    @property
    def total(self) -> float:
        """The sum of the diagonal of the quadratic."""
        return float((self.inputs.trace.double() * self.outputs.trace.double()).sum())

    @property
    def elements(self) -> int:
        """How many elements the layer has."""
        groups, inputs = len(self.inputs.total), self.inputs.total.shape[-1]
        return groups * inputs * self.outputs.total.shape[-1]


class Cut(NamedTuple):
    """How many leading directions of a matrix are kept.

    Args:
        share: as many as hold this share of its trace.
        rank: but no more than this; None for no limit.
    """

    share: float = 1.0
    rank: int | None = None


@dataclass(frozen=True, eq=False)
class KroneckerFactor:
    """The quadratic tr(D^T G D A) of one layer, where A and G are known by their leading directions.

    Args:
        arrangement: how its parameters lie in D.
        inputs: A.
        outputs: G.
        tasks: how many tasks have reached it.
    """

    arrangement: Arrangement
    inputs: Spectrum
    outputs: Spectrum
    tasks: int = 1

    @classmethod
    def of(
        cls, moments: Moments, cut: Cut, unit: float, earlier: "KroneckerFactor | None" = None, fade: float = 1.0
    ) -> "KroneckerFactor":
        """Join what was measured with what earlier tasks left: A is the mean over tasks, G the sum.

        So the quadratic grows as a sum over tasks does, and not with their number squared.

        Args:
            moments: what was measured.
            cut: how much of it to keep.
            unit: what to divide G by.
            earlier: the layer as earlier tasks left it.
            fade: what to multiply its G by.
        """
        tasks = 1 if earlier is None else earlier.tasks + 1
        before = (None, None) if earlier is None else (earlier.inputs, earlier.outputs)
        inputs = moments.inputs.scaled(1 / tasks).spectrum(*cut, before[0], 1 - 1 / tasks)
        outputs = moments.outputs.scaled(1 / unit).spectrum(*cut, before[1], fade)
        return cls(moments.arrangement, inputs, outputs, tasks)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "KroneckerFactor":
        """Put other tensors in the place of all that are held."""
        inputs, outputs = (Spectrum(*map(change, side)) for side in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)

    def faded(self, factor: float) -> "KroneckerFactor":
        """Multiply G by a number."""
        return replace(self, outputs=self.outputs.scaled(factor))

    def names(self, weight: str) -> list[str]:
        """Name the layer's parameters, in the order of the columns of D."""
        return self.arrangement.names(weight)

    def totals(self) -> list[float]:
        """Return the sum of the quadratic's diagonal over each parameter, in the order of `names`."""
        each = (self.outputs.diagonal().double().sum(1, keepdim=True) * self.inputs.diagonal().double()).sum(0)
        return [float(each.sum())] if self.arrangement.bias is None else [float(each[0]), float(each[1:].sum())]

    def importance(self, shape: torch.Size) -> list[Tensor]:
        """Return the quadratic's diagonal, in the order of `names`, the weight's in its own shape."""
        diagonal = self.outputs.diagonal().unsqueeze(2) * self.inputs.diagonal().unsqueeze(1)
        return [part.contiguous() for part in self.arrangement.split(diagonal, shape)]

    def displacement(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> Tensor:
        """Return D; a parameter that `theta` lacks counts as unmoved."""
        bias = self.arrangement.bias
        like = theta[weight if weight in theta else bias or weight]

        def moved(name: str) -> tuple[Tensor, Tensor]:
            here = point[name].to(like.device, state_dtype(like))
            return (theta[name].to(here.dtype), here) if name in theta else (here, here)

        now, then = map(self.arrangement.weight_matrix, moved(weight))
        if bias is None:
            return now - then
        d = now.new_empty(*now.shape[:2], now.shape[2] + 1)
        torch.sub(now, then, out=d[:, :, 1:])
        now, then = moved(bias)
        torch.sub(now.view(d.shape[:2]), then.view(d.shape[:2]), out=d[:, :, 0])
        return d

    def penalty(self, d: Tensor) -> Tensor:
        """Return tr(D^T G D A)."""
        outputs, inputs = (side.beside(d, d.dtype) for side in (self.outputs, self.inputs))
        return (outputs.times(d) * inputs.times(d.mT).mT).sum()

    def proximal_move(self, d: Tensor, step: float) -> Tensor:
        """Return what to take off D for the minimum of step / 2 * tr(D'^T G D' A) + |D' - D|^2 / 2 over D'.

        In the two eigenbases that is w / (1 + w) of each entry, with w = step * g_i * a_j. Directions that are not known all
        have one g or a, so that only the known ones need products: 4 * inputs * outputs * (rank of G + rank of A) operations.
        """
        g, a = (side.beside(d, d.dtype) for side in (self.outputs, self.inputs))

        def shrink(rows: Tensor, columns: Tensor) -> Tensor:
            weight = step * rows.unsqueeze(2) * columns.unsqueeze(1)
            return weight / (1 + weight)

        turned = g.basis @ d
        left = (shrink(g.values, a.rest) - shrink(g.mean, a.rest)) * turned
        move = shrink(g.rest, a.rest) * d
        if a.basis.shape[1]:
            right = (shrink(g.rest, a.values) - shrink(g.rest, a.mean)) * (a.basis @ d.mT).mT
            known = shrink(g.values, a.values) - shrink(g.mean, a.values) - shrink(g.values, a.mean) + shrink(g.mean, a.mean)
            left = left + (known * (turned @ a.basis.mT)) @ a.basis
            move.baddbmm_(right, a.basis)
        return move.baddbmm_(g.basis.mT, left)

    def aligned(self, weight: Tensor, old: torch.Size, bias: bool) -> "KroneckerFactor | None":
        """Follow a weight that moved or grew from shape `old`, and drop the bias unless it is still there.

        Returns None where groups of a convolution grew, whose rows now belong to others.
        """
        factor = self if bias or self.arrangement.bias is None else self._without_bias()
        if weight.shape != old:
            if self.arrangement.groups > 1:
                return None
            factor = factor._grown(weight.shape, old)
        dtype = state_dtype(weight)
        return replace(factor, inputs=factor.inputs.beside(weight, dtype), outputs=factor.outputs.beside(weight, dtype))

    def _grown(self, new: torch.Size, old: torch.Size) -> "KroneckerFactor":
        first, others = torch.arange(old[0]), torch.zeros((), dtype=torch.long)
        for size, before in zip(new[1:], old[1:], strict=True):
            others = others.unsqueeze(-1) * size + torch.arange(before)
        rows, columns = (others, first) if self.arrangement.transposed else (first, others.flatten())
        height, width = new[0], new[1:].numel()
        if self.arrangement.transposed:
            height, width = width, height
        if self.arrangement.bias is not None:
            columns, width = torch.cat([torch.zeros(1, dtype=torch.long), columns + 1]), width + 1
        inputs = self.inputs if len(columns) == width else self.inputs.placed(columns, width)
        outputs = self.outputs if len(rows) == height else self.outputs.placed(rows, height)
        return replace(self, inputs=inputs, outputs=outputs)

    def _without_bias(self) -> "KroneckerFactor":
        matrix = self.inputs.matrix()[:, 1:, 1:].contiguous()
        moment = SecondMoment(matrix, matrix.diagonal(dim1=1, dim2=2).sum(1))
        arrangement = self.arrangement._replace(bias=None)
        return replace(self, arrangement=arrangement, inputs=moment.spectrum(1.0, None))

    def content(self) -> dict[str, Any]:
        """Return the layer as plain values and tensors, for state files."""
        sides = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {**self.arrangement._asdict(), **sides, "tasks": self.tasks}

    @classmethod
    def read(cls, content: Mapping[str, Any], weight: str, point: Mapping[str, Tensor]) -> "KroneckerFactor":
        """Return the layer that `content` was made from.

        Raises:
            ValueError: if it does not fit the parameters of `point`.
        """
        arrangement = Arrangement(content["bias"], content["groups"], content["transposed"])
        if [type(v) for v in arrangement[1:]] != [int, bool] or type(content["tasks"]) is not int or content["tasks"] < 1:
            raise ValueError("groups, transposed or tasks")
        inputs, outputs = (Spectrum(*content[key]) for key in ("inputs", "outputs"))
        groups, rows, columns = arrangement.sizes(point[weight].shape)
        if arrangement.bias is not None and point[arrangement.bias].shape != (groups * rows,):
            raise ValueError("bias")
        for key, side, size in (("inputs", inputs, columns), ("outputs", outputs, rows)):
            if not _fits(side, groups, size):
                raise ValueError(key)
        return cls(arrangement, inputs, outputs, content["tasks"])

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held."""
        return [*self.inputs, *self.outputs]


def _fits(side: Spectrum, groups: int, size: int) -> bool:
    """Return whether what a file holds is a spectrum of matrices of some size."""
    rank = side.values.shape[-1]
    shapes = [(groups, rank, size), (groups, rank), (groups, 1)]
    if [t.shape for t in side[:3]] != shapes or side.rest.shape not in ((groups, 1), (groups, size)):
        return False
    return all(t.is_floating_point() for t in side) and all(bool((t >= 0).all()) for t in side[1:])
