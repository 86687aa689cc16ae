"""Directions of a model's output: the gradient of a random one, and whether that of the output itself says anything."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rwalk._parameters import state_dtype
from rwalk.gradients.independence import precision

FAINT = 1e-3
"""What share of a change is nothing: the `eps` of a LayerNorm leaves less of a change in norm."""


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
    """Raise a ValueError if the squared norm of an output has no gradient in most parameters, as that of normalised embeddings.

    A scale and a shift after the normalisation, as LayerNorm has them, have one, but what lies below them has none.

    Args:
        z: the output for one example, with its graph.
        together: the outputs for `size` examples.
        size: how many these are.
        parameters: the parameters of the model.
    """
    row, norms = output_rows(z), output_rows(together.detach(), size).norm(dim=1)
    exact, trained = max(precision([z, together]) ** 0.5, FAINT), [p for p in parameters if p.requires_grad]
    if row.numel() < 2 or not norms.min() > (1 - exact) * norms.max() or not row.requires_grad or not trained:
        return
    signs = torch.ones_like(row)
    signs[:, ::2] = -1
    along = signs * row.detach().norm() / row.numel() ** 0.5
    in_norm, in_output = (_sizes(row, direction, trained) for direction in (row.detach(), along))
    counts = torch.tensor([p.numel() for p in trained])
    held, moving = (int(counts[which].sum()) for which in (in_norm > exact * in_output, in_output > 0))
    if 2 * held <= moving:
        raise ValueError(
            "The model's outputs have the same norm for every example, as normalised embeddings have. MAS measures how weights "
            'change the norm, so it would hold nothing. Use `EWC(labels="output")`, which measures how they change the output '
            "in any direction, or pass `logits=` that reads the output before it is normalised."
        )


def _sizes(row: Tensor, along: Any, parameters: list[Tensor]) -> Tensor:
    """Return for each parameter the norm of the gradient of the output along a direction."""
    found = torch.autograd.grad(row, parameters, along, retain_graph=True, allow_unused=True)
    parts = [None if g is None else (g.to_dense() if g.is_sparse else g) for g in found]
    return torch.tensor([0.0 if part is None else float(part.double().norm()) for part in parts])
