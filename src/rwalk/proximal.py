"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from rwalk._errors import explain
from rwalk.anchor import Anchor
from rwalk.kernels import After
from rwalk.parallel import local, sharded

BLOCKS = [2**n for n in range(4, 14)]
"""How many elements may share a scale where a moment is kept in eight bits."""


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
        count: the steps that have been made, for an optimiser that counts them by group.
    """

    rate: float
    momentum: float
    beta: float | None
    eps: float
    count: Any = None

    @classmethod
    def of(cls, optimizer: Optimizer, group: dict[str, Any]) -> "Metric":
        """Read a group's."""
        beta, eps = (float(group["betas"][1]), float(group["eps"])) if _adaptive(group) else (None, 0.0)
        return cls(rate(group), _momentum(optimizer, group), beta, eps, group.get("step"))

    def steps(self, state: Mapping[str, Any]) -> Any:
        """Return how many steps have been made; None if nobody has counted them."""
        return state.get("step", self.count)

    def fill(self, row: After, optimizer: Optimizer, parameter: Tensor, factor: float) -> After:
        """Fill it in; a count of steps that a GPU has is not waited for."""
        state = optimizer.state.get(parameter, {})
        second = _second_moment(state, parameter)
        if second is None or self.beta is None or self.steps(state) is None:
            return After(*row[:5], factor * self.rate / (1 - self.momentum), *row[6:])
        count: Any = self.steps(state)
        there = isinstance(count, Tensor) and not count.is_cpu
        correction = self.beta if there else 1 - self.beta ** float(count)
        return After(
            *row[:3], second, row.average, factor * self.rate, correction, self.eps, row.weight, count if there else None
        )


def _adaptive(group: Mapping[str, Any]) -> bool:
    """Tell whether a group has the settings of the Adam family."""
    return "betas" in group and "eps" in group


def _second_moment(state: Mapping[str, Any], theta: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimiser of the Adam family divides by.

    It is called `exp_avg_sq` in PyTorch and torchao, and `state2` in bitsandbytes; the last two may have it in eight bits.
    """
    second: Any = next((state[name] for name in ("max_exp_avg_sq", "exp_avg_sq", "state2") if name in state), None)
    if not isinstance(second, Tensor) or second.shape != theta.shape:
        return None
    if second.dtype is torch.uint8:
        return _from_eight_bits(second, state.get("qmap2"), state.get("absmax2"))
    if type(second) is Tensor or sharded(second):
        return local(second)
    return second.dequantize()  # of another class, which holds the numbers in fewer bits, as in torchao


def _from_eight_bits(codes: Tensor, values: Tensor | None, largest: Tensor | None) -> Tensor | None:
    """Return what codes mean: each the `values` of its code times the largest of its block; None for other forms."""
    if values is None or largest is None:
        return None
    size = next((n for n in BLOCKS if -(-codes.numel() // n) == largest.numel()), None)
    if size is None:
        return None
    scale = largest.float().repeat_interleave(size)[: codes.numel()].view(codes.shape)
    return values.float()[codes.long()].mul_(scale)


def unknown(optimizer: Optimizer) -> bool:
    """Tell whether an optimiser scales its steps for each weight in a way that is not known here, so that lr alone is taken.

    Those of PyTorch are known: where they do not divide by a second moment, lr is what the documentation says.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return False
    held = [(group, p) for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
    scaled = any("betas" in group or "eps" in group for group, _ in held)
    return scaled and all(_second_moment(optimizer.state[p], p) is None for _, p in held)


def warn_unknown(optimizer: Optimizer) -> None:
    """Warn that the proximal pull does not know an optimiser's steps."""
    kind = type(optimizer).__name__
    warnings.warn(
        explain(
            f"the proximal pull under `{kind}`, whose scaling of each weight's step is not known",
            "SGD, or an optimiser that keeps a second moment as Adam does",
            "The learning rate alone is taken for the step, so the strength means something else than under Adam: tune it, or "
            'pass `pull="gradient"`.',
        ),
        stacklevel=5,
    )


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
