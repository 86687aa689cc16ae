"""Adapters by their product: what a layer's weight gains is held, and not each of the two factors that it is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from rwalk._parameters import state_dtype
from rwalk.anchors.held import HeldLayer, Product, read_sides
from rwalk.anchors.spectrum import Spectrum


class MovedPair(NamedTuple):
    """The two factors of an adapter, and how far they are from the point, each as (1, rows, columns).

    Args:
        up: the factor of the outputs.
        down: the factor of the inputs.
        up_moved: how far `up` is from the point.
        down_moved: how far `down` is from the point.
        up_then: `up` at the point.
        down_then: `down` at the point.
    """

    up: Tensor
    down: Tensor
    up_moved: Tensor
    down_moved: Tensor
    up_then: Tensor
    down_then: Tensor


@final
@dataclass(frozen=True, eq=False)
class ProductFactor(HeldLayer):
    """The quadratic tr(D^T G D A) of D = scale * (up @ down - the same at the point), the `HeldLayer` of an adapter.

    D is never made: its rank is at most twice that of the adapter, and all that is computed is as thin as its factors.

    Args:
        arrangement: how its factors make up D.
        inputs: A.
        outputs: G.
        tasks: how many tasks have reached it.
        base: the layer's own weight at the point times a fixed vector, by which a merged adapter is known; None where it is not
            known, or learns itself.
    """

    arrangement: Product
    base: Tensor | None = None

    def gain(self, weight: str, point: Mapping[str, Tensor], vector: Tensor) -> Tensor:
        """Return what the product at the point makes of a vector of inputs."""
        up, down = (point[name].to(vector) for name in self.names(weight))
        return (up * (down * vector).sum(1)).sum(1) * self.arrangement.scale

    def multiplied(self, scale: float) -> "ProductFactor":
        """Return the adapter with another scale."""
        return replace(self, arrangement=self.arrangement._replace(scale=scale))

    def leading(self, weight: str) -> list[str]:
        """Name both factors."""
        return self.names(weight)

    def _pair(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> MovedPair:
        like = theta.get(weight, point[weight])

        def both(name: str) -> list[Tensor]:
            then = point[name].to(like.device, state_dtype(like)).unsqueeze(0)
            return [theta[name].detach().to(then).unsqueeze(0) if name in theta else then, then]

        (up, up_then), (down, down_then) = map(both, self.names(weight))
        return MovedPair(up, down, up - up_then, down - down_then, up_then, down_then)

    def _sides(self, like: Tensor) -> tuple[Spectrum, Spectrum]:
        """Return G and A beside a tensor."""
        return self.outputs.beside(like, like.dtype), self.inputs.beside(like, like.dtype)

    def penalty_at(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> Tensor:
        """Return tr(D^T G D A), from D as a product of two thin matrices: see `HeldLayer.penalty_at`."""
        pair = self._pair(weight, theta, point)
        g, a = self._sides(pair.up)
        left = torch.cat([pair.up_moved, pair.up_then], 2)
        right = torch.cat([pair.down, pair.down_moved], 1)
        total = (left.mT @ g.times(left) * (right @ a.times(right.mT))).sum()
        return total.clamp(min=0) * self.arrangement.scale**2

    def moves(
        self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what to take off one factor with the other one as it is, then what to take off that one.

        Each is the exact minimum over one factor, so that no strength overshoots: see `HeldLayer.moves`.
        """
        square = self.arrangement.scale**2
        lengths = {name: float(step) * square for name, step in steps.items()}
        if lengths.get(weight):
            pair = self._pair(weight, theta, point)
            g, a = self._sides(pair.up)
            seen = a.times(pair.down.mT)
            kernel = pair.down @ seen
            off = pair.up_moved @ kernel + pair.up_then @ (pair.down_moved @ seen)
            yield weight, _block_move(off, kernel, g, lengths[weight])
        if lengths.get(self.arrangement.down):
            pair = self._pair(weight, theta, point)
            g, a = self._sides(pair.up)
            seen = g.times(pair.up)
            kernel = pair.up.mT @ seen
            off = pair.down_moved.mT @ kernel + pair.down_then.mT @ (pair.up_moved.mT @ seen)
            yield self.arrangement.down, _block_move(off, kernel, a, lengths[self.arrangement.down]).T

    def _diagonals(self, weight: str, point: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return for each factor the diagonals of the two matrices whose product is its quadratic, its own side's first."""
        pair = self._pair(weight, {}, point)
        g, a = self._sides(pair.up)
        along_down = (pair.down * a.times(pair.down.mT).mT).sum(2).clamp(min=0)
        along_up = (pair.up * g.times(pair.up)).sum(1).clamp(min=0)
        square = self.arrangement.scale**2
        return [(g.diagonal()[0] * square, along_down[0]), (a.diagonal()[0] * square, along_up[0])]

    def importance(self, weight: str, point: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the diagonal by the chain rule: see `HeldLayer.importance`."""
        (g, along_down), (a, along_up) = self._diagonals(weight, point)
        return [torch.outer(g, along_down), torch.outer(along_up, a)]

    def totals(self, weight: str, point: Mapping[str, Tensor]) -> list[float]:
        """Return the sum of the diagonal over each factor: see `HeldLayer.totals`."""
        return [float(one.double().sum() * two.double().sum()) for one, two in self._diagonals(weight, point)]

    def followed(
        self,
        weight: str,
        old: Mapping[str, Tensor],  # noqa: ARG002
        new: Mapping[str, Tensor],
    ) -> "ProductFactor | None":
        """Follow factors that changed; where the layer grew, new inputs and outputs count 0: see `HeldLayer.followed`."""
        if not all(name in new for name in self.names(weight)):
            return None
        up = new[weight]
        base = None if self.base is None or len(self.base) != len(up) else self.base.to(up.device)
        outputs = _placed(self.outputs, up.shape[0]).beside(up, state_dtype(up))
        inputs = _placed(self.inputs, new[self.arrangement.down].shape[1]).beside(up, state_dtype(up))
        return replace(self, inputs=inputs, outputs=outputs, base=base)

    def renamed(self, weight: str, names: Mapping[str, str]) -> "ProductFactor | None":
        """Return the adapter under other names: see `HeldLayer.renamed`."""
        if not all(name in names for name in self.names(weight)):
            return None
        return replace(self, arrangement=self.arrangement._replace(down=names[self.arrangement.down]))

    def content(self) -> dict[str, Any]:
        """Return the adapter as plain values and tensors: see `HeldLayer.content`."""
        return super().content() | {"base": self.base}

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held."""
        return super().tensors() + ([] if self.base is None else [self.base])

    @classmethod
    def read(cls, content: Mapping[str, Any], weight: str, point: Mapping[str, Tensor]) -> "ProductFactor":
        """Return the adapter that `content` was made from.

        Raises:
            ValueError: if it does not fit the parameters of `point`.
        """
        arrangement = Product(content["down"], content["scale"])
        (outputs, rank), (other, inputs) = (point[name].shape for name in arrangement.names(weight))
        if type(arrangement.scale) is not float or rank != other:
            raise ValueError("scale or rank")
        base = content["base"]
        if base is not None and not (base.is_floating_point() and base.shape == (outputs,)):
            raise ValueError("base")
        return cls(arrangement, *read_sides(content, (1, outputs, inputs)), base)


def _placed(side: Spectrum, size: int) -> Spectrum:
    return side if side.size == size else side.placed(torch.arange(side.size), size)


def _block_move(off: Tensor, kernel: Tensor, side: Spectrum, step: float) -> Tensor:
    """Return what to take off a factor X for the minimum of step / 2 * q(X') + |X' - X|^2 / 2 over X'.

    Half the gradient of the quadratic q is side @ (off + (X' - X) @ kernel): in the eigenbasis of `kernel` that is
    `Spectrum.block_move`. Directions of `kernel` that are no more than rounding errors stay as they are.

    Args:
        off: (1, size, rank).
        kernel: (1, rank, rank).
        side: the matrix that belongs to the rows of X.
        step: the length of the step.
    """
    solved = torch.linalg.eigh(((kernel + kernel.mT) / 2).cpu().double())  # it is small
    values, basis = (t.to(kernel.device) for t in solved)
    known = values > len(values[0]) * torch.finfo(kernel.dtype).eps * values[:, -1:]
    values, basis = torch.where(known, values, 1.0).to(off.dtype), torch.where(known.unsqueeze(1), basis, 0.0).to(off.dtype)
    return (side.block_move(off @ basis, values, step) @ basis.mT)[0]
