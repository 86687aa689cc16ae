"""Every elementwise formula of the library, one tensor at a time and in the letters of the papers: the specification.

Arguments of one call have one shape. Names ending in an underscore write into their first state tensors; state is never of
lower precision than the parameter, except `omega` where the user asks for bfloat16, so gradients and parameters are converted
where they meet state. The formulas of a visit serve a list of tensors on a GPU as well (see `many`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rwalk.kernels.many import above
from rwalk.kernels.visits import After, Row, Visit, counted


def visit_(rows: Iterable[Row], visit: Visit) -> tuple[list[Row], list[Tensor]]:
    """Visit parameters before a step: see `Visit`. Returns the rows left to do (none), and counts as `settle_` returns."""
    if visit.left_out:
        return [], []
    return [], [far for row in rows if (far := visit_one_(row, visit)) is not None]


def after_(rows: Iterable[After], skip: Tensor | None = None) -> list[After]:
    """Visit parameters after a step: see `After`. Returns the rows left to do: none."""
    rows = list(rows)
    if rows and skip is not None and bool(skip):
        return []
    for row in counted(rows):
        after_one_(row)
    return []


def visit_one_(row: Row, visit: Visit) -> Tensor | None:
    """Visit one parameter, or a piece of it. Returns what `settle_` does, if that was called."""
    far = None
    if row.path is not None and row.mark is not None:
        if visit.close and row.score is not None and row.fisher is not None:
            far = settle_(row.theta, row.fisher, row.path, row.score, row.mark, row.previous, visit.eps)
        elif visit.close:
            close_(row.theta, row.path, row.mark, row.previous)
    if row.grad is None:
        return far
    g = row.grad if visit.scale is None else row.grad.to(torch.promote_types(row.grad.dtype, torch.float32)) / visit.scale
    if row.path is not None and row.mark is not None and row.previous is not None:
        if visit.close:
            row.previous.copy_(g)  # the path of a stretch that begins here is 0
        else:
            trace_(row.theta, g, row.path, row.mark, row.previous)
    if row.fisher is not None:
        if row.squares is None:
            square_(row.fisher, g, row.weight)
        else:
            blend_(row.fisher, row.squares if visit.scale is None else row.squares / visit.scale**2, row.weight)
    if row.point is not None and row.omega is not None:
        omega = row.omega if visit.scale is None else row.omega.to(row.point.dtype) * visit.scale
        pull_(row.grad, row.theta, row.point, omega, visit.strength)
    return far


def after_one_(row: After) -> None:
    """Draw one parameter towards the anchor and average it."""
    if row.point is not None and row.omega is not None:
        if row.second is None:
            draw_(row.theta, row.point, row.omega, row.step)
        else:
            draw_scaled_(row.theta, row.point, row.omega, row.second, row.step, row.correction, row.eps)
    if row.average is not None:
        blend_(row.average, row.theta, row.weight)


def trace_(theta: Tensor, grad: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """Extend the path integral: path += (g - g_previous) * (theta - mark), then remember g.

    Summed over a stretch and balanced at its end, this telescopes to the sum of -g_t * (theta_{t+1} - theta_t) (equation 7)
    without a copy of the parameters from before the step.
    """
    path.addcmul_(grad - previous, theta - mark)
    previous.copy_(grad)


def balance_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """Have the path hold the whole path integral up to here: path -= g_previous * (theta - mark)."""
    path.addcmul_(previous, theta - mark, value=-1)
    previous.zero_()


def close_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor | None) -> None:
    """End a stretch of the path, and begin a new one at theta."""
    if previous is not None:
        balance_(theta, path, mark, previous)
    mark.copy_(theta)


def rest_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor, skip: Tensor | None) -> None:
    """Have the path hold all of the path integral up to here, and keep theta where the gradient of the last step was.

    Nothing is done where `skip`, one element, is not 0.
    """
    if skip is None:
        path.addcmul_(previous, theta - mark, value=-1)
        previous.copy_(theta)
    else:
        balanced, here = path.addcmul(previous, theta - mark, value=-1), theta.to(previous.dtype)
        path.copy_(torch.where(skip == 0, balanced, path))
        previous.copy_(torch.where(skip == 0, here, previous))


def settle_(
    theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, previous: Tensor | None, eps: float
) -> Tensor:
    """End a window: s <- s + path / (F * (theta - mark)^2 / 2 + eps), then start a new one at theta (equation 7).

    Returns in how many elements the squared Riemannian distance, F * (theta - mark)^2 / 2, exceeded eps: a scalar.
    """
    moved = theta - mark
    close_(theta, path, mark, previous)
    distance = moved.mul_(moved).mul_(fisher).mul_(0.5)
    score.addcdiv_(path, distance + eps)
    far: Tensor = above(path, distance, eps).sum(dtype=torch.float64).long()
    path.zero_()
    return far


def square_(fisher: Tensor, grad: Tensor, weight: float) -> None:
    """Move the running Fisher information towards a new squared gradient: F <- weight * g^2 + (1 - weight) * F (equation 6)."""
    g = grad.to(fisher.dtype)
    fisher.mul_(1 - weight).addcmul_(g, g, value=weight)


def blend_(average: Tensor, value: Tensor, weight: float) -> None:
    """Move a running average towards a new value: average <- weight * value + (1 - weight) * average."""
    average.mul_(1 - weight).add_(value, alpha=weight)


def account_(total: Tensor, path: Tensor, start: Tensor, theta: Tensor, xi: float) -> None:
    """Add a task's share of the path integral: total += relu(path / ((theta - start)^2 + xi)) (Zenke et al. 2017, eq. 5)."""
    moved = theta - start
    total.add_(path.div(moved.mul_(moved).add_(xi)).clamp_(min=0))


def pull_(grad: Tensor, theta: Tensor, point: Tensor, omega: Tensor, strength: float) -> None:
    """Add the gradient of the penalty: grad += 2 * strength * omega * (theta - point) (equation 8)."""
    grad.addcmul_(omega, theta - point, value=2 * strength)


def draw_(theta: Tensor, point: Tensor, omega: Tensor, step: float) -> None:
    """Move towards the anchor, stably for every step: theta <- (theta + w * point) / (1 + w) with w = step * omega.

    The way towards the point, w / (1 + w), is taken as 1 / (1 + 1 / w), which is exact at both ends: 0 at w = 0, 1 at infinity.
    """
    _approach_(theta, point, (omega.to(point.dtype) * step).reciprocal_())


def draw_scaled_(
    theta: Tensor, point: Tensor, omega: Tensor, second: Tensor, step: float, correction: float, eps: float
) -> None:
    """Move towards the anchor in Adam's metric: as `draw_`, with w = step * omega / (sqrt(second / correction) + eps)."""
    way = (second.to(point.dtype) / correction).sqrt_().add_(eps)
    _approach_(theta, point, way.div_(omega.to(point.dtype) * step))


def _approach_(theta: Tensor, point: Tensor, inverse: Tensor) -> None:
    """Go 1 / (1 + inverse) of the way from theta to the point; `inverse` is used up."""
    way = inverse.add_(1).reciprocal_()
    theta.lerp_(point.to(theta.dtype), way.to(theta.dtype))


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar (equation 8 without its strength)."""
    moved = theta - point
    return moved.mul_(moved).mul_(omega).sum()
