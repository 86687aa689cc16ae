"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from rwalk import kernels
from rwalk.anchor import Anchor


def draw(
    optimizer: Optimizer, theta: Mapping[str, nn.Parameter], moved: Collection[str], anchor: Anchor, strength: float
) -> None:
    """Move theta to (theta + w * point) / (1 + w), with w = 2 * m * strength * omega and m the optimiser's own metric.

    Args:
        optimizer: the optimiser that has just made its step; m is read from it, group by group.
        theta: the protected parameters by name.
        moved: names of those that took part in the step.
        anchor: where to, and with which importance.
        strength: factor of the penalty.
    """
    names = {id(theta[name]): name for name in moved if name in anchor.point}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None:
                place = (parameter, anchor.point[name], anchor.omega[name])
                _draw_one(optimizer, group, *place, 2 * strength * rate(group))


def _draw_one(optimizer: Optimizer, group: dict[str, Any], theta: Tensor, point: Tensor, omega: Tensor, step: float) -> None:
    """Draw one parameter in the metric of its group: Adam's per coordinate, that of momentum, or the learning rate."""
    second = _second_moment(optimizer, group, theta)
    if second is not None:
        correction = 1 - float(group["betas"][1]) ** float(optimizer.state[theta]["step"])
        kernels.draw_scaled_(theta, point, omega, second, step, correction, float(group["eps"]))
    else:
        kernels.draw_(theta, point, omega, step / (1 - _momentum(optimizer, group)))


def _second_moment(optimizer: Optimizer, group: dict[str, Any], theta: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimiser of the Adam family divides by."""
    state = optimizer.state.get(theta, {})
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    fits = isinstance(second, Tensor) and second.shape == theta.shape and "betas" in group and "step" in state
    return second if fits else None


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return float(group["momentum"]) if isinstance(optimizer, SGD) else 0.0


def rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group, 0 for an optimiser that has none."""
    return float(group.get("lr") or 0.0)


def metric(optimizer: Optimizer) -> str:
    """Say in which metric `draw` works under an optimiser."""
    groups = optimizer.param_groups
    known = any(_second_moment(optimizer, group, p) is not None for group in groups for p in group["params"])
    if known or isinstance(optimizer, Adam | AdamW | NAdam):
        return "lr / (sqrt(v) + eps), per coordinate"
    return "lr / (1 - momentum)" if any(_momentum(optimizer, group) for group in groups) else "lr"
