"""The proximal pull: after the optimiser's step, move towards the anchor by a weighted mean that no strength can overshoot."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from numbers import Real
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from rwalk import kernels
from rwalk._errors import warn
from rwalk.distributed.shards import local, sharded

BLOCKS = [2**n for n in range(4, 14)]
"""How many elements may share a scale where a moment is kept in eight bits."""
STEP_COUNTS = ("step", "t", "k")
"""Under which names optimisers count their steps, for each parameter or for a group."""
CORRECTIONS = ("use_bias_correction", "bias_correction", "correct_bias")
"""How optimisers call the choice of whether the second moment is corrected for its start at zero."""
UNLIKE_ADAM = ("lamb", "soap", "adamod", "adai", "avagrad", "padam", "exadam", "conda", "magma", "adatam")
"""Parts of the names of optimisers that keep Adam's second moment, and give their steps another length."""


class Metrics:
    """Reads in which metric an optimiser's steps are made, for the pull: theta <- (theta + w * point) / (1 + w).

    w is 2 * m * strength * omega, and m the optimiser's own metric: Adam's per coordinate, that of momentum, or the learning
    rate. It is read from the groups; where a parameter's second moment lies is remembered.

    Args:
        optimizer: the optimiser.
        parameters: those that are protected; the optimiser may not know some.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        groups = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group = [groups.get(id(p), 0) for p in self._parameters]
        self._known: list[Tensor] = []

    def read(self, moved: Sequence[bool], factor: float) -> kernels.Metric:
        """Return the metric after a step, for parameters that have moved.

        Args:
            moved: which of them have.
            factor: 2 * strength.
        """
        groups = [GroupMetric.of(self._optimizer, group) for group in self._optimizer.param_groups]
        second, made = self._moments(groups, moved)
        there, correction = _corrections([m.beta or 0.0 for m in groups], self._group, made)
        scaled, along = [m.step(factor) for m in groups], [factor * m.rate * m.reach for m in groups]
        if len(groups) == 1 and not any(map(is_, second, repeat(None))):
            step = scaled * len(second)
        else:
            step = [along[k] if s is None else scaled[k] for k, s in zip(self._group, second, strict=True)]
        each = [m.eps * m.unit for m in groups]
        eps = each * len(second) if len(each) == 1 else [each[k] for k in self._group]
        return kernels.Metric(step, second, eps, correction, there)

    def lengths(self, factor: float) -> list[float]:
        """Return for each parameter `factor` times the length of a step, before it is divided by a second moment."""
        each = [factor * rate(group) * _unit(group) * _reach(self._optimizer, group) for group in self._optimizer.param_groups]
        return each * len(self._group) if len(each) == 1 else [each[k] for k in self._group]

    def _moments(self, groups: Sequence["GroupMetric"], moved: Sequence[bool]) -> tuple[list[Tensor | None], list[Any]]:
        """Return of each parameter the second moment, None where there is none, and the steps made."""
        quick = self._quick(groups, moved)
        if quick is not None:
            return quick
        states = [self._optimizer.state.get(p, {}) if has else {} for p, has in zip(self._parameters, moved, strict=True)]
        rows = zip(self._group, states, self._parameters, strict=True)
        found = [groups[k].known(state, p) for k, state, p in rows]
        return [second for _, second in found], [0 if second is None else count for count, second in found]

    def _quick(self, groups: Sequence["GroupMetric"], moved: Sequence[bool]) -> tuple[list[Any], list[Any]] | None:
        """Look only where PyTorch's Adam keeps its moments; return None if they are not all there, or new."""
        if not all(moved) or any(m.beta is None or m.keeps_largest for m in groups):
            return None
        state = self._optimizer.state
        try:
            mine = [state[p] for p in self._parameters]
            second, made = [s["exp_avg_sq"] for s in mine], [s["step"] for s in mine]
        except KeyError:
            return None
        if len(self._known) != len(second) or not all(map(is_, second, self._known)):
            if not all(type(s) is Tensor and s.shape == p.shape for s, p in zip(second, self._parameters, strict=True)):
                return None
            if any(s.dtype is torch.uint8 for s in second):
                return None
            self._known = second
        return second, made


def _corrections(
    beta: Sequence[float], group: Sequence[int], made: Sequence[Any]
) -> tuple[list[Tensor | None] | None, list[float]]:
    """Return the counts that only a device has, None if there are none, and 1 - beta ** made; beta itself where it has one."""
    counts: Sequence[Any] = made
    tensors = [m for m in made if isinstance(m, Tensor)]
    if tensors and not all(m.is_cpu for m in tensors):
        there = [m if isinstance(m, Tensor) and not m.is_cpu else None for m in made]
        rows = zip(group, made, there, strict=True)
        return there, [beta[k] if t is not None else 1 - beta[k] ** float(m) if m else 1.0 for k, m, t in rows]
    if tensors:
        known = torch.stack(tensors).flatten().tolist()
        counts = known if len(known) == len(made) else [m if not isinstance(m, Tensor) else float(m) for m in made]
    if len(beta) == 1 and len(set(counts)) == 1:
        return None, [1 - beta[0] ** float(counts[0]) if counts[0] else 1.0] * len(counts)
    return None, [1 - beta[k] ** float(n) if n else 1.0 for k, n in zip(group, counts, strict=True)]


class DeferredSteps:
    """The steps of a pull that makes up for several steps of an optimiser, in the metric of the last one.

    Args:
        metrics: reads the optimiser.
        names: of the parameters, in the order of `metrics`.
        lengths: the sum over steps of 2 * strength * learning rate, for those that have moved.
        mean: takes a parameter's part on this rank; returns the mean over all of it that the optimiser moves.
    """

    def __init__(
        self, metrics: Metrics, names: Sequence[str], lengths: Mapping[str, float], mean: Callable[[Tensor], Tensor | float]
    ) -> None:
        self._place = {name: i for i, name in enumerate(names)}
        self._lengths, self._mean = lengths, mean
        self._metric = metrics.read([name in lengths for name in names], 1.0).counted()

    def each(self, name: str) -> Tensor | float:
        """Return the step of each element of a parameter."""
        second, correction, eps = self._of(name)
        if second is None:
            return self._lengths[name]
        denominator: Tensor = (second / correction).sqrt_().add_(eps)
        return self._lengths[name] / denominator

    def mean(self, name: str) -> Tensor | float:
        """Return one number for all of a parameter, from the mean of Adam's denominators; no device is waited for."""
        second, correction, eps = self._of(name)
        if second is None:
            return self._lengths[name]
        denominator: Tensor | float = self._mean(second.sqrt()) / correction**0.5 + eps
        return self._lengths[name] / denominator

    def _of(self, name: str) -> tuple[Tensor | None, Any, float]:
        """Return a parameter's second moment, None if it has none, by what to divide it, and what to add to its root."""
        i = self._place[name]
        return self._metric.second[i], self._metric.correction[i], self._metric.eps[i]


class GroupMetric(NamedTuple):
    """In which metric the parameters of an optimiser's group are drawn.

    Args:
        rate: the learning rate.
        reach: how many times the learning rate a steady step is long, under SGD's momentum.
        beta: the decay of Adam's second moment, 0 where that is not corrected; None for an optimiser without.
        eps: what Adam adds to the root of its second moment.
        count: the steps that have been made, for an optimiser that counts them by group.
        unit: what the gradients in the second moment were multiplied by.
        keeps_largest: whether the largest second moment so far is divided by.
    """

    rate: float
    reach: float
    beta: float | None
    eps: float
    count: Any = None
    unit: float = 1.0
    keeps_largest: bool = False

    @classmethod
    def of(cls, optimizer: Optimizer, group: dict[str, Any]) -> "GroupMetric":
        """Read a group's."""
        lr, reach, count = rate(group), _reach(optimizer, group), _first(group, STEP_COUNTS)
        if not _adaptive(optimizer, group):
            return cls(lr, reach, None, 0.0)
        beta = 0.0 if _first(group, CORRECTIONS) is False else float(group["betas"][1])
        return cls(lr, reach, beta, float(group["eps"]), count, _unit(group), bool(group.get("amsgrad")))

    def known(self, state: Mapping[str, Any], parameter: Tensor) -> tuple[Any, Tensor | None]:
        """Return the steps made and the second moment that a parameter's step is divided by, None if either is unknown."""
        if self.beta is None:
            return None, None
        count = _first(state, STEP_COUNTS)
        count = self.count if count is None else count
        return count, None if count is None else _second_moment(state, parameter)

    def step(self, factor: float) -> float:
        """Return the length of a pull before it is divided by the root of the second moment."""
        return factor * self.rate * self.unit


def _unit(group: Mapping[str, Any]) -> float:
    """Return what the gradients in a second moment were multiplied by: Prodigy averages the squares of d * gradient."""
    return float(group["d"]) if "d_coef" in group else 1.0


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
    groups = [(GroupMetric.of(optimizer, group), group["params"]) for group in optimizer.param_groups]
    held = [(metric, p) for metric, parameters in groups for p in parameters if optimizer.state.get(p)]
    return [metric.known(optimizer.state[p], p)[1] is not None for metric, p in held]


def warn_unknown(optimizer: Optimizer, whole_layers: bool) -> None:
    """Warn that the proximal pull does not know an optimiser's steps; whole layers have no other pull."""
    kind, remedy = type(optimizer).__name__, "it" if whole_layers else 'it, or pass `pull="gradient"`'
    warn(
        f"The proximal pull does not know how `{kind}` scales each weight's step. Where it does not know, it takes the "
        "learning rate alone for the step, 0 if there is none, so the strength means something else than under Adam: tune "
        f"{remedy}."
    )


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return float(group["momentum"]) if isinstance(optimizer, SGD) else 0.0


def _dampening(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return what SGD's momentum leaves out of each gradient."""
    return float(group["dampening"]) if _momentum(optimizer, group) else 0.0


def _reach(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return (1 - _dampening(optimizer, group)) / (1 - _momentum(optimizer, group))


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
    damped = " * (1 - dampening)" if any(_dampening(optimizer, group) for group in groups) else ""
    return (f"{lr}{damped} / (1 - momentum)" if any(_momentum(optimizer, group) for group in groups) else lr) + doubt
