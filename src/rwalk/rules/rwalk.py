"""Riemannian Walk: running Fisher information plus a score of how much each weight helped along the path.

Chaudhry, Dokania, Ajanthan, Torr, "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
ECCV 2018, arXiv 1801.10112. Equation numbers are the paper's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import copies, zeros
from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.distributed.shards import ALONE, ShardGroup
from rwalk.rules._path import beside, elements, start_at
from rwalk.rules._scale import largest_element
from rwalk.rules.base import Fisher, Rule, Step, TaskEnd, check, check_count, check_damping, check_finite, check_share, counted


class Walk(NamedTuple):
    """State of a walk. The total is used only when a task ends.

    Args:
        fisher: F, the running Fisher information.
        path: the path integral of the current window.
        score: s, the score of the current task.
        mark: the parameters at the start of the window.
        last: where the last step ended.
        total: S, the score of earlier tasks; None for a tensor that has not been trained in an earlier task.
        seen: how many steps of this task gave the tensor a gradient.
        beyond_eps: in how many elements of finished windows the squared Riemannian distance exceeded eps: one element, on the
            parameters' device.
        windows: elements times windows finished so far.
        steps: optimiser steps in this task.
        score_scale: what S was divided by for the anchor; infinite before there is one.
    """

    fisher: list[Tensor]
    path: list[Tensor]
    score: list[Tensor]
    mark: list[Tensor]
    last: list[Tensor]
    total: list[Tensor | None]
    seen: list[int]
    beyond_eps: Tensor
    windows: int = 0
    steps: int = 0
    score_scale: float = float("inf")


@dataclass(frozen=True)
class RWalk(Rule[Walk]):
    """Riemannian Walk: importance is F / max F + S / max S, the maxima over all protected tensors together.

    Args:
        alpha: weight of the *new* squared gradient in the running Fisher information (equation 6), in [0, 1]; at 0.9 it rests
            on little more than the last batch, and 0.001 to 0.01 is a running average in the usual sense.
        delta_t: optimiser steps per window, counted per task; the unfinished window at a task's end counts too.
        eps: added to the squared Riemannian distance in the score's denominator, from 1e-30 to 1e30 (equation 7).
        fisher: "batch" squares the averaged gradient, as every published code does; "example" averages squared per-example
            gradients, as the theory asks, gathered in the same backward.
    """

    slow: ClassVar[tuple[str, ...]] = ("total",)
    counters: ClassVar[tuple[str, ...]] = ("beyond_eps", "windows")
    walks: ClassVar[bool] = True
    alpha: float = 0.9
    delta_t: int = 10
    eps: float = 1e-3
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_share(self, "alpha")
        check_count(self, "delta_t", "a whole number of steps, 1 or more")
        check_damping(self, "eps")
        check(self.fisher in get_args(Fisher), self, "fisher", "batch or example")

    @property
    def per_example(self) -> bool:
        """Whether squared per-example gradients are needed."""
        return self.fisher == "example"

    def init(self, theta: list[Tensor]) -> Walk:
        """Start at `theta` with no history: five tensors per parameter."""
        fisher, path, score = (zeros(theta) for _ in range(3))
        counts, beyond_eps = [0] * len(theta), torch.zeros((), dtype=torch.int64)
        return Walk(fisher, path, score, copies(theta), copies(theta), [None] * len(theta), counts, beyond_eps)

    def observe(self, state: Walk, step: Step) -> Walk:
        """Extend the path and the Fisher information; after every `delta_t` steps turn the window's path into score."""
        if not state.steps:
            start_at(step.theta, state.mark, state.last)
        state = state._replace(steps=state.steps + 1, beyond_eps=beside(state.beyond_eps, step.theta))
        close = state.steps % self.delta_t == 0
        columns = {name: getattr(state, name) for name in ("path", "last", "mark", "score", "fisher", "beyond_eps")}
        weight = self._weights(state)
        step.update(close=close, weight=weight, eps=self.eps, **columns)
        seen = counted(state.seen, step.grad)
        return state._replace(seen=seen, windows=state.windows + (elements(step.theta) if close else 0))

    def conclude(self, state: Walk, end: TaskEnd) -> tuple[Anchor, Walk]:
        """Finish the last window, average the task's score with the earlier ones, and normalise both terms."""
        task, state = self._finished(state)
        total = [_averaged(old, new) if n else old for old, new, n in zip(state.total, task, state.seen, strict=True)]
        score = _filled(total, state.score)
        by_fisher, by_score = (largest_element(raw, end.shard_group) for raw in (state.fisher, score))
        omega = [f / by_fisher + s / by_score for f, s in zip(state.fisher, score, strict=True)]
        check_finite(dict(zip(end.point, omega, strict=True)), "Use a larger `eps` or `alpha`.")
        after = state._replace(total=total, score_scale=by_score, seen=[0] * len(omega), steps=0)
        return end.renew(omega), after

    def renew(self, state: Walk) -> None:
        """Clear path and score."""
        if state.path:
            torch._foreach_zero_([*state.path, *state.score])

    def resume(self, state: Walk, theta: Sequence[Tensor], places: Sequence[int]) -> Walk:
        """End the window of parameters that have moved since, where the optimiser left it, and start a new one at `theta`."""
        for i in places:
            window = state.last[i], state.fisher[i], state.path[i], state.score[i], state.mark[i]
            state.beyond_eps.add_(kernels.settle_(*window, self.eps).to(state.beyond_eps.device))
            state = state._replace(windows=state.windows + theta[i].numel())
            start_at([theta[i]], [state.mark[i]], [state.last[i]])
        return state

    def report(
        self, state: Walk, anchor: Anchor, theta: Mapping[str, Tensor], shard_group: ShardGroup = ALONE
    ) -> dict[str, float]:
        """Return the share of windows beyond eps, and the shares of the penalty that Fisher information and score bring."""
        share = [s / state.score_scale for s in _filled(state.total, state.score)]
        by_score = ElementwiseAnchor(anchor.point, dict(zip(theta, share, strict=True)))
        parts = [float(state.beyond_eps), state.windows, float(anchor.penalty(theta)), float(by_score.penalty(theta))]
        beyond_eps, windows, whole, score = shard_group.sums(parts)
        figures = {"windows beyond eps": beyond_eps / windows} if windows else {}
        if whole > 0:
            figures |= {"penalty from Fisher": 1 - score / whole, "penalty from score": score / whole}
        return figures

    def _finished(self, state: Walk) -> tuple[list[Tensor], Walk]:
        """Return the score of the whole task, and the state with its last window counted."""
        if not state.steps:
            return zeros(state.score), state
        if state.steps % self.delta_t == 0:  # no window is open
            return [score.clamp(min=0) for score in state.score], state
        scores = []
        beyond_eps = state.beyond_eps
        columns = zip(state.last, state.fisher, state.path, state.score, state.mark, strict=True)
        for last, fisher, path, so_far, mark in columns:
            score, count = kernels.settled(last, fisher, path, so_far, mark, self.eps)
            scores.append(score.clamp_(min=0))
            beyond_eps = beyond_eps.to(count.device) + count
        return scores, state._replace(beyond_eps=beyond_eps, windows=state.windows + elements(state.last))

    def _weights(self, state: Walk) -> list[float]:
        """Return the new square's share for each tensor."""
        if len(set(state.seen)) == 1 and state.seen[0]:
            return [self._weight(state.seen[0], True)] * len(state.seen)
        return [self._weight(n, total is not None) for n, total in zip(state.seen, state.total, strict=True)]

    def _weight(self, seen: int, known: bool) -> float:
        """Return the new square's share for a tensor: all of it on its very first step."""
        return self.alpha if seen or known else 1.0


def _averaged(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else (old + new).mul_(0.5)


def _filled(total: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    """Return zeros in place of missing tensors."""
    return [torch.zeros_like(t) if s is None else s for s, t in zip(total, like, strict=True)]
