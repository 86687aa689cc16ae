"""Symmetric matrices by their leading directions, with one value for all others, and sums of outer products to find them in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwalk.anchors.incremental import MANY, drawn_rows, fewer_rows, joined_rows, squared_lengths
from rwalk.distributed.ranks import Ranks

LEAST = 1e-30
"""The least that the inverse of a step's length counts for, so that no strength divides by zero."""
OVERSAMPLING = 8
"""How many more directions are followed while a matrix is summed up than are kept of it."""


class Spectrum(NamedTuple):
    """Matrices without negative eigenvalues, one for each group of a layer: the leading directions, and the mean of all others.

    Each is basis^T diag(values - mean) basis + diag(rest).

    Args:
        basis: orthonormal rows, (groups, rank, size); none for a diagonal matrix.
        values: the eigenvalues that belong to them, (groups, rank).
        mean: the eigenvalue of all other directions, (groups, 1).
        rest: the same for each coordinate: (groups, 1) if all have `mean`; (groups, size) if some joined later and have 0, or
            if the matrix is diagonal.
    """

    basis: Tensor
    values: Tensor
    mean: Tensor
    rest: Tensor

    @property
    def size(self) -> int:
        """How many rows each matrix has."""
        return self.basis.shape[2]

    def times(self, columns: Tensor) -> Tensor:
        """Multiply the matrices by (groups, size, n) columns."""
        inside = (self.values - self.mean).unsqueeze(2) * (self.basis @ columns)
        return self.basis.mT @ inside + self.rest.unsqueeze(2) * columns

    def matrix(self) -> Tensor:
        """Multiply the matrices out, (groups, size, size)."""
        return self.times(
            torch.eye(self.size, dtype=self.basis.dtype, device=self.basis.device).expand(len(self.basis), -1, -1)
        )

    def diagonal(self) -> Tensor:
        """Return the diagonals, (groups, size)."""
        inside = (self.basis.square() * (self.values - self.mean).unsqueeze(2)).sum(1)
        return inside + self.rest

    def scaled(self, factor: float) -> "Spectrum":
        """Multiply the matrices by a number."""
        return Spectrum(self.basis, self.values * factor, self.mean * factor, self.rest * factor)

    def block_move(self, off: Tensor, kernel: Tensor, step: Tensor | float) -> Tensor:
        """Return what to take off a factor X for the minimum of step / 2 * q(X') + |X' - X|^2 / 2 over X'.

        Half the gradient of the quadratic q is this matrix times (off + (X' - X) * kernel), so that each entry has a minimum of
        its own in the eigenbasis.

        Args:
            off: (groups, size, n).
            kernel: above 0, (groups, n).
            step: the length of the step.
        """
        inverse = (1 / step).clamp(min=LEAST) if isinstance(step, Tensor) else max(1 / step, LEAST)

        def shrink(values: Tensor) -> Tensor:
            return values.unsqueeze(2) / (inverse + values.unsqueeze(2) * kernel.unsqueeze(1))

        inside = (shrink(self.values) - shrink(self.mean)) * (self.basis @ off)
        return (shrink(self.rest) * off).baddbmm_(self.basis.mT, inside)

    def placed(self, places: Tensor, size: int) -> "Spectrum":
        """Make the matrices part of larger ones that are 0 elsewhere: row i becomes row `places[i]` of `size`."""
        groups, rank, old = self.basis.shape
        basis, rest = self.basis.new_zeros(groups, rank, size), self.rest.new_zeros(groups, size)
        basis[:, :, places] = self.basis
        rest[:, places] = self.rest.expand(-1, old)
        return Spectrum(basis, self.values, self.mean, rest)

    def beside(self, theta: Tensor, dtype: torch.dtype) -> "Spectrum":
        """Move to a parameter's device, in some precision."""
        if self.basis.dtype is dtype and self.basis.device == theta.device:
            return self
        return Spectrum(*(t.to(theta.device, dtype) for t in self))


@dataclass(eq=False)
class SecondMoment:
    """A sum of x x^T over rows x, for each group of a layer: exact, by its leading directions, or its diagonal alone.

    Args:
        total: the exact sum, (groups, size, size); its leading directions as rows that are as long as the roots of their
            eigenvalues, and a few rows that wait to be joined with them, (groups, n, size); or its diagonal, (groups, size).
        trace: its trace, (groups,).
        most: how many directions are followed; None where the sum is exact or a diagonal.
    """

    total: Tensor
    trace: Tensor
    most: int | None = None

    @classmethod
    def zeros(cls, groups: int, size: int, rank: int | None, like: Tensor) -> "SecondMoment":
        """Start a sum of which `rank` directions will be kept, None for all; it is exact unless following fewer is smaller."""
        if rank is None or rank + OVERSAMPLING >= size:
            return cls(like.new_zeros(groups, size, size), like.new_zeros(groups))
        return cls(like.new_zeros(groups, 0, size), like.new_zeros(groups), rank + OVERSAMPLING)

    @classmethod
    def diagonal(cls, size: int, like: Tensor) -> "SecondMoment":
        """Start a sum that is a diagonal."""
        return cls(like.new_zeros(1, size), like.new_zeros(1))

    def add(self, rows: Tensor, counting: Tensor | None = None) -> None:
        """Add x x^T for each of (groups, n, size) rows; only for those that count, where `counting` has 1 and not 0, (n,)."""
        squares = squared_lengths(rows)
        squares = squares if counting is None else squares * counting
        self.trace.add_(squares.sum(1))
        if self.most is None:
            self.total.baddbmm_(rows.mT, rows if counting is None else rows * counting.unsqueeze(1))
        elif rows.shape[1] >= MANY:
            self._join(fewer_rows(drawn_rows(rows, squares), self.most), 2 * self.most)
        else:
            self._join(fewer_rows(rows, self.most, counting), 2 * self.most)

    def add_diagonal(self, diagonal: Tensor) -> None:
        """Add to a sum that is a diagonal."""
        self.total.add_(diagonal)
        self.trace.add_(diagonal.sum(1))

    def add_sum(self, other: "SecondMoment", factor: float) -> None:
        """Add another sum of the same kind, multiplied by a number."""
        add_sums([(self, other, factor)])

    def reduce(self, ranks: Ranks) -> None:
        """Add up over ranks."""
        ranks.sum_(self.trace)
        if self.most is None:
            ranks.sum_(self.total)
            return
        groups, count, size = self.total.shape
        every = self.total.new_zeros(ranks.size, groups, 2 * self.most, size)
        every[ranks.number, :, :count] = self.total
        self.total = self.total[:, :0]
        for part in ranks.sum_(every):
            self._join(part, self.most)

    def _join(self, rows: Tensor, wait: int) -> None:
        """Add rows to those of the leading directions, and find these anew if there are then more than may `wait`."""
        both = torch.cat([self.total, rows], 1)
        [self.total] = [both] if both.shape[1] <= wait else joined_rows([both], self.most or 0)

    def scaled(self, factor: float) -> "SecondMoment":
        """Multiply the sum by a number."""
        return SecondMoment(self.total * (factor if self.most is None else math.sqrt(factor)), self.trace * factor, self.most)

    def put_into(self, other: "SecondMoment") -> None:
        """Write the sum into the leading block of one of more coordinates."""
        total = self.total
        if other.most is None:
            other.total[tuple(map(slice, total.shape))] = total
        elif self.most is None:
            values, basis = _eigenpairs(total.double())
            total = (basis * values.sqrt().unsqueeze(1)).mT.to(total.dtype)
            other._join(F.pad(total, (0, other.total.shape[2] - total.shape[2])), other.most)
        else:  # rows that wait go on waiting
            other.total = F.pad(total, (0, other.total.shape[2] - total.shape[2]))
        other.trace.copy_(self.trace)

    def spectrum(self, share: float, rank: int | None, earlier: Spectrum | None = None, factor: float = 0.0) -> Spectrum:
        """Return the leading directions of this sum and `factor` times an earlier matrix.

        Args:
            share: as many as hold this share of the trace; all others count by their mean.
            rank: but no more than this; None for no limit.
            earlier: the matrix, None for none.
            factor: what to multiply it by.
        """
        if self.total.dim() == 2:
            diagonal = self.total if earlier is None else self.total + earlier.rest * factor
            none, zero = diagonal.new_zeros(1, 0), diagonal.new_zeros(1, 1)
            return Spectrum(diagonal.new_zeros(1, 0, diagonal.shape[1]), none, zero, diagonal)
        old = None if earlier is None else Spectrum(*(t.double() for t in earlier.scaled(factor)))
        trace = self.trace.double() if old is None else self.trace.double() + old.diagonal().sum(1)
        wide = self.total.double()
        if self.most is None:
            values, basis = _eigenpairs(wide if old is None else wide + old.matrix())
        else:
            values, basis = _of_directions(wide, old)
        return _leading(values, basis, trace, share, rank).to_dtype(self.total.dtype)


Addition = tuple[SecondMoment, SecondMoment, float]
"""A sum, another one of the same kind that is to be added to it, and what to multiply that by."""


def add_sums(additions: Sequence[Addition]) -> None:
    """Add many sums to others; the directions of all are found together."""
    wide: dict[int, list[SecondMoment]] = {}
    for mine, other, factor in additions:
        mine.trace.add_(other.trace, alpha=factor)
        if mine.most is None:
            mine.total.add_(other.total, alpha=factor)
            continue
        mine.total = torch.cat([mine.total, other.total * math.sqrt(factor)], 1)
        if mine.total.shape[1] > mine.most + mine.most // 2:  # a few rows wait
            wide.setdefault(mine.most, []).append(mine)
    for most, sums in wide.items():
        for mine, total in zip(sums, joined_rows([m.total for m in sums], most), strict=True):
            mine.total = total


class _Wide(NamedTuple):
    """Leading directions in double precision."""

    basis: Tensor
    values: Tensor
    mean: Tensor

    def to_dtype(self, dtype: torch.dtype) -> Spectrum:
        """Return them as tensors of their own, not parts of larger ones."""
        basis, values, mean = (t.to(dtype).clone(memory_format=torch.contiguous_format) for t in self)
        return Spectrum(basis, values, mean, mean.clone())


def _leading(values: Tensor, basis: Tensor, trace: Tensor, share: float, rank: int | None) -> _Wide:
    """Cut eigenpairs, largest first, to those that hold a share of the trace."""
    size, total = basis.shape[1], trace.unsqueeze(1)
    held = values.cumsum(1)
    enough = (held < share * total * (1 - 1e-12)).sum(1) + 1
    there = (values > 1e-13 * values[:, :1]).sum(1)
    needed = int(torch.minimum(enough, there).max())
    kept = needed if rank is None else min(needed, rank)
    others = (total - held[:, kept - 1 : kept] if kept else total).clamp(min=0)
    return _Wide(basis[:, :, :kept].mT, values[:, :kept], others / max(size - kept, 1) if kept < size else others * 0)


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first and 0 where rounding has made them negative, and eigenvectors as columns."""
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(1).clamp(min=0), basis.flip(2)


def _of_directions(rows: Tensor, earlier: Spectrum | None) -> tuple[Tensor, Tensor]:
    """Return eigenpairs of a sum that is known by its directions, joined with an earlier matrix that is too."""
    if earlier is not None:
        rows = torch.cat([rows, (earlier.values - earlier.mean).clamp(min=0).sqrt().unsqueeze(2) * earlier.basis], 1)
    _, roots, basis = torch.linalg.svd(rows, full_matrices=False)
    values = roots.square()
    if earlier is not None:  # what it has in all directions alike
        values = values + (basis.square() * earlier.rest.unsqueeze(1)).sum(2)
    return values, basis.mT
