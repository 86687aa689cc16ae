"""Kronecker factors: linear layers are held as a whole, and not weight by weight.

Ritter, Botev, Barber, "Online structured Laplace approximations for overcoming catastrophic forgetting", NeurIPS 2018, arXiv
1805.07810, with the factors of Martens and Grosse 2015, arXiv 1503.05671; here with the recipe's unit, pull and averaging.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk._parameters import copies
from rwalk.anchors.base import Anchor
from rwalk.anchors.factors import KroneckerFactor, Moments
from rwalk.anchors.kronecker import KroneckerAnchor
from rwalk.distributed.shards import ALONE, ShardGroup
from rwalk.rules._scale import mean_element
from rwalk.rules._stateless import check_samples
from rwalk.rules.base import Defaults, Rule, Step, TaskEnd, check, check_count
from rwalk.rules.ewc import Labels


class Scaled(NamedTuple):
    """State: the scale kept from the first task; infinite before."""

    scale: float = math.inf


@dataclass(frozen=True)
class Kronecker(Rule[Scaled]):
    """Fisher information of each linear layer as a product of two matrices, added up over tasks, in the unit of the first.

    Over a task's data, A is the mean of x x^T of a layer's inputs x, with a 1 for the bias, and G the mean of d d^T of the
    gradients d at its outputs; over tasks A is averaged and G summed. All other parameters are held by their Fisher
    information, as under `EWC`. The unit is the mean of the whole diagonal after the first task. A layer that an adopted
    anchor holds weight by weight stays so.

    Args:
        labels: "sample" draws a label for each row of logits for one backward pass, "exact" weights every class by its
            probability with one pass for each, "true" takes the data's labels, which makes G small where the model is sure of
            them.
        samples: how many examples of the data to use, from the first on; all of them when None.
        every: after how many steps a layer is pulled, with the sum of their step sizes.
    """

    measures: ClassVar[Literal["steps", "data", "nothing"]] = "data"
    defaults: ClassVar[Defaults] = Defaults(0.0015, "proximal", "tail")
    anchor_kind: ClassVar[type[Anchor]] = KroneckerAnchor
    labels: Labels = "sample"
    samples: int | None = None
    every: int = 10

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(self.labels in get_args(Labels), self, "labels", f"one of {', '.join(get_args(Labels))}")
        check_samples(self)
        check_count(self, "every", "a whole number of steps, 1 or more")

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    def init(self, theta: list[Tensor]) -> Scaled:  # noqa: ARG002
        """Start without a scale."""
        return Scaled()

    def observe(self, state: Scaled, step: Step) -> Scaled:  # noqa: ARG002
        """Look at nothing during training."""
        return state

    def conclude(self, state: Scaled, end: TaskEnd) -> tuple[Anchor, Scaled]:
        """Join the task's matrices with those of earlier tasks, and its importance of all other parameters to theirs."""
        held, earlier = _layers(end.anchor), end.anchor.omega
        fresh = self._measured(end)
        inside = {*held, *fresh, *(layer.bias for layer in held.values()), *(m.bias for m in fresh.values())}
        others = [name for name in end.point if name not in inside]
        alone = end.gradients(self.labels, torch.square, self.samples, only=others) if others else []
        diagonals = [torch.outer(m.outputs.diagonal(), m.inputs.diagonal()) for m in fresh.values()]
        scale = state.scale if math.isfinite(state.scale) else mean_element([*alone, *diagonals], end.shard_group)
        layers = held | {w: KroneckerFactor.of(m._replace(outputs=m.outputs / scale), held.get(w)) for w, m in fresh.items()}
        omega = {name: f / scale + earlier.get(name, 0) for name, f in zip(others, alone, strict=True)}
        for weight, layer in layers.items():
            omega |= layer.omega(weight)
        point = dict(zip(end.point, copies(list(end.point.values())), strict=True))
        return KroneckerAnchor(point, {name: omega[name] for name in point}, layers, self.every), Scaled(scale)

    def report(
        self,
        state: Scaled,  # noqa: ARG002
        anchor: Anchor,
        theta: Mapping[str, Tensor],
        shard_group: ShardGroup = ALONE,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return which share of the weights is held in layers."""
        inside = sum(anchor.point[n].numel() for w, layer in _layers(anchor).items() for n in layer.names(w))
        return {"share held in layers": inside / max(sum(t.numel() for t in theta.values()), 1)}

    def _measured(self, end: TaskEnd) -> dict[str, Moments]:
        """Measure the layers that are not held weight by weight already."""
        held, omega = _layers(end.anchor), end.anchor.omega
        found = end.factors(self.labels, self.samples)
        fresh = {}
        for weight, moments in found.items():
            if weight in held:
                fresh[weight] = moments if held[weight].bias else moments.unbiased()
            elif not any(bool(omega[name].any()) for name in (weight, moments.bias) if name in omega):
                fresh[weight] = moments
        return fresh


def _layers(anchor: Anchor) -> dict[str, KroneckerFactor]:
    return anchor.layers if isinstance(anchor, KroneckerAnchor) else {}
