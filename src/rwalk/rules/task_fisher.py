"""The diagonal recipe: each task's mean of squared gradients, in a unit of its own, summed over tasks.

Our own combination: the running Fisher information of Chaudhry et al. 2018 (arXiv 1801.10112, equation 6), summed over tasks
(Huszár 2018, arXiv 1712.03847).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rwalk._parameters import zeros
from rwalk.anchors.base import Anchor
from rwalk.rules._scale import mean_element
from rwalk.rules.base import Defaults, Fisher, Rule, Step, TaskEnd, check, check_finite, counted


class MeanFisher(NamedTuple):
    """State of a Fisher information that is averaged over a task.

    Args:
        fisher: F, the mean over the steps of this task.
        seen: how many steps of this task gave the tensor a gradient.
        tasks: how many tasks that had a step have ended.
        steps: how many steps there were in all tasks together.
        length: how many steps the tasks that have ended took on average; 1 before.
    """

    fisher: list[Tensor]
    seen: list[int]
    tasks: int = 0
    steps: int = 0
    length: float = 1.0


@dataclass(frozen=True)
class TaskFisher(Rule[MeanFisher]):
    """Importance is the sum over tasks of F / (its mean * sqrt(mean steps per task)), with F the task's mean squared gradient.

    In that unit one strength suits short and long tasks, as a pull that is repeated more often may be weaker. Related tasks
    want a larger one than tasks that share little: what such tasks need of a layer is a matrix, as under `Kronecker`.

    Args:
        fisher: "batch" squares the averaged gradient; "example" averages squared per-example gradients, in the same backward.
    """

    defaults: ClassVar[Defaults] = Defaults(0.1, "proximal", "tail")
    unit: ClassVar[Literal["own", "task"]] = "task"
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(self.fisher in get_args(Fisher), self, "fisher", "batch or example")

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    @property
    def per_example(self) -> bool:
        """Whether squared per-example gradients are needed."""
        return self.fisher == "example"

    def init(self, theta: list[Tensor]) -> MeanFisher:
        """Start without any gradient seen."""
        return MeanFisher(zeros(theta), [0] * len(theta))

    def observe(self, state: MeanFisher, step: Step) -> MeanFisher:
        """Take the new squared gradient into the task's mean."""
        step.update(fisher=state.fisher, weight=_shares(state.seen))
        seen = counted(state.seen, step.grad)
        return state._replace(seen=seen, steps=state.steps + 1)

    def conclude(self, state: MeanFisher, end: TaskEnd) -> tuple[Anchor, MeanFisher]:
        """Add the task's importance to that of earlier tasks, which fades as tasks become longer on average."""
        tasks = state.tasks + any(state.seen)
        after = state._replace(tasks=tasks, length=state.steps / tasks if tasks else 1.0)
        unit = mean_element(state.fisher, end.shard_group) * math.sqrt(after.length)
        fade = math.sqrt(state.length / after.length) if state.tasks else 1.0  # an anchor from elsewhere stays as it is
        columns = zip(state.fisher, end.earlier(), state.seen, strict=True)
        omega = [_joined(fisher / unit, old, n, fade) for fisher, old, n in columns]
        check_finite(dict(zip(end.point, omega, strict=True)), "Look at the size of the gradients.")
        return end.renew(omega), after._replace(seen=[0] * len(omega))

    def renew(self, state: MeanFisher) -> None:
        """Start the mean of another task."""
        if state.fisher:
            torch._foreach_zero_(state.fisher)


def _joined(new: Tensor, old: Tensor | None, seen: int, fade: float) -> Tensor:
    """Add a task's importance to the earlier one; a tensor that took no part in the task keeps what it had."""
    if old is None:
        return new
    return new.add_(old, alpha=fade) if seen else old * fade


def _shares(seen: list[int]) -> list[float]:
    """Return the share of a new square in each mean."""
    return [1 / (seen[0] + 1)] * len(seen) if len(set(seen)) == 1 else [1 / (n + 1) for n in seen]
