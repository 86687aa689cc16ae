"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    metrics: dict[int, Metric] = {}
    for group in optimizer.param_groups:
        metrics |= dict.fromkeys(map(id, group["params"]), Metric.of(optimizer, group))
    held = {
        name: metrics[id(parameters[name])].fill(row, optimizer, parameters[name], 2 * strength)
        for name, row in rows.items()
        if name in anchor.point
    }
    return {**rows, **anchor.draw(held)}


class Metric(NamedTuple):
    """In which metric the parameters of an optimiser's group are drawn.

    Args:
        rate: the learning rate.
        momentum: that of SGD.
        beta: Adam's second beta; None for an optimiser without.
        eps: what Adam adds to the root of its second moment.
    """

    rate: float
    momentum: float
    beta: float | None
    eps: float

    @classmethod
    def of(cls, optimizer: Optimizer, group: dict[str, Any]) -> "Metric":
        """Read a group's."""
        beta, eps = (float(group["betas"][1]), float(group["eps"])) if _adaptive(group) else (None, 0.0)
        return cls(rate(group), _momentum(optimizer, group), beta, eps)

    def fill(self, row: After, optimizer: Optimizer, parameter: Tensor, factor: float) -> After:
        """Fill it in; a count of steps that a GPU has is not waited for."""
        state = optimizer.state.get(parameter, {})
        second = _second_moment(state, parameter)
        if second is None or self.beta is None:
            return After(*row[:5], factor * self.rate / (1 - self.momentum), *row[6:])
        count = state["step"]
        there = isinstance(count, Tensor) and not count.is_cpu
        correction = self.beta if there else 1 - self.beta ** float(count)
        return After(
            *row[:3], second, row.average, factor * self.rate, correction, self.eps, row.weight, count if there else None
        )


def _adaptive(group: Mapping[str, Any]) -> bool:
    """Tell whether a group has the settings of the Adam family."""
    return "betas" in group and "eps" in group


def _second_moment(state: Mapping[str, Any], theta: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimiser of the Adam family divides by."""
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    fits = isinstance(second, Tensor) and second.shape == theta.shape and "step" in state
    return local(second) if fits else None


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return float(group["momentum"]) if isinstance(optimizer, SGD) else 0.0


def rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group, 0 for an optimiser that has none."""
    return float(group.get("lr") or 0.0)


def metric(optimizer: Optimizer, layered: bool = False) -> str:
    """Say in which metric `drawn` works under an optimiser, for anchors that hold whole layers or not."""
    groups = optimizer.param_groups
    adaptive = [p for group in groups if _adaptive(group) for p in group["params"]]
    known = any(_second_moment(optimizer.state.get(p, {}), p) is not None for p in adaptive)
    if known or isinstance(optimizer, Adam | AdamW | NAdam):
        return "lr / (sqrt(v) + eps), per coordinate" + ", but one mean for each layer" * layered
    return "lr / (1 - momentum)" if any(_momentum(optimizer, group) for group in groups) else "lr"
