"""Directions of a model's output: the gradient of a random one, and whether that of the output itself says anything."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rwalk._parameters import state_dtype
from rwalk.gradients.independence import precision


def output_rows(z: Tensor, size: int = 1) -> Tensor:
    """Return outputs as one row for each of `size` examples, in state precision; a masked class is no output."""
    return z.masked_fill(z == -torch.inf, 0).to(state_dtype(z)).reshape(size, -1)


def random_scores(z: Tensor, size: int) -> Tensor:
    """Return the inner product of each example's output z with random signs v, of shape (size, 1).

    As E[v v^T] is the identity, the square of its gradient has the mean diag(J^T J). Normal numbers would have the same mean
    and a larger variance; with signs a single output is exact.
    """
    rows = output_rows(z, size)
    return torch.where(torch.rand_like(rows) < 0.5, -rows, rows).sum(1, keepdim=True)


def refuse_constant_norm(z: Tensor, together: Tensor, size: int, parameters: Iterable[Tensor]) -> None:
    """Raise a ValueError if the squared norm of an output has no gradient, as that of normalised embeddings.

    Args:
        z: the output for one example, with its graph.
        together: the outputs for `size` examples.
        size: how many these are.
        parameters: the parameters of the model.
    """
    row, norms = output_rows(z), output_rows(together.detach(), size).norm(dim=1)
    exact, trained = precision([z, together]) ** 0.5, [p for p in parameters if p.requires_grad]
    if row.numel() < 2 or not norms.min() > (1 - exact) * norms.max() or not row.requires_grad or not trained:
        return
    signs = torch.ones_like(row)
    signs[:, ::2] = -1
    along = signs * row.detach().norm() / row.numel() ** 0.5
    if _size(row, row.detach(), trained) <= exact * _size(row, along, trained):
        raise ValueError(
            "The model's outputs have the same norm for every example, as normalised embeddings have. MAS measures how weights "
            'change the norm, so it would hold nothing. Use `EWC(labels="output")`, which measures how they change the output '
            "in any direction, or pass `logits=` that reads the output before it is normalised."
        )


def _size(row: Tensor, along: Any, parameters: list[Tensor]) -> float:
    """Return the norm of the gradient of the output along a direction."""
    found = torch.autograd.grad(row, parameters, along, retain_graph=True, allow_unused=True)
    parts = [(g.to_dense() if g.is_sparse else g).double().norm() for g in found if g is not None]
    return float(torch.stack([part.cpu() for part in parts]).norm()) if parts else 0.0
