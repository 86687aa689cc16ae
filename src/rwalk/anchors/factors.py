"""Kronecker factors of a layer: the quadratic tr(D^T G D A) of its displacement D, and what it is measured by."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from rwalk._parameters import state_dtype
from rwalk.anchors.held import HeldLayer, Product, read_sides
from rwalk.anchors.spectrum import SecondMoment
from rwalk.kernels.reference import share_of_way_


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
        arrangement: how its parameters lie in D, or make it up.
        inputs: A, the mean over all rows that reached it of x x^T for inputs x, with a 1 in front for the bias.
        outputs: G, the mean over examples of the sum over their rows of d d^T for gradients d at its outputs.
    """

    arrangement: Arrangement | Product
    inputs: SecondMoment
    outputs: SecondMoment

    @property
    def total(self) -> float:
        """The sum of the diagonal of the quadratic."""
        return float((self.inputs.trace.double() * self.outputs.trace.double()).sum())

    @property
    def elements(self) -> int:
        """How many elements the layer has; of an embedding those of the tokens that came, whatever the vocabulary."""
        inputs = int(self.inputs.total.count_nonzero()) if self.inputs.total.dim() == 2 else self.inputs.total.shape[-1]
        return len(self.outputs.total) * inputs * self.outputs.total.shape[-1]


class Cut(NamedTuple):
    """How many leading directions of a matrix are kept.

    Args:
        share: as many as hold this share of its trace.
        rank: but no more than this; None for no limit.
    """

    share: float = 1.0
    rank: int | None = None


@final
@dataclass(frozen=True, eq=False)
class KroneckerFactor(HeldLayer):
    """The quadratic of a layer whose parameters are D itself: the `HeldLayer` of an `Arrangement`."""

    arrangement: Arrangement

    def leading(self, weight: str) -> list[str]:
        """Name the weight: a bias is pulled along, or alone where the weight has not moved."""
        return [weight]

    def totals(self, weight: str, point: Mapping[str, Tensor]) -> list[float]:  # noqa: ARG002
        """Return the sum of the quadratic's diagonal over each parameter: see `HeldLayer.totals`."""
        each = (self.outputs.diagonal().double().sum(1, keepdim=True) * self.inputs.diagonal().double()).sum(0)
        return [float(each.sum())] if self.arrangement.bias is None else [float(each[0]), float(each[1:].sum())]

    def importance(self, weight: str, point: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the quadratic's diagonal: see `HeldLayer.importance`."""
        diagonal = self.outputs.diagonal().unsqueeze(2) * self.inputs.diagonal().unsqueeze(1)
        return [part.contiguous() for part in self.arrangement.split(diagonal, point[weight].shape)]

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

    def penalty_at(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty at some parameters: see `HeldLayer.penalty_at`."""
        return self.penalty(self.displacement(weight, theta, point))

    def penalty(self, d: Tensor) -> Tensor:
        """Return tr(D^T G D A)."""
        outputs, inputs = (side.beside(d, d.dtype) for side in (self.outputs, self.inputs))
        return (outputs.times(d) * inputs.times(d.mT).mT).sum()

    def moves(
        self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what to take off bias and weight, or off the bias alone: see `HeldLayer.moves`."""
        d = self.displacement(weight, theta, point)
        if weight not in steps:
            for bias, step in steps.items():
                yield bias, self.bias_move(d, step)
            return
        move = self.proximal_move(d, steps[weight])
        yield from zip(self.names(weight), self.arrangement.split(move, point[weight].shape), strict=True)

    def proximal_move(self, d: Tensor, step: Tensor | float) -> Tensor:
        """Return what to take off D, in its memory, for the minimum of step / 2 * tr(D'^T G D' A) + |D' - D|^2 / 2 over D'.

        In the two eigenbases that is w / (1 + w) of each entry, with w = step * g_i * a_j. Directions that are not known all
        have one g or a, so that only the known ones need products: 4 * inputs * outputs * (rank of G + rank of A) operations.
        """
        g, a = (side.beside(d, d.dtype) for side in (self.outputs, self.inputs))
        rows, columns = (torch.cat([side.values, side.mean, side.rest], 1) for side in (g, a))
        shares = share_of_way_((step * rows.unsqueeze(2) * columns.unsqueeze(1)).reciprocal_())
        known, mean, rest = range(3)  # directions, what all others have, and the same for each coordinate
        parts = shares.split([g.values.shape[1], 1, g.rest.shape[1]], 1)
        s = [part.split([a.values.shape[1], 1, a.rest.shape[1]], 2) for part in parts]
        turned = g.basis @ d
        left = (s[known][rest] - s[mean][rest]) * turned
        along = (a.basis @ d.mT).mT
        move = d.mul_(s[rest][rest])
        if a.basis.shape[1]:
            both = s[known][known] - s[mean][known] - s[known][mean] + s[mean][mean]
            left = torch.baddbmm(left, both * (turned @ a.basis.mT), a.basis)
            move.baddbmm_((s[rest][known] - s[rest][mean]) * along, a.basis)
        return move.baddbmm_(g.basis.mT, left)

    def bias_move(self, d: Tensor, step: Tensor | float) -> Tensor:
        """Return what to take off the bias for the minimum of `proximal_move` where the rest of D stays as it is.

        Half the gradient is G (D A e_0 + a_00 (b' - b)).
        """
        g, a = (side.beside(d, d.dtype) for side in (self.outputs, self.inputs))
        return g.block_move(a.times(d.mT).mT[:, :, :1], a.diagonal()[:, :1], step).flatten()

    def followed(self, weight: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> "KroneckerFactor | None":
        """Follow parameters that changed: see `HeldLayer.followed`."""
        return self.aligned(new[weight], old[weight].shape, self.arrangement.bias in new) if weight in new else None

    def renamed(self, weight: str, names: Mapping[str, str]) -> "KroneckerFactor | None":
        """Return the layer under other names: see `HeldLayer.renamed`."""
        kept = self if self.arrangement.bias in (None, *names) else self._without_bias()
        bias = names.get(kept.arrangement.bias or "")
        return replace(kept, arrangement=kept.arrangement._replace(bias=bias)) if weight in names else None

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

    @classmethod
    def read(cls, content: Mapping[str, Any], weight: str, point: Mapping[str, Tensor]) -> "KroneckerFactor":
        """Return the layer that `content` was made from.

        Raises:
            ValueError: if it does not fit the parameters of `point`.
        """
        arrangement = Arrangement(content["bias"], content["groups"], content["transposed"])
        if [type(v) for v in arrangement[1:]] != [int, bool]:
            raise ValueError("groups or transposed")
        sizes = arrangement.sizes(point[weight].shape)
        if arrangement.bias is not None and point[arrangement.bias].shape != (sizes[0] * sizes[1],):
            raise ValueError("bias")
        return cls(arrangement, *read_sides(content, sizes))
