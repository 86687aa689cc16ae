"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from rwalk.anchors.base import Anchor
from rwalk.distributed.shards import local, sharded
from rwalk.kernels import PostStepRow

BLOCKS = [2**n for n in range(4, 14)]
"""How many elements may share a scale where a moment is kept in eight bits."""
STEP_COUNTS = ("step", "t", "k")
"""Under which names optimisers count their steps, for each parameter or for a group."""
CORRECTIONS = ("use_bias_correction", "bias_correction", "correct_bias")
"""How optimisers call the choice of whether the second moment is corrected for its start at zero."""
UNLIKE_ADAM = ("lamb", "soap", "adamod", "adai", "avagrad", "padam", "exadam", "conda", "magma", "adatam")
"""Parts of the names of optimisers that keep Adam's second moment, and give their steps another length."""


def drawn(
    rows: Mapping[str, PostStepRow], optimizer: Optimizer, anchor: Anchor, strength: float, parameters: Mapping[str, Tensor]
) -> dict[str, PostStepRow]:
    """Add the pull of parameters that have just moved to what is done after the step: theta <- (theta + w * point) / (1 + w).

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
        beta: the decay of Adam's second moment, 0 where that is not corrected; None for an optimiser without.
        eps: what Adam adds to the root of its second moment.
        count: the steps that have been made, for an optimiser that counts them by group.
        unit: what the gradients in the second moment were multiplied by.
    """

    rate: float
    momentum: float
    beta: float | None
    eps: float
    count: Any = None
    unit: float = 1.0

    @classmethod
    def of(cls, optimizer: Optimizer, group: dict[str, Any]) -> "Metric":
        """Read a group's."""
        lr, momentum, count = rate(group), _momentum(optimizer, group), _first(group, STEP_COUNTS)
        if not _adaptive(optimizer, group):
            return cls(lr, momentum, None, 0.0)
        beta = 0.0 if _first(group, CORRECTIONS) is False else float(group["betas"][1])
        unit = float(group["d"]) if "d_coef" in group else 1.0  # Prodigy averages the squares of d * gradient
        return cls(lr, momentum, beta, float(group["eps"]), count, unit)

    def known(self, state: Mapping[str, Any], parameter: Tensor) -> tuple[Any, Tensor | None]:
        """Return the steps made and the second moment that a parameter's step is divided by, None if either is unknown."""
        if self.beta is None:
            return None, None
        count = _first(state, STEP_COUNTS)
        count = self.count if count is None else count
        return count, None if count is None else _second_moment(state, parameter)

    def fill(self, row: PostStepRow, optimizer: Optimizer, parameter: Tensor, factor: float) -> PostStepRow:
        """Fill it in; a count of steps that a GPU has is not waited for."""
        count, second = self.known(optimizer.state.get(parameter, {}), parameter)
        if second is None or self.beta is None:
            return row._replace(step=factor * self.rate / (1 - self.momentum))
        there = isinstance(count, Tensor) and not count.is_cpu
        correction = self.beta if there else 1 - self.beta ** float(count)
        step, eps = factor * self.rate * self.unit, self.eps * self.unit
        return row._replace(second=second, step=step, correction=correction, eps=eps, made=count if there else None)


def _first(settings: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first of some settings that is there, None if none is."""
    for name in names:
        if name in settings:
            return settings[name]
    return None


def _adaptive(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a group has the settings of the Adam family, in an optimiser that makes Adam's steps of them."""
    betas, name = group.get("betas"), type(optimizer).__name__.lower()
    pair = isinstance(betas, Sequence) and len(betas) == 2  # with three, as in Adan and AdEMAMix, it depends which is whose
    return pair and isinstance(group.get("eps"), Real | Tensor) and not any(other in name for other in UNLIKE_ADAM)


def _searches(group: Mapping[str, Any]) -> bool:
    """Return whether a group multiplies its learning rate by a `d` that its optimiser finds, as D-Adaptation does."""
    return "d" in group and "growth_rate" in group


def _second_moment(state: Mapping[str, Any], theta: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimiser of the Adam family divides by.

    It is called `exp_avg_sq` in PyTorch and torchao, and `state2` in bitsandbytes; the last two may have it in eight bits.
    """
    second = _first(state, ("max_exp_avg_sq", "exp_avg_sq", "state2"))
    if not isinstance(second, Tensor) or second.shape != theta.shape:
        return None
    if second.dtype is torch.uint8:
        return _from_eight_bits(second, state.get("qmap2"), state.get("absmax2"))
    if type(second) is Tensor:
        return second
    if sharded(second):
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
    """Return whether an optimiser scales steps in a way that is not known here, so that lr alone is taken for some parameters.

    Those of PyTorch are known: where they do not divide by a second moment, lr is what the documentation says.
    """
    return not _of_pytorch(optimizer) and not all(_recognised(optimizer) or [False])


def _of_pytorch(optimizer: Optimizer) -> bool:
    """Return whether an optimiser steps as one of PyTorch does; the momentum of any SGD is known."""
    own = next(kind for kind in type(optimizer).__mro__ if "step" in vars(kind))
    return isinstance(optimizer, SGD) or own.__module__.startswith("torch.optim")


def _recognised(optimizer: Optimizer) -> list[bool]:
    """Tell for each parameter that has moved whether Adam's second moment is known of it."""
    groups = [(Metric.of(optimizer, group), group["params"]) for group in optimizer.param_groups]
    held = [(metric, p) for metric, parameters in groups for p in parameters if optimizer.state.get(p)]
    return [metric.known(optimizer.state[p], p)[1] is not None for metric, p in held]


def warn_unknown(optimizer: Optimizer) -> None:
    """Warn that the proximal pull does not know an optimiser's steps."""
    kind = type(optimizer).__name__
    warnings.warn(
        f"The proximal pull does not know how `{kind}` scales each weight's step. Where it does not know, it takes the "
        "learning rate alone for the step, 0 if there is none, so the strength means something else than under Adam: tune "
        'it, or pass `pull="gradient"`.',
        stacklevel=6,
    )


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return float(group["momentum"]) if isinstance(optimizer, SGD) else 0.0


def rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group as its optimiser has warmed it up or found it, 0 where there is none."""
    return float(group.get("scheduled_lr", group.get("lr")) or 0.0) * float(group["d"] if _searches(group) else 1.0)


def metric(optimizer: Optimizer, whole_layers: bool = False) -> str:
    """Name the metric of the pull under an optimiser, for anchors that hold whole layers or not."""
    groups = optimizer.param_groups
    lr = "d * lr" if any(map(_searches, groups)) else "lr"
    doubt = f", as far as is known of `{type(optimizer).__name__}`" if unknown(optimizer) else ""
    if any(_recognised(optimizer)) or isinstance(optimizer, Adam | AdamW | NAdam):
        doubt = f"{doubt}, otherwise {lr}" if doubt else ""
        return f"{lr} / (sqrt(v) + eps), per coordinate" + ", but one mean for each layer" * whole_layers + doubt
    return (f"{lr} / (1 - momentum)" if any(_momentum(optimizer, group) for group in groups) else lr) + doubt
