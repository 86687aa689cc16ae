"""Symmetric matrices by their leading directions, with one value for all others, and sums of outer products to find them in."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8
"""How many more columns a sketch has than directions are kept of it."""
BLOCK = 1024
"""Rows of the probe matrix that are drawn at a time, so that a longer one begins with a shorter one."""


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
        return self.times(torch.eye(self.size, dtype=self.basis.dtype, device=self.basis.device).expand(len(self.basis), -1, -1))

    def diagonal(self) -> Tensor:
        """Return the diagonals, (groups, size)."""
        inside = (self.basis.square() * (self.values - self.mean).unsqueeze(2)).sum(1)
        return inside + self.rest

    def scaled(self, factor: float) -> "Spectrum":
        """Multiply the matrices by a number."""
        return Spectrum(self.basis, self.values * factor, self.mean * factor, self.rest * factor)

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
    """A sum of x x^T over rows x, for each group of a layer: exact, as a sketch, or its diagonal alone.

    Args:
        total: the sum, (groups, size, size); its product with the probe matrix, (groups, size, width); or its diagonal,
            (groups, size).
        trace: its trace, (groups,).
    """

    total: Tensor
    trace: Tensor

    @classmethod
    def zeros(cls, groups: int, size: int, rank: int | None, like: Tensor) -> "SecondMoment":
        """Start a sum of which `rank` directions will be kept, None for all: a sketch where that is the smaller."""
        width = size if rank is None else min(rank + OVERSAMPLING, size)
        return cls(like.new_zeros(groups, size, width), like.new_zeros(groups))

    @classmethod
    def diagonal(cls, size: int, like: Tensor) -> "SecondMoment":
        """Start a sum that is a diagonal."""
        return cls(like.new_zeros(1, size), like.new_zeros(1))

    @property
    def sketched(self) -> bool:
        """Whether it is only known by its product with the probe matrix."""
        return self.total.dim() == 3 and self.total.shape[2] < self.total.shape[1]

    def add(self, rows: Tensor, factor: float = 1.0) -> None:
        """Add factor * x x^T for each of (groups, n, size) rows."""
        self.trace.add_(rows.square().sum((1, 2)), alpha=factor)
        right = rows @ probe_matrix(*self.total.shape[1:], rows.dtype, rows.device) if self.sketched else rows
        self.total.baddbmm_(rows.mT, right, alpha=factor)

    def add_diagonal(self, diagonal: Tensor) -> None:
        """Add to a sum that is a diagonal."""
        self.total.add_(diagonal)
        self.trace.add_(diagonal.sum(1))

    def add_sum(self, other: "SecondMoment", factor: float) -> None:
        """Add another sum of the same kind."""
        self.total.add_(other.total, alpha=factor)
        self.trace.add_(other.trace, alpha=factor)

    def put_into(self, other: "SecondMoment") -> None:
        """Write the sum into the leading block of one of more coordinates."""
        total = self.total
        if other.sketched and not self.sketched:
            total = total @ probe_matrix(self.total.shape[1], other.total.shape[2], total.dtype, total.device)
        other.total[tuple(map(slice, total.shape))] = total
        other.trace.copy_(self.trace)

    def joined(self, share: float, earlier: Spectrum, factor: float) -> "SecondMoment":
        """Return share * this + factor * an earlier matrix, in the form of this one."""
        if self.total.dim() == 2:
            before = earlier.rest
        elif self.sketched:
            omega = probe_matrix(*self.total.shape[1:], self.total.dtype, self.total.device)
            before = earlier.times(omega.expand(len(self.total), -1, -1))
        else:
            before = earlier.matrix()
        trace = earlier.diagonal().sum(1) * factor
        return SecondMoment(self.total * share + before * factor, self.trace * share + trace)

    def spectrum(self, share: float, rank: int | None) -> Spectrum:
        """Return the fewest leading directions that hold a share of the trace, at most `rank`, and the mean of all others."""
        if self.total.dim() == 2:
            none, zero = self.total.new_zeros(1, 0), self.total.new_zeros(1, 1)
            return Spectrum(self.total.new_zeros(1, 0, self.total.shape[1]), none, zero, self.total)
        wide = self.total.double()
        values, basis = _nystrom(wide) if self.sketched else _eigenpairs(wide)
        return _leading(values, basis, self.trace.double(), share, rank).to_dtype(self.total.dtype)


class _Wide(NamedTuple):
    """Leading directions in double precision."""

    basis: Tensor
    values: Tensor
    mean: Tensor

    def to_dtype(self, dtype: torch.dtype) -> Spectrum:
        basis, values, mean = (t.to(dtype).clone(memory_format=torch.contiguous_format) for t in self)  # not parts of larger ones
        return Spectrum(basis, values, mean, mean.clone())


def _leading(values: Tensor, basis: Tensor, trace: Tensor, share: float, rank: int | None) -> _Wide:
    """Cut eigenpairs, largest first, to those that hold a share of the trace."""
    size, total = basis.shape[1], trace.unsqueeze(1)
    held = values.cumsum(1)
    enough = held >= share * total * (1 - 1e-12)
    enough[:, -1:] = True
    needed = int(torch.where(total > 0, enough.int().argmax(1, keepdim=True) + 1, 0).max())
    kept = needed if rank is None else min(needed, rank)
    others = (total - held[:, kept - 1 : kept] if kept else total).clamp(min=0)
    return _Wide(basis[:, :, :kept].mT, values[:, :kept], others / max(size - kept, 1) if kept < size else others * 0)


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first and 0 where rounding has made them negative, and eigenvectors."""
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(1).clamp(min=0), basis.flip(2)


def _nystrom(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a sketch shows of a matrix's leading eigenpairs (Nyström; Tropp et al. 2017, arXiv 1706.05736)."""
    omega = probe_matrix(*sketch.shape[1:], torch.float64, sketch.device)
    core = omega.T @ sketch
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    least = values[:, -1:].clamp(min=0) * 1e-13
    inverse = torch.where(values > least, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0)
    basis, roots, _ = torch.linalg.svd(sketch @ (vectors * inverse.unsqueeze(1)), full_matrices=False)
    return roots.square(), basis


@lru_cache(maxsize=64)
def probe_matrix(size: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the random (size, width) matrix of all sketches, the same in every process."""
    blocks = [
        torch.randn(BLOCK, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in range(-(-size // BLOCK))
    ]
    return torch.cat(blocks)[:size].to(device, dtype)
