"""Riemannian Walk: running Fisher information plus a score of how much each weight helped along the path.

Chaudhry, Dokania, Ajanthan, Torr, "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
ECCV 2018, arXiv 1801.10112. Equation numbers are the paper's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk import kernels
from rwalk.anchor import Anchor
from rwalk.importance._path import own
from rwalk.importance._scale import WAYS, Normalize, divisors
from rwalk.importance.base import Finish, Fisher, Importance, Step, check, check_alpha, check_count, check_damping, check_finite
from rwalk.parallel import ALONE, Spread
from rwalk.parameters import copies, zeros


class Walk(NamedTuple):
    """State of a walk. The first five fields are visited at every step; the totals only when a task ends.

    Args:
        fisher: F, the running Fisher information.
        path: the path integral of the current window.
        score: s, the score of the current task.
        mark: the parameters at the start of the window.
        previous: the gradient of the step before, zero at the start of a window; at rest, where that step has ended.
        total: S, the score of earlier tasks; None for a tensor that has not been trained in an earlier task.
        total_fisher: with `alpha="mean"`, the Fisher information of earlier tasks; otherwise None.
        seen: how many steps of this task gave the tensor a gradient.
        by_score: what S was divided by for the anchor; infinite before there is one.
        steps: optimiser steps in this task.
        scale: with `normalize="first"`, the scales of F and S kept from the first task; infinite before.
        windows: elements times windows settled so far.
        resting: whether the path holds the optimiser's last move already.
        far: in how many of them the squared Riemannian distance exceeded eps, one element; it stays on the parameters' device.
    """

    fisher: list[Tensor]
    path: list[Tensor]
    score: list[Tensor]
    mark: list[Tensor]
    previous: list[Tensor]
    total: list[Tensor | None]
    total_fisher: list[Tensor | None]
    seen: list[int]
    by_score: list[float]
    far: Tensor
    steps: int = 0
    scale: tuple[float, float] = (math.inf, math.inf)
    windows: int = 0
    resting: bool = False


@dataclass(frozen=True)
class RWalk(Importance[Walk]):
    """Riemannian Walk with the fields of the paper and of its authors' released code.

    Args:
        alpha: weight of the *new* squared gradient in the running Fisher information (equation 6), in [0, 1]; at 0.9 it rests
            on little more than the last batch, and 0.001 to 0.01 is a running average in the usual sense. "mean" is the
            mean over the steps of the task, started anew with each task.
        delta_t: optimiser steps per window, counted per task; the unfinished window at a task's end counts too.
        eps: added to the squared Riemannian distance in the score's denominator, from 1e-30 to 1e30 (equation 7).
        normalize: how F and S are scaled before they are added: by the maximum over "max" (all tensors, the paper), the "mean",
            the maximum per "tensor", or the mean of the "first" task, kept.
        accumulate: how a task's score joins that of earlier tasks: "average", (S + s) / 2, is the paper; "sum" is S + s. With
            `alpha="mean"` the same is done to F.
        fisher: "batch" squares the averaged gradient, as every published code does; "example" averages squared per-example
            gradients, as the theory asks, gathered in the same backward.
    """

    slow: ClassVar[tuple[str, ...]] = ("total", "total_fisher")
    counters: ClassVar[tuple[str, ...]] = ("far", "windows")
    walks: ClassVar[bool] = True
    alpha: float | Literal["mean"] = 0.9
    delta_t: int = 10
    eps: float = 1e-3
    normalize: Normalize = "max"
    accumulate: Literal["average", "sum"] = "average"
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_alpha(self)
        check_count(self, "delta_t", "a whole number of steps, 1 or more")
        check_damping(self, "eps")
        check(self.normalize in WAYS, self, "normalize", f"one of {', '.join(WAYS)}")
        check(self.accumulate in ("average", "sum"), self, "accumulate", "average or sum")
        check(self.fisher in get_args(Fisher), self, "fisher", "batch or example")

    @property
    def per_example(self) -> bool:
        """Whether squared per-example gradients are needed."""
        return self.fisher == "example"

    def init(self, theta: list[Tensor]) -> Walk:
        """Start at `theta` with no history: five tensors per parameter."""
        none: list[Tensor | None] = [None] * len(theta)
        fisher, path, score, previous = (zeros(theta) for _ in range(4))
        counts, scales, far = [0] * len(theta), [math.inf] * len(theta), torch.zeros((), dtype=torch.int64)
        return Walk(fisher, path, score, copies(theta), previous, none, list(none), counts, scales, far)

    def observe(self, state: Walk, step: Step) -> Walk:
        """Extend the path and the Fisher information; every `delta_t` steps turn the window's path into score first."""
        close = state.steps % self.delta_t == 0  # before the first step too: an empty path only moves its mark
        weight = [self._weight(n, total) for n, total in zip(state.seen, state.total, strict=True)]
        far = step.visit(close=close, weight=weight, **self._columns(state))
        seen = [n + (g is not None) for n, g in zip(state.seen, step.grad, strict=True)]
        return self._count(state, step.theta, far)._replace(seen=seen, steps=state.steps + 1)

    def conclude(self, state: Walk, finish: Finish) -> tuple[Anchor, Walk]:
        """Settle what remains, join the task's score with the earlier ones and normalise: omega = F/max F + S/max S."""
        task, state = self._settled(state, list(finish.theta.values()))
        total = self._join(state.total, task, state.seen)
        mean = self.alpha == "mean"
        total_fisher = self._join(state.total_fisher, state.fisher, state.seen) if mean else state.total_fisher
        fisher = _filled(total_fisher, state.fisher) if mean else state.fisher
        omega, by_f, by_s = self._normalise(fisher, _filled(total, state.score), state.scale, finish.spread)
        check_finite(finish, omega, "Use a larger `eps` or `alpha`.")
        if self.normalize == "first" and by_f:
            state = state._replace(scale=(by_f[0], by_s[0]))
        after = state._replace(total=total, total_fisher=total_fisher, by_score=by_s, seen=[0] * len(omega), steps=0)
        return finish.renew(omega), after._replace(resting=False)

    def renew(self, state: Walk) -> None:
        """Empty path and score, and with `alpha="mean"` the Fisher information."""
        old = [*state.path, *state.score, *state.previous, *(state.fisher if self.alpha == "mean" else ())]
        if old:
            torch._foreach_zero_(old)

    def resume(self, state: Walk, theta: Sequence[Any], places: Sequence[int]) -> Walk:
        """End the window, where the optimiser left it, of parameters that have moved since; start a new one where they are."""
        state = own(state, ("path", "score", "mark", "previous"), places)
        for i in places:
            ends = state.previous[i], state.fisher[i], state.path[i], state.score[i], state.mark[i]
            state = self._count(state, [theta[i]], kernels.settle_(*ends, self.eps))
            state.mark[i].copy_(theta[i]), state.previous[i].copy_(theta[i])
        return state

    def abandon(self, state: Walk, theta: Sequence[Any], places: Sequence[int]) -> Walk:
        """Take the last step out of the path; drop the window of parameters that have moved since it began."""
        known = [i for i, t in enumerate(theta) if t is not None]
        state = own(state, ("path", "mark", "previous"), known)
        for i in known:
            if i in places:
                state.path[i].zero_(), state.mark[i].copy_(theta[i])
                state.previous[i].zero_()
            kernels.rest_([theta[i]], [state.path[i]], [state.mark[i]], [state.previous[i]])
        return state._replace(resting=True)

    def _settled(self, state: Walk, theta: list[Tensor]) -> tuple[list[Tensor], Walk]:
        """Return the score of the task, and the state with what has been counted."""
        if not state.steps:
            return zeros(state.score), state
        scores = []
        for i, (t, q) in enumerate(zip(theta, state.previous, strict=True)):
            end, last = (q, None) if state.resting else (t, q)
            columns = state.fisher[i], state.path[i], state.score[i], state.mark[i]
            score, far = kernels.settled(end, *columns, last, self.eps)
            scores.append(score.clamp_(min=0))
            state = self._count(state, [t], far)
        return scores, state

    def report(self, state: Walk, anchor: Anchor, theta: Mapping[str, Tensor], spread: Spread = ALONE) -> dict[str, float]:
        """Return the share of windows beyond eps, and the shares of the penalty that Fisher information and score bring."""
        part = [s / d for s, d in zip(_filled(state.total, state.score), state.by_score, strict=True)]
        by_score = Anchor(anchor.point, dict(zip(theta, part, strict=True)))
        parts = [float(state.far), state.windows, float(anchor.penalty(theta)), float(by_score.penalty(theta))]
        far, windows, whole, score = spread.sums(parts)
        figures = {"windows beyond eps": far / windows} if windows else {}
        if whole > 0:
            figures |= {"penalty from Fisher": 1 - score / whole, "penalty from score": score / whole}
        return figures

    def _columns(self, state: Walk) -> dict[str, Any]:
        """Return the state as columns of a visit."""
        columns = {key: getattr(state, key) for key in ("path", "mark", "previous", "score", "fisher")}
        return {**columns, "eps": self.eps}

    def _count(self, state: Walk, theta: list[Tensor], far: Tensor | None) -> Walk:
        """Count the elements of a window that has ended, and those whose squared Riemannian distance exceeded eps."""
        if far is None or not state.steps:
            return state
        return state._replace(windows=state.windows + sum(t.numel() for t in theta), far=state.far.to(far.device) + far)

    def _weight(self, seen: int, total: Tensor | None) -> float:
        """Return the new square's share for a tensor: all of it on its very first step."""
        if self.alpha == "mean":
            return 1 / (seen + 1)
        return 1.0 if seen == 0 and total is None else self.alpha

    def _join(self, total: list[Tensor | None], task: list[Tensor], seen: list[int]) -> list[Tensor | None]:
        """Join a task's values with those of earlier tasks; a tensor that took no part in the task keeps what it had."""

        def join(old: Tensor | None, new: Tensor) -> Tensor:
            if old is None:
                return new if self.alpha != "mean" else new.clone()
            return (old + new).mul_(0.5) if self.accumulate == "average" else old + new

        return [join(old, new) if n else old for old, new, n in zip(total, task, seen, strict=True)]

    def _normalise(
        self, fisher: list[Tensor], total: list[Tensor], first: tuple[float, float], spread: Spread
    ) -> tuple[list[Tensor], list[float], list[float]]:
        """Return F / its scale + S / its scale, and the scales by tensor."""
        by_f, by_s = (divisors(raw, self.normalize, c, spread) for raw, c in zip((fisher, total), first, strict=True))
        return [f / a + s / b for f, s, a, b in zip(fisher, total, by_f, by_s, strict=True)], by_f, by_s


def _filled(total: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    """Put zeros where a tensor has no history."""
    return [torch.zeros_like(t) if s is None else s for s, t in zip(total, like, strict=True)]
