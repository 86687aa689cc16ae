"""Rules that only ablations need: the diagonal recipe and Riemannian Walk with other units, sums and averages."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rwalk import Kronecker
from rwalk._parameters import zeros
from rwalk.anchors import Anchor, KroneckerAnchor
from rwalk.anchors.held import HeldLayer
from rwalk.anchors.spectrum import Spectrum
from rwalk.rules import Rule, RWalk, Step, TaskEnd
from rwalk.rules._scale import largest_element, mean_element
from rwalk.rules.base import Defaults
from rwalk.rules.kronecker import TaskLengths

Unit = Literal["task", "first", "tensor"]


class FisherSum(NamedTuple):
    """State: the Fisher information of this task, and what its unit needs.

    Args:
        fisher: F.
        seen: how many steps of this task gave the tensor a gradient.
        known: whether an earlier task did.
        tasks: how many tasks that had a step have ended.
        steps: how many steps there were in all tasks together.
        length: how many steps the tasks that have ended took on average; 1 before.
        scale: the mean element after the first task; infinite before.
    """

    fisher: list[Tensor]
    seen: list[int]
    known: list[bool]
    tasks: int = 0
    steps: int = 0
    length: float = 1.0
    scale: float = math.inf


@dataclass(frozen=True)
class RecipeVariant(Rule[FisherSum]):
    """The diagonal recipe with one part of it changed.

    Args:
        alpha: weight of the new squared gradient in a Fisher information that no task's end resets; None for the task's mean.
        accumulate: whether importance is added up over tasks.
        unit: what F is divided by: its mean times the root of the mean number of steps per "task", the mean of the "first"
            task, or the maximum of each "tensor".
    """

    defaults: ClassVar[Defaults] = Defaults(0.1, "proximal", "tail")
    alpha: float | None = None
    accumulate: bool = True
    unit: Unit = "task"

    def init(self, theta: list[Tensor]) -> FisherSum:
        """Start without any gradient seen."""
        return FisherSum(zeros(theta), [0] * len(theta), [False] * len(theta))

    def observe(self, state: FisherSum, step: Step) -> FisherSum:
        """Take the new squared gradient into the Fisher information."""
        counts = zip(state.seen, state.known, strict=True)
        weight = [1 / (n + 1) if self.alpha is None else self.alpha if n or known else 1.0 for n, known in counts]
        step.update(fisher=state.fisher, weight=weight)
        seen = [n + (g is not None) for n, g in zip(state.seen, step.grad, strict=True)]
        return state._replace(seen=seen, steps=state.steps + 1)

    def conclude(self, state: FisherSum, end: TaskEnd) -> tuple[Anchor, FisherSum]:
        """Scale the task's Fisher information and join it with that of earlier tasks."""
        tasks = state.tasks + any(state.seen)
        after = state._replace(tasks=tasks, length=state.steps / tasks if tasks else 1.0)
        if math.isinf(state.scale):
            after = after._replace(scale=mean_element(state.fisher, end.shard_group))
        fade = math.sqrt(state.length / after.length) if self.unit == "task" and state.tasks else 1.0
        earlier = end.earlier()
        omega = []
        for fisher, old, c, n in zip(state.fisher, earlier, self._units(after, end), state.seen, strict=True):
            new = fisher / c
            if old is not None and (self.accumulate or n == 0):
                new = new.add_(old, alpha=fade) if n else old * fade
            omega.append(new)
        known = [k or n > 0 for k, n in zip(state.known, state.seen, strict=True)]
        return end.renew(omega), after._replace(seen=[0] * len(omega), known=known)

    def renew(self, state: FisherSum) -> None:
        """Start the mean of another task."""
        if self.alpha is None and state.fisher:
            torch._foreach_zero_(state.fisher)

    def _units(self, state: FisherSum, end: TaskEnd) -> list[float]:
        """Return what each tensor's Fisher information is divided by."""
        if self.unit == "tensor":
            return [largest_element([fisher], end.shard_group) for fisher in state.fisher]
        if self.unit == "first":
            return [state.scale] * len(state.fisher)
        return [mean_element(state.fisher, end.shard_group) * math.sqrt(state.length)] * len(state.fisher)


class WalkSum(NamedTuple):
    """State: the fields of `Walk`, the Fisher information of earlier tasks, and the units of F and S."""

    fisher: list[Tensor]
    path: list[Tensor]
    score: list[Tensor]
    mark: list[Tensor]
    last: list[Tensor]
    total: list[Tensor | None]
    seen: list[int]
    beyond_eps: Tensor
    windows: int
    steps: int
    score_scale: float
    total_fisher: list[Tensor | None]
    units: tuple[float, float] = (math.inf, math.inf)


@dataclass(frozen=True)
class SummedWalk(RWalk):
    """Riemannian Walk that adds up each task's score and mean squared gradients, in units of the first task."""

    def init(self, theta: list[Tensor]) -> Any:
        """Start at `theta` with no history."""
        return WalkSum(*super().init(theta), [None] * len(theta))

    def conclude(self, state: Any, end: TaskEnd) -> tuple[Anchor, Any]:
        """Add the task's score and Fisher information to those of earlier tasks."""
        task, state = self._finished(state)
        score = [_added(old, new, n) for old, new, n in zip(state.total, task, state.seen, strict=True)]
        fisher = [_added(old, new, n) for old, new, n in zip(state.total_fisher, state.fisher, state.seen, strict=True)]
        filled = [
            [torch.zeros_like(f) if t is None else t for t, f in zip(c, state.fisher, strict=True)] for c in (fisher, score)
        ]
        if math.isinf(state.units[0]):
            state = state._replace(units=tuple(mean_element(column, end.shard_group) for column in filled))
        by_fisher, by_score = state.units
        omega = [f / by_fisher + s / by_score for f, s in zip(*filled, strict=True)]
        after = state._replace(total=score, total_fisher=fisher, score_scale=by_score, seen=[0] * len(omega), steps=0)
        return end.renew(omega), after

    def renew(self, state: Any) -> None:
        """Clear path, score and the task's mean."""
        super().renew(state)
        torch._foreach_zero_(state.fisher)

    def _weight(self, seen: int, known: bool) -> float:  # noqa: ARG002
        return 1 / (seen + 1)


def _added(old: Tensor | None, new: Tensor, seen: int) -> Tensor | None:
    return old if not seen else new.clone() if old is None else old + new


@dataclass(frozen=True)
class OneSide(Kronecker):
    """The default with one of its two matrices left out, or joined over tasks in another way.

    Args:
        kept: which matrices count; the other is the identity, scaled to the same trace.
        mean_outputs: whether G is averaged over tasks, in place of the sum.
        sum_inputs: whether A is summed over tasks, in place of the mean.
    """

    kept: Literal["inputs", "outputs", "both"] = "both"
    mean_outputs: bool = False
    sum_inputs: bool = False

    def conclude(self, state: TaskLengths, end: TaskEnd) -> tuple[Anchor, TaskLengths]:
        """Join the task's matrices as the default does, after and before a change that makes of it what was asked for."""
        earlier = KroneckerAnchor.of(end.anchor)
        before = {w: self._rescaled(layer, layer.tasks, 1 / layer.tasks) for w, layer in earlier.layers.items()}
        anchor, after = super().conclude(state, end._replace(anchor=replace(earlier, layers=before)))
        assert isinstance(anchor, KroneckerAnchor)
        layers = {}
        for weight, layer in anchor.layers.items():
            idle = weight in earlier.layers and layer.tasks == earlier.layers[weight].tasks
            times = layer.tasks
            layers[weight] = earlier.layers[weight] if idle else self._one_side(self._rescaled(layer, 1 / times, times))
        return replace(anchor, layers=layers), after

    def _rescaled(self, layer: HeldLayer, outputs: float, inputs: float) -> HeldLayer:
        """Multiply G, where it is averaged, and A, where it is summed."""
        g = layer.outputs.scaled(outputs) if self.mean_outputs else layer.outputs
        a = layer.inputs.scaled(inputs) if self.sum_inputs else layer.inputs
        return replace(layer, outputs=g, inputs=a)

    def _one_side(self, layer: HeldLayer) -> HeldLayer:
        if self.kept == "both":
            return layer
        side = {"inputs": "outputs", "outputs": "inputs"}[self.kept]
        return replace(layer, **{side: _isotropic(getattr(layer, side))})


def _isotropic(side: Spectrum) -> Spectrum:
    """Return the identity times the mean eigenvalue."""
    mean = side.diagonal().mean(1, keepdim=True)
    return Spectrum(side.basis[:, :0], side.values[:, :0], mean, mean.clone())
