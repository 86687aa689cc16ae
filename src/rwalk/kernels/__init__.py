"""The one seam between the library and its arithmetic: typed functions over lists of tensors, forwarded to a backend.

Lists of one call run in parallel: the i-th entries belong together and share a shape. The formulas stand in `reference`.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from rwalk._errors import explain
from rwalk.kernels import blocked, reference

Tensors = Sequence[Tensor]
BACKENDS: dict[str, ModuleType] = {"reference": reference, "blocked": blocked}
_backend: ModuleType = blocked


def use(name: str) -> None:
    """Choose the backend of this process: "blocked" (the default), "reference", or "auto" for the best one here."""
    global _backend
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            explain(f"backend `{name}`", f"one of auto, {', '.join(BACKENDS)}", "Pass one of these names to `kernels.use`.")
        )
    _backend = BACKENDS.get(name, blocked)


def current() -> str:
    """Return the name of the backend in use."""
    return next(name for name, backend in BACKENDS.items() if backend is _backend)


def walk_(
    theta: Tensors,
    grad: Tensors,
    fisher: Tensors,
    path: Tensors,
    mark: Tensors,
    previous: Tensors,
    weights: Iterable[float],
) -> None:
    """Extend the path and the running Fisher information by one step; `weights` holds the new square's share per tensor."""
    for args in zip(theta, grad, fisher, path, mark, previous, weights, strict=True):
        _backend.walk_(*args)


def trace_(theta: Tensors, grad: Tensors, path: Tensors, mark: Tensors, previous: Tensors) -> None:
    """Extend the path integral by one step."""
    for args in zip(theta, grad, path, mark, previous, strict=True):
        _backend.trace_(*args)


def close_(theta: Tensors, path: Tensors, mark: Tensors, previous: Tensors) -> None:
    """End a stretch of the path where the parameters are now."""
    for args in zip(theta, path, mark, previous, strict=True):
        _backend.close_(*args)


def square_(fisher: Tensors, grad: Tensors, weights: Iterable[float]) -> None:
    """Move the running Fisher information towards new squared gradients."""
    for args in zip(fisher, grad, weights, strict=True):
        _backend.square_(*args)


def blend_(average: Tensors, value: Tensors, weights: Iterable[float]) -> None:
    """Move running averages towards new values."""
    for args in zip(average, value, weights, strict=True):
        _backend.blend_(*args)


def settle_(
    theta: Tensors, fisher: Tensors, path: Tensors, score: Tensors, mark: Tensors, previous: Tensors, eps: float
) -> int:
    """End a window of Riemannian Walk: turn its path into score and start the next window where the parameters are now.

    Returns for how many elements the squared Riemannian distance exceeded eps.
    """
    far = [_backend.settle_(*args, eps) for args in zip(theta, fisher, path, score, mark, previous, strict=True)]
    return int(torch.stack([count.to(far[0].device) for count in far]).sum()) if far else 0


def account_(total: Tensors, path: Tensors, start: Tensors, theta: Tensors, xi: float) -> None:
    """Add a task's share of the path integral, path / (move^2 + xi), to an importance."""
    for args in zip(total, path, start, theta, strict=True):
        _backend.account_(*args, xi)


def pull_(grad: Tensors, theta: Tensors, point: Tensors, omega: Tensors, strength: float) -> None:
    """Add the gradient of the penalty, 2 * strength * omega * (theta - point), to gradients."""
    for args in zip(grad, theta, point, omega, strict=True):
        _backend.pull_(*args, strength)


def draw_(theta: Tensor, point: Tensor, omega: Tensor, step: float) -> None:
    """Move one parameter towards the anchor: theta <- (theta + w * point) / (1 + w), w = step * omega."""
    _backend.draw_(theta, point, omega, step)


def draw_scaled_(
    theta: Tensor, point: Tensor, omega: Tensor, second: Tensor, step: float, correction: float, eps: float
) -> None:
    """Move one parameter towards the anchor in the metric of Adam, whose second moment is `second` / `correction`."""
    _backend.draw_scaled_(theta, point, omega, second, step, correction, eps)


def penalty(theta: Tensors, point: Tensors, omega: Tensors) -> float | Tensor:
    """Return the sum of omega * (theta - point)^2 over all tensors, a scalar."""
    terms: list[Tensor] = [_backend.penalty(*args) for args in zip(theta, point, omega, strict=True)]
    return sum(terms)
