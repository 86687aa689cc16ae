"""A-GEM's projection: a step may not raise the loss on stored examples (Chaudhry et al. 2019, eq. 11, arXiv 1812.00420)."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def project_(grad: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Remove from a gradient, in place, its component against a reference gradient.

    With all tensors joined to vectors g and r: g <- g - (g.r / r.r) r where g.r < 0, otherwise g is unchanged.

    Args:
        grad: gradients of the task's loss.
        reference: gradients of the loss on stored examples, of the same shapes.
    """
    inner = torch.stack([(g * r).sum() for g, r in zip(grad, reference, strict=True)]).sum()
    square = torch.stack([r.square().sum() for r in reference]).sum()
    share = torch.where(square > 0, inner / square, 0).clamp(max=0)  # no branch, so that a GPU does not wait
    for g, r in zip(grad, reference, strict=True):
        g.sub_(r * share)
