"""Kronecker factors: layers are held as a whole, and not weight by weight.

Ritter, Botev, Barber, "Online structured Laplace approximations for overcoming catastrophic forgetting", NeurIPS 2018, arXiv
1805.07810, with the factors of Martens and Grosse 2015 (arXiv 1503.05671), for convolutions those of Grosse and Martens 2016
(1602.01407), for weights that are shared those of Eschenhagen et al. 2023 (2311.00636); here measured in training, by leading
directions, in a unit of each task's own.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk._parameters import copy, exact_copy
from rwalk.anchors.base import Anchor
from rwalk.anchors.factors import Cut, Moments
from rwalk.anchors.kronecker import KroneckerAnchor, joined_layer
from rwalk.distributed.shards import ALONE, ShardGroup
from rwalk.rules._scale import mean_element
from rwalk.rules._stateless import check_samples
from rwalk.rules.base import Defaults, Rule, Step, TaskEnd, check, check_count, check_finite, check_share
from rwalk.rules.ewc import Labels

Measure = Literal["training", "data"]
"""When second moments are measured: while the user trains, or at a task's end on its data."""

ESTIMATE = 300
"""How many steps a task counts for that was only estimated."""


class TaskLengths(NamedTuple):
    """State: how long tasks were.

    Args:
        now: how many steps there were in this task.
        tasks: how many tasks that had a step, or were estimated, have ended.
        steps: how many steps there were in these together.
    """

    now: int = 0
    tasks: int = 0
    steps: int = 0

    @property
    def mean(self) -> float:
        """How many steps a task had on average; 1 before the first."""
        return self.steps / self.tasks if self.tasks else 1.0


@dataclass(frozen=True)
class Kronecker(Rule[TaskLengths]):
    """Fisher information of each layer as a product of two matrices: the recommended rule, `Consolidator`'s default.

    A is the mean of x x^T over a layer's inputs x, with a 1 for the bias, and G the mean over examples of the sum of d d^T for
    the gradients d at its outputs; over tasks A is averaged and G summed. All other parameters are held by their mean squared
    gradients. Each task counts in its own unit: the mean element of the diagonal is 1 / sqrt(mean steps per task). A layer
    that an adopted anchor holds weight by weight stays so, and so does one that could not be measured as a whole in a later
    task, beside what earlier ones have measured of it. Of a LoRA adapter the product of the two factors is held. A weight
    that embeddings and linear layers share is one layer, whose product of two matrices has the trace of the sum over both.

    Args:
        measure: "training" measures at every `m`-th step of the user's own training, "data" at a task's end on the data that
            `consolidate` is given.
        m: how many steps lie between two that are measured.
        every: after how many steps the weights are pulled, with the sum of their step sizes.
        share: of each matrix as many leading directions are kept as hold this share of its trace; all others count by their
            mean. 1 keeps all.
        rank: but no more than this; of a larger matrix only a few more are followed while it is measured. None for no limit.
        labels: for "data": "sample" draws a label for each row of logits for one backward pass, "exact" weights every class by
            its probability with one pass for each, "true" takes the data's labels, which makes G small where the model is sure
            of them, "output" takes a random direction of the output, whatever it means, and needs no labels.
        samples: for "data": how many examples to use, from the first on; all of them when None.
    """

    defaults: ClassVar[Defaults] = Defaults(0.1, "proximal", "tail")
    unit: ClassVar[Literal["own", "task"]] = "task"
    anchor_kind: ClassVar[type[Anchor]] = KroneckerAnchor
    measure: Measure = "training"
    m: int = 10
    every: int = 10
    share: float = 0.9
    rank: int | None = 32
    labels: Labels = "sample"
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(self.measure in get_args(Measure), self, "measure", f"one of {', '.join(get_args(Measure))}")
        check(self.labels in get_args(Labels), self, "labels", f"one of {', '.join(get_args(Labels))}")
        check_samples(self)
        check_share(self, "share")
        for name in ("m", "every"):
            check_count(self, name, "a whole number of steps, 1 or more")
        if self.rank is not None:
            check_count(self, "rank", "a whole number of 1 or more, or None for no limit")

    @property
    def measures(self) -> Literal["steps", "data", "nothing"]:  # type: ignore[override]
        """What it needs: steps, or data at a task's end."""
        return "steps" if self.measure == "training" else "data"

    @property
    def estimates(self) -> bool:
        """Whether it can measure on data alone."""
        return True

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    @property
    def moments_every(self) -> int | None:
        """After how many steps second moments are measured in training."""
        return self.m if self.measure == "training" else None

    @property
    def directions(self) -> int | None:
        """How many directions are kept of each matrix."""
        return self.rank

    @property
    def pull_every(self) -> int:
        """After how many steps whole layers are pulled."""
        return self.every

    def init(self, theta: list[Tensor]) -> TaskLengths:  # noqa: ARG002
        """Start without a task."""
        return TaskLengths()

    def observe(self, state: TaskLengths, step: Step) -> TaskLengths:  # noqa: ARG002
        """Count a step."""
        return state._replace(now=state.now + 1)

    def conclude(self, state: TaskLengths, end: TaskEnd) -> tuple[Anchor, TaskLengths]:
        """Join the task's matrices with those of earlier tasks, and its importance of all other parameters to theirs."""
        anchor = KroneckerAnchor.of(end.anchor)
        fresh = end.factors(self.labels, self.samples, self.rank)
        together = {n for w, m in fresh.items() for n in m.arrangement.names(w)}
        inside = (anchor.inside | together) - _apart(anchor, end, together)
        alone = end.alone(self.labels, self.samples, [name for name in end.point if name not in inside])
        steps = state.now or (ESTIMATE if fresh or alone else 0)
        after = TaskLengths(0, state.tasks + bool(steps), state.steps + steps)
        root = math.sqrt(after.mean)
        fade = math.sqrt(state.mean / after.mean) if state.tasks else 1.0  # an anchor from elsewhere stays as it is
        unit, other = _unit(fresh) * root, mean_element(list(alone.values()), end.shard_group) * root
        cut = Cut(self.share, self.rank)
        layers = {w: f.faded(fade) for w, f in anchor.layers.items() if w not in fresh}
        layers |= {w: joined_layer(m, cut, unit, anchor.layers.get(w), fade) for w, m in fresh.items()}
        held = [n for n in end.point if n not in inside or n in anchor.inside & anchor.omega.keys()]
        omega = {n: _joined(anchor.omega.get(n), fade, alone.get(n), other, end.point[n]) for n in held}
        check_finite(omega, "Look at the size of the gradients.")
        copied = copy if end.shard_group.groups else exact_copy  # parts on several ranks have one precision
        point = {name: copied(p) for name, p in end.point.items()}
        return KroneckerAnchor(point, omega, {name: layers[name] for name in point if name in layers}), after

    def report(
        self,
        state: TaskLengths,  # noqa: ARG002
        anchor: Anchor,
        theta: Mapping[str, Tensor],
        shard_group: ShardGroup = ALONE,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return which share of the weights is held in layers."""
        inside = sum(anchor.point[n].numel() for n in KroneckerAnchor.of(anchor).inside)
        return {"share held in layers": inside / max(sum(t.numel() for t in theta.values()), 1)}


def _apart(anchor: KroneckerAnchor, end: TaskEnd, together: Collection[str]) -> set[str]:
    """Name the parameters of earlier layers that this task has measured one by one, as it could not measure the layer."""
    measured = anchor.omega if end.squares is None else end.squares
    return {name for name in measured if name in anchor.inside and name not in together}


def _unit(fresh: Mapping[str, Moments]) -> float:
    """Return the mean element of the diagonals of all layers in any order, infinity where all are zero."""
    mean = math.fsum(m.total for m in fresh.values()) / max(sum(m.elements for m in fresh.values()), 1)
    return mean if mean > 0 else math.inf


def _joined(earlier: Tensor | None, fade: float, fresh: Tensor | None, unit: float, theta: Tensor) -> Tensor:
    """Add a task's importance to the earlier one."""
    total = (
        torch.zeros_like(theta, dtype=torch.promote_types(theta.dtype, torch.float32)) if earlier is None else earlier * fade
    )
    return total if fresh is None else total + fresh / unit
