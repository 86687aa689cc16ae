"""Every elementwise formula of the library, one tensor at a time and in the letters of the papers: the specification.

Arguments of one call have one shape. Names ending in an underscore write into their first state tensors; state is never of
lower precision than the parameter, so gradients and parameters are converted where they meet state.
"""

from torch import Tensor


def trace_(theta: Tensor, grad: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """Extend the path integral: path += (g - g_previous) * (theta - mark), then remember g.

    Summed over a stretch and closed by `close_`, this telescopes to the sum of -g_t * (theta_{t+1} - theta_t) (equation 7)
    without a copy of the parameters from before the step.
    """
    path.addcmul_(grad - previous, theta - mark)
    previous.copy_(grad)


def close_(theta: Tensor, path: Tensor, mark: Tensor, previous: Tensor) -> None:
    """End a stretch of the path: path -= g_previous * (theta - mark), so that it holds the whole path integral."""
    path.addcmul_(previous, theta - mark, value=-1)
    previous.zero_()


def square_(fisher: Tensor, grad: Tensor, weight: float) -> None:
    """Move the running Fisher information towards a new squared gradient: F <- weight * g^2 + (1 - weight) * F (equation 6)."""
    g = grad.to(fisher.dtype)
    fisher.mul_(1 - weight).addcmul_(g, g, value=weight)


def walk_(theta: Tensor, grad: Tensor, fisher: Tensor, path: Tensor, mark: Tensor, previous: Tensor, weight: float) -> None:
    """Take one step of Riemannian Walk into account: `trace_` and `square_` in one visit of the gradient."""
    trace_(theta, grad, path, mark, previous)
    square_(fisher, grad, weight)


def blend_(average: Tensor, value: Tensor, weight: float) -> None:
    """Move a running average towards a new value: average <- weight * value + (1 - weight) * average."""
    average.mul_(1 - weight).add_(value, alpha=weight)


def settle_(theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, previous: Tensor, eps: float) -> Tensor:
    """End a window: s <- s + path / (F * (theta - mark)^2 / 2 + eps), then start a new one at theta (equation 7).

    Returns in how many elements the squared Riemannian distance, F * (theta - mark)^2 / 2, exceeded eps: a scalar.
    """
    close_(theta, path, mark, previous)
    moved = theta - mark
    distance = moved.mul_(moved).mul_(fisher).mul_(0.5)
    far = (distance > eps).sum()
    score.addcdiv_(path, distance.add_(eps))
    path.zero_()
    mark.copy_(theta)
    return far


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
    _approach_(theta, point, (omega * step).reciprocal_())


def draw_scaled_(
    theta: Tensor, point: Tensor, omega: Tensor, second: Tensor, step: float, correction: float, eps: float
) -> None:
    """Move towards the anchor in Adam's metric: as `draw_`, with w = step * omega / (sqrt(second / correction) + eps)."""
    _approach_(theta, point, (second / correction).sqrt_().add_(eps).div_(omega * step))


def _approach_(theta: Tensor, point: Tensor, inverse: Tensor) -> None:
    """Go 1 / (1 + inverse) of the way from theta to the point; `inverse` is used up."""
    way = inverse.add_(1).reciprocal_()
    theta.lerp_(point.to(theta.dtype), way.to(theta.dtype))


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar (equation 8 without its strength)."""
    moved = theta - point
    return moved.mul_(moved).mul_(omega).sum()
