"""Every elementwise formula of the library, one tensor at a time and in the letters of the papers: the specification.

Arguments of one call have one shape. Names ending in an underscore write into their first state tensors; state is never of
lower precision than the parameter, except `omega` where the user asks for bfloat16, so gradients and parameters are converted
where they meet state. The formulas of a pass serve a list of tensors on a GPU as well (see `foreach`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rwalk.kernels.foreach import above
from rwalk.kernels.passes import PostStepRow, PreStepPass, PreStepRow, counted


def before_step_(rows: Iterable[PreStepRow], step: PreStepPass) -> tuple[list[PreStepRow], list[Tensor]]:
    """Update parameters before a step: see `PreStepPass`. Returns the rows it leaves (none), and `settle_`'s counts."""
    if step.left_out:
        return [], []
    return [], [beyond_eps for row in rows if (beyond_eps := before_step_one_(row, step)) is not None]


def after_step_(rows: Iterable[PostStepRow], skip: Tensor | None = None) -> list[PostStepRow]:
    """Update parameters after a step: see `PostStepRow`. Returns the rows left to do: none."""
    rows = list(rows)
    if rows and skip is not None and bool(skip):
        return []
    for row in counted(rows):
        after_step_one_(row)
    return []


def before_step_one_(row: PreStepRow, step: PreStepPass) -> Tensor | None:
    """Update one parameter, or a piece of it. Returns what `settle_` does, if that was called."""
    beyond_eps = None
    if row.path is not None and row.mark is not None:
        if step.close and row.score is not None and row.fisher is not None:
            beyond_eps = settle_(row.theta, row.fisher, row.path, row.score, row.mark, row.previous, step.eps)
        elif step.close:
            end_stretch_(row.theta, row.path, row.mark, row.previous)
    if row.grad is None:
        return beyond_eps
    g = row.grad if step.scale is None else row.grad.to(torch.promote_types(row.grad.dtype, torch.float32)) / step.scale
    if row.path is not None and row.mark is not None and row.previous is not None:
        if step.close:
            row.previous.copy_(g)  # the path of a stretch that begins here is 0
        else:
            extend_path_(row.theta, g, row.path, row.mark, row.previous)
    if row.fisher is not None:
        if row.squares is None:
            square_(row.fisher, g, row.weight)
        else:
            blend_(row.fisher, row.squares if step.scale is None else row.squares / step.scale**2, row.weight)
    if row.point is not None and row.omega is not None:
        omega = row.omega if step.scale is None else row.omega.to(row.point.dtype) * step.scale
        pull_(row.grad, row.theta, row.point, omega, step.strength)
    return beyond_eps


def after_step_one_(row: PostStepRow) -> None:
    """Draw one parameter towards the anchor and average it."""
    if row.point is not None and row.omega is not None:
        if row.second is None:
            draw_(row.theta, row.point, row.omega, row.step)
        else:
            draw_scaled_(row.theta, row.point, row.omega, row.second, row.step, row.correction, row.eps)
    if row.average is not None:
        blend_(row.average, row.theta, row.weight)


def extend_path_(theta: Tensor, grad: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """Extend the path integral: path += (g - g_previous) * (theta - mark), then remember g.

    Summed over a stretch and balanced at its end, this telescopes to the sum of -g_t * (theta_{t+1} - theta_t) (equation 7)
    without a copy of the parameters from before the step.
    """
    path.addcmul_(grad - previous, theta - mark)
    previous.copy_(grad)


def finish_path_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """Complete the path integral up to here: path -= g_previous * (theta - mark)."""
    path.addcmul_(previous, theta - mark, value=-1)
    previous.zero_()


def end_stretch_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor | None) -> None:
    """End a stretch of the path, and begin a new one at theta."""
    if previous is not None:
        finish_path_(theta, path, mark, previous)
    mark.copy_(theta)


def rest_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor, skip: Tensor | None) -> None:
    """Complete the path integral up to here, and store theta in place of the gradient of the last step.

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
    end_stretch_(theta, path, mark, previous)
    distance = moved.mul_(moved).mul_(fisher).mul_(0.5)
    score.addcdiv_(path, distance + eps)
    beyond_eps: Tensor = above(path, distance, eps).sum(dtype=torch.float64).long()
    path.zero_()
    return beyond_eps


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
