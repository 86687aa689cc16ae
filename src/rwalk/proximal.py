"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from rwalk.anchor import Anchor
from rwalk.kernels import After
from rwalk.parallel import local


def drawn(
    rows: Mapping[str, After], optimizer: Optimizer, anchor: Anchor, strength: float, parameters: Mapping[str, Tensor]
) -> dict[str, After]:
    """Have the visits of parameters that have just moved draw them to (theta + w * point) / (1 + w).

    w is 2 * m * strength * omega, with m the optimiser's own metric: Adam's per coordinate, that of momentum, or the learning
    rate.

    Args:
        rows: what is done to each parameter after the step, by name.
        optimizer: the optimiser that has just made its step; m is read from it, group by group.
        anchor: where to, and with which importance.
        strength: factor of the penalty.
        parameters: those that the optimiser knows, by name.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = {
        name: _drawn(row, optimizer, parameters[name], groups[id(parameters[name])], strength)
        for name, row in rows.items()
        if name in anchor.point
    }
    return {**rows, **anchor.draw(held)}


def _drawn(row: After, optimizer: Optimizer, parameter: Tensor, group: dict[str, Any], strength: float) -> After:
    """Fill in the metric of a parameter's group."""
    step = 2 * strength * rate(group)
    second = _second_moment(optimizer, group, parameter)
    if second is None:
        return row._replace(step=step / (1 - _momentum(optimizer, group)))
    correction = 1 - float(group["betas"][1]) ** float(optimizer.state[parameter]["step"])
    return row._replace(second=second, step=step, correction=correction, eps=float(group["eps"]))


def _second_moment(optimizer: Optimizer, group: dict[str, Any], theta: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimiser of the Adam family divides by."""
    state = optimizer.state.get(theta, {})
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    fits = isinstance(second, Tensor) and second.shape == theta.shape and "betas" in group and "step" in state
    return local(second) if fits else None


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return float(group["momentum"]) if isinstance(optimizer, SGD) else 0.0


def rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group, 0 for an optimiser that has none."""
    return float(group.get("lr") or 0.0)


def metric(optimizer: Optimizer, layered: bool = False) -> str:
    """Say in which metric `drawn` works under an optimiser, for anchors that hold whole layers or not."""
    groups = optimizer.param_groups
    known = any(_second_moment(optimizer, group, p) is not None for group in groups for p in group["params"])
    if known or isinstance(optimizer, Adam | AdamW | NAdam):
        return "lr / (sqrt(v) + eps), per coordinate" + ", but one mean for each layer" * layered
    return "lr / (1 - momentum)" if any(_momentum(optimizer, group) for group in groups) else "lr"
