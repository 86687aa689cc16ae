"""The leading directions of growing sums of outer products x x^T of rows x, by an incremental singular value decomposition.

A sum is held by rows that are as long as the roots of its eigenvalues, and by a few more that wait to be joined with them.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

MOST_ROWS = 4096
"""How many rows are looked at, at most: of more of them, as of a convolution, every n-th one."""
OVERSAMPLING = 8
"""How many more directions are followed than count."""
BLOCK = 1024
"""Rows of the probe that are drawn at a time, so that a longer one begins with a shorter one."""


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first and 0 where rounding has made them negative, and eigenvectors as columns."""
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(1).clamp(min=0), basis.flip(2)


def joined_rows(sums: Sequence[Tensor], most: Sequence[int]) -> list[Tensor]:
    """Return the leading directions of sums, as many of each as are asked for (Brand 2002).

    Args:
        sums: rows whose outer products make up each sum, (groups, n, size).
        most: how many rows to return for each, at most.
    """
    wide = [i for i, rows in enumerate(sums) if rows.shape[1] > most[i]]
    found = list(sums)
    for i, (_, vectors) in zip(wide, small_eigenpairs([sums[i] @ sums[i].mT for i in wide]), strict=True):
        found[i] = vectors[:, :, -most[i] :].mT @ sums[i]
    return found


def small_eigenpairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return eigenvalues of small symmetric matrices, smallest first, and eigenvectors as columns.

    They are found on the CPU, which needs 0.1 ms for one of 50 x 50. All of a size go there and back together, so that a
    device is waited for once.
    """
    alike: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in alike.values():
        every = torch.stack([matrices[i] for i in places])
        solved = (part.to(every.device).unbind() for part in torch.linalg.eigh(every.cpu()))
        found |= zip(places, zip(*solved, strict=True), strict=True)
    return [found[i] for i in range(len(matrices))]


def fewer_rows(rows: Tensor, most: int) -> Tensor:
    """Return rows whose sum of outer products has nearly the same leading directions, where there are many.

    They are orthonormal combinations of all rows, those of a random projection (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061): the sum is never larger than it was. No number is looked at, so that a device is not waited for.

    Args:
        rows: (groups, n, size).
        most: how many directions count; up to twice as many rows stay as they are.
    """
    step = (rows.shape[1] // MOST_ROWS) | 1
    if step > 1:
        rows = rows[:, ::step] * math.sqrt(rows.shape[1] / rows[:, ::step].shape[1])
    if rows.shape[1] <= 2 * most:
        return rows
    projected = rows @ probe(rows.shape[2], most + OVERSAMPLING, rows.dtype, rows.device)
    root = _root(projected.mT @ projected)
    unit = torch.eye(root.shape[2], dtype=root.dtype, device=root.device)
    fewer: Tensor = torch.linalg.solve_triangular(root, unit, upper=False) @ (projected.mT @ rows)
    return fewer


def _root(gram: Tensor) -> Tensor:
    """Return a triangular L with L L^T = gram, to rounding; what is added in place lets directions of no length pass."""
    info = torch.finfo(gram.dtype)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.sum(1, keepdim=True), alpha=gram.shape[2] * info.eps).add_(info.tiny)
    lower: Tensor = torch.linalg.cholesky_ex(gram).L
    return lower


@lru_cache(maxsize=64)
def probe(size: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a random (size, width) matrix, the same in every process."""
    blocks = [
        torch.randn(BLOCK, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in range(-(-size // BLOCK))
    ]
    return torch.cat(blocks)[:size].to(device, dtype)
