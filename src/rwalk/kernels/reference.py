"""Every elementwise formula of the library, one row at a time and in the letters of the papers: the specification.

Tensors of one call have one shape. Names ending in an underscore write into their first state tensors; state is never of
lower precision than the parameter, except `omega` where the user asks for bfloat16, so gradients and parameters are converted
where they meet state. The formulas serve a list of tensors on a GPU as well (see `foreach`).
"""

import torch
from torch import Tensor

from rwalk.kernels.foreach import above, differ
from rwalk.kernels.passes import AfterRow, BeforeRow


def before_row_(row: BeforeRow, scale: Tensor | None = None) -> bool:
    """Update one row before a step: see `BeforeStep`. Returns whether something has moved it since the last one, if asked."""
    moved = row.last is not None and differ(row.theta, row.last)
    if row.grad is None:
        return moved
    g = row.grad if scale is None else row.grad.to(torch.promote_types(row.grad.dtype, torch.float32)) / scale
    if row.previous is not None:
        row.previous.copy_(g)
    elif row.fisher is not None:
        _inform_(row.fisher, g, row.squares, row.weight, scale)
    if row.point is not None and row.strength:
        omega = row.omega if scale is None else row.omega.to(row.point.dtype) * scale
        pull_(row.grad, row.theta, row.point, omega, row.strength)
    return moved


def after_row_(row: AfterRow, close: bool = False, scale: Tensor | None = None) -> Tensor | None:
    """Update one row after a step: see `AfterStep`. Returns what `settle_` does, where a window ended."""
    if row.step and row.point is not None:
        if row.second is None:
            draw_(row.theta, row.point, row.omega, row.step)
        else:
            draw_scaled_(row.theta, row.point, row.omega, row.second, row.step, row.correction, row.adam_eps)
    if row.share and row.average is not None:
        blend_(row.average, row.theta, row.share)
    if row.previous is None:
        return None
    if row.fisher is not None:
        _inform_(row.fisher, row.previous, row.squares, row.weight, scale)
    extend_path_(row.theta, row.previous, row.path, row.last)
    return settle_(row.theta, row.fisher, row.path, row.score, row.mark, row.eps) if close else None


def extend_path_(theta: Tensor, grad: Tensor, path: Tensor, last: Tensor) -> None:
    """Add the optimiser's move to the path integral, -g * (theta - last) (equation 7), and remember where it ended."""
    path.addcmul_(grad, theta - last, value=-1)
    last.copy_(theta)


def settle_(theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, eps: float) -> Tensor:
    """End a window: s <- s + path / (F * (theta - mark)^2 / 2 + eps), then start a new one at theta (equation 7).

    Returns in how many elements the squared Riemannian distance, F * (theta - mark)^2 / 2, exceeded eps: a scalar.
    """
    moved = theta - mark
    distance = moved.mul_(moved).mul_(fisher).mul_(0.5)
    score.addcdiv_(path, distance + eps)
    beyond_eps: Tensor = above(path, distance, eps).sum(dtype=torch.float64).long()
    path.zero_()
    mark.copy_(theta)
    return beyond_eps


def _inform_(fisher: Tensor, grad: Tensor, squares: Tensor | None, weight: float, scale: Tensor | None) -> None:
    """Take a gradient, or the mean square of per-example gradients, into the Fisher information."""
    if squares is None:
        square_(fisher, grad, weight)
    else:
        blend_(fisher, squares if scale is None else squares / scale**2, weight)


def square_(fisher: Tensor, grad: Tensor, weight: float) -> None:
    """Move the running Fisher information towards a new squared gradient: F <- weight * g^2 + (1 - weight) * F (equation 6)."""
    g = grad.to(fisher.dtype)
    fisher.mul_(1 - weight).addcmul_(g, g, value=weight)


def blend_(average: Tensor, value: Tensor, weight: float) -> None:
    """Move a running average towards a new value: average <- weight * value + (1 - weight) * average."""
    average.mul_(1 - weight).add_(value, alpha=weight)


def add_si_importance_(total: Tensor, path: Tensor, start: Tensor, theta: Tensor, xi: float) -> None:
    """Add a task's share of the path integral: total += relu(path / ((theta - start)^2 + xi)) (Zenke et al. 2017, eq. 5)."""
    moved = theta - start
    total.add_(path.div(moved.mul_(moved).add_(xi)).clamp_(min=0))


def pull_(grad: Tensor, theta: Tensor, point: Tensor, omega: Tensor, strength: float) -> None:
    """Add the gradient of the penalty: grad += 2 * strength * omega * (theta - point) (equation 8)."""
    grad.addcmul_(omega, theta - point, value=2 * strength)


def draw_(theta: Tensor, point: Tensor, omega: Tensor, step: float) -> None:
    """Move towards the anchor, stably for every step: theta <- (theta + w * point) / (1 + w) with w = step * omega."""
    _approach_(theta, point, share_of_way_((omega.to(point.dtype) * step).reciprocal_()))


def draw_scaled_(
    theta: Tensor, point: Tensor, omega: Tensor, second: Tensor, step: float, correction: float, eps: float
) -> None:
    """Move towards the anchor in Adam's metric: as `draw_`, with w = step * omega / (sqrt(second / correction) + eps)."""
    way = (second.to(point.dtype) / correction).sqrt_().add_(eps)
    _approach_(theta, point, share_of_way_(way.div_(omega.to(point.dtype) * step)))


def share_of_way_(inverse: Tensor) -> Tensor:
    """Turn 1 / w into w / (1 + w), the share of the way to the anchor that the pull goes: exactly 0 at w = 0, 1 at infinity."""
    return inverse.add_(1).reciprocal_()


def _approach_(theta: Tensor, point: Tensor, way: Tensor) -> None:
    theta.lerp_(point.to(theta.dtype), way.to(theta.dtype))


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar (equation 8 without its strength)."""
    moved = theta - point
    return moved.mul_(moved).mul_(omega).sum()
