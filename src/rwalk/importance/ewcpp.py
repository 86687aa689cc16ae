"""EWC++: a running Fisher information from the gradients of training itself, no pass over the data.

Chaudhry, Dokania, Ajanthan, Torr, ECCV 2018, arXiv 1801.10112, equation 6.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk.anchor import Anchor
from rwalk.importance._overlap import gains
from rwalk.importance._scale import WAYS, Normalize, divisors
from rwalk.importance.base import Finish, Fisher, Importance, Step, check, check_alpha, check_finite
from rwalk.parameters import zeros


class Running(NamedTuple):
    """State of a running Fisher information.

    Args:
        fisher: F.
        seen: how many steps of this task gave the tensor a gradient.
        known: whether an earlier task did.
        scale: with `normalize="first"`, the scale kept from the first task; infinite before.
        tasks: how many tasks that had a step have ended.
        steps: how many steps there were in all tasks together.
        length: how many steps the tasks that have ended took on average; 1 before.
    """

    fisher: list[Tensor]
    seen: list[int]
    known: list[bool]
    scale: float = math.inf
    tasks: int = 0
    steps: int = 0
    length: float = 1.0


@dataclass(frozen=True)
class EWCpp(Importance[Running]):
    """Importance is the running Fisher information; with `alpha="mean"`, "sum" and "task" it is the recommended recipe's rule.

    Args:
        alpha: weight of the new squared gradient, in [0, 1]; "mean" is the mean over a task's steps.
        accumulate: "last" holds F as it stands (the paper), "sum" adds up the F of each task.
        normalize: "none" (the paper), or divide F by the maximum over "max" (all tensors), the "mean", the maximum per
            "tensor", or the mean of the "first" task, kept; "task" divides by the mean, and by the root of the steps that tasks
            take on average: a pull that is repeated more often may be weaker, and one strength suits short and long tasks.
        overlap: whether, under "sum", a task's F counts more in layers where it falls on the weights that earlier tasks need:
            up to ten times where tasks are related, once where they are not.
        fisher: "batch" squares the averaged gradient; "example" averages squared per-example gradients, in the same backward.
    """

    alpha: float | Literal["mean"] = 0.9
    accumulate: Literal["last", "sum"] = "last"
    normalize: Literal["none", "task"] | Normalize = "none"
    overlap: bool = False
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_alpha(self)
        check(self.accumulate in ("last", "sum"), self, "accumulate", "last or sum")
        check(self.normalize in ("none", "task", *WAYS), self, "normalize", f"one of none, task, {', '.join(WAYS)}")
        fits = isinstance(self.overlap, bool) and (self.accumulate == "sum" or not self.overlap)
        check(fits, self, "overlap", 'False, or True with accumulate="sum"')
        check(self.fisher in get_args(Fisher), self, "fisher", "batch or example")

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return self.accumulate == "sum"

    @property
    def per_example(self) -> bool:
        """Whether squared per-example gradients are needed."""
        return self.fisher == "example"

    def init(self, theta: list[Tensor]) -> Running:
        """Start without history: one tensor per parameter."""
        return Running(zeros(theta), [0] * len(theta), [False] * len(theta))

    def observe(self, state: Running, step: Step) -> Running:
        """Move the running Fisher information towards the new squared gradient."""
        counts = list(zip(state.seen, state.known, strict=True))
        weight = [1 / (n + 1) if self.alpha == "mean" else self.alpha if n or known else 1.0 for n, known in counts]
        step.visit(fisher=state.fisher, weight=weight)
        seen = [n + (g is not None) for n, g in zip(state.seen, step.grad, strict=True)]
        return state._replace(seen=seen, steps=state.steps + 1)

    def conclude(self, state: Running, finish: Finish) -> tuple[Anchor, Running]:
        """Hold to the running Fisher information, or add it to that of earlier tasks."""
        tasks = state.tasks + any(state.seen)
        after = state._replace(tasks=tasks, length=state.steps / tasks if tasks else 1.0)
        scale = self._scale(after, finish)
        gain = gains(finish.earlier(), state.fisher, finish.spread) if self.overlap else [1.0] * len(scale)
        omega = [f / (c / more) for f, c, more in zip(state.fisher, scale, gain, strict=True)]
        # what this rule has left is carried over to the new length; an anchor from elsewhere is taken as it is
        fade = math.sqrt(state.length / after.length) if self.normalize == "task" and state.tasks else 1.0
        stands = self.accumulate == "last" and self.alpha != "mean"  # F is of all tasks, and is scaled anew
        for new, old, n, known in zip(omega, finish.earlier(), state.seen, state.known, strict=True):
            if old is not None and n == 0 and not (stands and known):
                new.copy_(old).mul_(fade)  # a tensor that took no part in the task keeps what it had
            elif old is not None and self.accumulate == "sum":
                new.add_(old, alpha=fade)
        if self.normalize == "first" and scale:
            after = after._replace(scale=scale[0])
        check_finite(finish, omega, "Look at the size of the gradients.")
        ever = [known or n > 0 for n, known in zip(state.seen, state.known, strict=True)]
        return finish.renew(omega), after._replace(seen=[0] * len(ever), known=ever)

    def renew(self, state: Running) -> None:
        """With `alpha="mean"`, start the mean of another task."""
        if self.alpha == "mean" and state.fisher:
            torch._foreach_zero_(state.fisher)

    def _scale(self, state: Running, finish: Finish) -> list[float]:
        """Say by what to divide each tensor's running Fisher information."""
        if self.normalize == "none":
            return [1.0] * len(state.fisher)
        if self.normalize == "task":
            return [c * math.sqrt(state.length) for c in divisors(state.fisher, "mean", math.inf, finish.spread)]
        return divisors(state.fisher, self.normalize, state.scale, finish.spread)
