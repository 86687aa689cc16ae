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


def settle_(theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, previous: Tensor, eps: float) -> None:
    """End a window: s <- s + path / (F * (theta - mark)^2 / 2 + eps), then start a new one at theta (equation 7)."""
    close_(theta, path, mark, previous)
    moved = theta - mark
    distance = moved.mul_(moved).mul_(fisher).mul_(0.5)
    score.addcdiv_(path, distance.add_(eps))
    path.zero_()
    mark.copy_(theta)


def pull_(grad: Tensor, theta: Tensor, point: Tensor, omega: Tensor, strength: float) -> None:
    """Add the gradient of the penalty: grad += 2 * strength * omega * (theta - point) (equation 8)."""
    grad.addcmul_(omega, theta - point, value=2 * strength)


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar (equation 8 without its strength)."""
    moved = theta - point
    return moved.mul_(moved).mul_(omega).sum()
