"""Synaptic intelligence: how much of the loss's fall each weight brought about, over how far it moved.

Zenke, Poole, Ganguli, "Continual learning through synaptic intelligence", ICML 2017, arXiv 1703.04200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import copies, zeros
from rwalk.anchors.base import Anchor
from rwalk.rules._path import own
from rwalk.rules.base import Rule, Step, TaskEnd, check_damping, check_finite


class Path(NamedTuple):
    """State of a path.

    Args:
        path: the path integral of the current task.
        start: the parameters at the start of the task.
        mark: the parameters at the start of the last step.
        previous: the gradient of the last step; at rest, where that step has ended.
        steps: optimiser steps in this task.
        resting: whether the path holds the optimiser's last move already.
    """

    path: list[Tensor]
    start: list[Tensor]
    mark: list[Tensor]
    previous: list[Tensor]
    steps: int = 0
    resting: bool = False


@dataclass(frozen=True)
class SI(Rule[Path]):
    """Importance omega += relu(path / (move^2 + xi)) (equation 5), with path and move taken over the whole task.

    Args:
        xi: damping of weights that hardly moved, from 1e-30 to 1e30, in units of a squared weight.
    """

    walks: ClassVar[bool] = True
    xi: float = 0.1

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_damping(self, "xi")

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    def init(self, theta: list[Tensor]) -> Path:
        """Start at `theta` with an empty path: four tensors per parameter."""
        return Path(zeros(theta), copies(theta), copies(theta), zeros(theta))

    def observe(self, state: Path, step: Step) -> Path:
        """Extend the path integral."""
        if state.steps == 0:
            torch._foreach_copy_(state.start, step.theta)
        step.update(path=state.path, mark=state.mark, previous=state.previous, close=True)
        return state._replace(steps=state.steps + 1)

    def conclude(self, state: Path, end: TaskEnd) -> tuple[Anchor, Path]:
        """Add the task's importance to that of earlier tasks."""
        theta = list(end.theta.values())
        omega = [z if old is None else old.clone() for old, z in zip(end.earlier(), zeros(theta), strict=True)]
        for i, (t, q) in enumerate(zip(theta, state.previous, strict=True) if state.steps else ()):
            arrived, last = (q, None) if state.resting else (t, q)
            kernels.add_si_importance_(omega[i], state.path[i], state.start[i], arrived, state.mark[i], last, self.xi)
        check_finite(end, omega, "Use a larger `xi`.")
        return end.renew(omega), state._replace(steps=0, resting=False)

    def renew(self, state: Path) -> None:
        """Empty the path."""
        if state.path:
            torch._foreach_zero_([*state.path, *state.previous])

    def resume(self, state: Path, theta: Sequence[Any], places: Sequence[int]) -> Path:
        """Leave out what parameters have moved since the rest: it is no part of the task's move."""
        state = own(state, ("start", "previous"), places)
        for i in places:
            state.start[i].add_(theta[i] - state.previous[i])
            state.previous[i].copy_(theta[i])
        return state

    def abandon(self, state: Path, theta: Sequence[Any], places: Sequence[int]) -> Path:  # noqa: ARG002
        """Leave out what parameters have moved since the last step began, which is where the mark is."""
        known = [i for i, t in enumerate(theta) if t is not None]
        state = own(state, ("start", "previous"), known)
        for i in known:
            state.start[i].add_(theta[i] - state.mark[i])
            state.previous[i].copy_(theta[i])
        return state._replace(resting=True)
