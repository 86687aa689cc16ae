"""Synaptic intelligence: how much of the loss's fall each weight brought about, over how far it moved.

Zenke, Poole, Ganguli, "Continual learning through synaptic intelligence", ICML 2017, arXiv 1703.04200.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwalk import kernels
from rwalk.anchor import Anchor
from rwalk.importance.base import Finish, Importance, Step, check, positive
from rwalk.parameters import copies, zeros

STRETCH = 64
"""Steps after which the telescoped path is closed and marked anew. Its rounding error grows with the distance from the mark, so
marking often keeps it as exact as storing the parameters of every step."""


class Path(NamedTuple):
    """State of a path.

    Args:
        path: the path integral of the current task.
        start: the parameters at the start of the task.
        mark: the parameters at the start of the stretch.
        previous: the gradient of the step before, zero at the start of a stretch; None where the visit makes the optimiser's
            step.
        steps: optimiser steps in this task.
    """

    path: list[Tensor]
    start: list[Tensor]
    mark: list[Tensor]
    previous: list[Tensor | None]
    steps: int = 0


@dataclass(frozen=True)
class SI(Importance[Path]):
    """Importance omega += relu(path / (move^2 + xi)) (equation 5), with path and move taken over the whole task.

    Args:
        xi: damping of weights that hardly moved, positive, in units of a squared weight.
    """

    xi: float = 0.1

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(positive(self.xi), self, "xi", "a positive, finite number")

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    def init(self, theta: list[Tensor]) -> Path:
        """Start at `theta` with an empty path: four tensors per parameter."""
        return Path(zeros(theta), copies(theta), copies(theta), [*zeros(theta)])

    def observe(self, state: Path, step: Step) -> Path:
        """Extend the path integral."""
        previous = step.previous(state.previous)
        if state.steps == 0:
            torch._foreach_copy_(state.start, step.theta)
        close = state.steps % STRETCH == 0  # before the first step too: an empty path only moves its mark
        step.visit(path=state.path, mark=state.mark, previous=previous, close=close)
        return state._replace(previous=step.kept(previous), steps=state.steps + 1)

    def conclude(self, state: Path, finish: Finish) -> tuple[Anchor, Path]:
        """Add the task's importance to that of earlier tasks."""
        theta = list(finish.theta.values())
        kernels.visit_(kernels.Visit(theta, path=state.path, mark=state.mark, previous=state.previous, close=True))
        omega = [z if old is None else old.clone() for old, z in zip(finish.earlier(), zeros(theta), strict=True)]
        kernels.account_(omega, state.path, state.start, theta, self.xi)
        for path in state.path:
            path.zero_()
        return finish.renew(omega), state._replace(steps=0)
