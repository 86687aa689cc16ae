"""Synaptic intelligence: how much of the loss's fall each weight brought about, over how far it moved.

Zenke, Poole, Ganguli, "Continual learning through synaptic intelligence", ICML 2017, arXiv 1703.04200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import copies, zeros
from rwalk.anchors.base import Anchor
from rwalk.rules._path import start_at
from rwalk.rules.base import Rule, Step, TaskEnd, check_damping, check_finite


class Path(NamedTuple):
    """State of a path.

    Args:
        path: the path integral of the current task.
        start: the parameters at the start of the task.
        last: where the last step ended.
        steps: optimiser steps in this task.
    """

    path: list[Tensor]
    start: list[Tensor]
    last: list[Tensor]
    steps: int = 0


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
        """Start at `theta` with an empty path: three tensors per parameter."""
        return Path(zeros(theta), copies(theta), copies(theta))

    def observe(self, state: Path, step: Step) -> Path:
        """Extend the path integral."""
        if not state.steps:
            start_at(step.theta, state.start, state.last)
        step.update(path=state.path, last=state.last)
        return state._replace(steps=state.steps + 1)

    def conclude(self, state: Path, end: TaskEnd) -> tuple[Anchor, Path]:
        """Add the task's importance to that of earlier tasks."""
        columns = zip(end.earlier(), state.path, strict=True)
        omega = [torch.zeros_like(path) if old is None else old.clone() for old, path in columns]
        if state.steps:
            for total, path, start, last in zip(omega, state.path, state.start, state.last, strict=True):
                kernels.add_si_importance_(total, path, start, last, self.xi)
        check_finite(dict(zip(end.point, omega, strict=True)), "Use a larger `xi`.")
        return end.renew(omega), state._replace(steps=0)

    def renew(self, state: Path) -> None:
        """Empty the path."""
        if state.path:
            torch._foreach_zero_(state.path)

    def resume(self, state: Path, theta: Sequence[Tensor], places: Sequence[int]) -> Path:
        """Leave out what parameters have moved since the last step: it is no part of the task's move."""
        for i in places:
            state.start[i].add_(theta[i] - state.last[i])
            start_at([theta[i]], [state.last[i]])
        return state
