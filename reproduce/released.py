"""The arithmetic of code that the authors of RWalk released, where it is not that of their paper.

From the TensorFlow code of "Efficient Lifelong Learning with A-GEM" (Chaudhry et al., ICLR 2019, arXiv 1812.00420), which holds
the baselines of the published tables. These rules serve the scripts of this folder alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import L2, Anchor
from rwalk._parameters import copies, zeros
from rwalk.anchors import ElementwiseAnchor
from rwalk.bench import Experience
from rwalk.bench.baselines import AGEM, Rehearsal
from rwalk.bench.training import Learner
from rwalk.consolidation.consolidator import Consolidator
from rwalk.consolidation.settings import resolve
from rwalk.rules.base import Rule, Step, TaskEnd

WINDOW = 10
"""Steps from one update of the running Fisher information to the next."""
ALPHA = 0.9
"""Weight of the new value in it."""
XI = 1e-3
"""Damping in the denominator of the score."""


def network(inputs: int, outputs: int) -> nn.Module:
    """Make the perceptron: two layers of 256 ReLU units, weights from N(0, .1) cut off at two deviations, biases of .1."""
    layers = [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)]
    for layer in layers[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
        nn.init.constant_(layer.bias, 0.1)
    return nn.Sequential(nn.Flatten(), *layers)


def stretched(raw: Sequence[Tensor]) -> list[Tensor]:
    """Map importances to [0, 1] by the least and the largest element of all tensors."""
    low, high = min(float(t.min()) for t in raw), max(float(t.max()) for t in raw)
    return [(t - low) / (high - low + 1e-32) for t in raw]


class Windowed(NamedTuple):
    """State of a running Fisher information that moves once a window.

    Args:
        fisher: the running Fisher information.
        fresh: the sum of squared gradients since `fresh` was last set to 0.
        steps: steps in this task.
    """

    fisher: list[Tensor]
    fresh: list[Tensor]
    steps: int = 0


@dataclass(frozen=True)
class ReleasedEWC(Rule[Windowed]):
    """Their "EWC": a running Fisher information, moved once in ten steps by the mean of ten squared batch gradients."""

    def init(self, theta: list[Tensor]) -> Windowed:
        """Start without history."""
        return Windowed(zeros(theta), zeros(theta))

    def observe(self, state: Windowed, step: Step) -> Windowed:
        """Add up squares; every ten steps let them move the Fisher information, and start to add anew."""
        if (state.steps + 1) % WINDOW == 0:
            move(state.fisher, state.fresh)
            clear(state.fresh)
        collect(state.fresh, step)
        return state._replace(steps=state.steps + 1)

    def conclude(self, state: Windowed, end: TaskEnd) -> tuple[Anchor, Windowed]:
        """Hold to the Fisher information, stretched to [0, 1]."""
        clear(state.fresh)
        return end.renew(stretched(state.fisher)), state._replace(steps=0)


class Walked(NamedTuple):
    """State of a released walk.

    Args:
        fisher, fresh: as in `Windowed`, but `fresh` is set to 0 at a task's end alone.
        path, mark, last: the path integral of the window, where it began, and where the last step ended.
        score: the score of the task.
        total: the score of all tasks; empty before there is one.
        steps: steps in this task.
    """

    fisher: list[Tensor]
    fresh: list[Tensor]
    path: list[Tensor]
    mark: list[Tensor]
    last: list[Tensor]
    score: list[Tensor]
    total: list[Tensor | None]
    steps: int = 0


@dataclass(frozen=True)
class ReleasedRWalk(Rule[Walked]):
    """Their "RWALK".

    What differs from the paper: squares add up over the task, so that the Fisher information is nearly their sum; the score
    takes the Fisher information from before the window, without the half, and its positive part window by window; the last
    window of a task is dropped, and the first one has nine steps; S becomes 1.5 S + .5 s.
    """

    walks: ClassVar[bool] = True

    def init(self, theta: list[Tensor]) -> Walked:
        """Start without history."""
        fisher, fresh, path, score = (zeros(theta) for _ in range(4))
        return Walked(fisher, fresh, path, copies(theta), copies(theta), score, [None] * len(theta))

    def observe(self, state: Walked, step: Step) -> Walked:
        """Settle a window that is full, then extend the path and the sum of squares."""
        if state.steps == 0:
            begin(state, step.theta)
        if (state.steps + 1) % WINDOW == 0:
            settle(state, step.theta)
            move(state.fisher, state.fresh)
        collect(state.fresh, step)
        step.update(path=state.path, last=state.last)
        return state._replace(steps=state.steps + 1)

    def conclude(self, state: Walked, end: TaskEnd) -> tuple[Anchor, Walked]:
        """Add both terms, each stretched to [0, 1]."""
        total = [s.clone() if old is None else 1.5 * old + 0.5 * s for old, s in zip(state.total, state.score, strict=True)]
        omega = [f + s for f, s in zip(stretched(state.fisher), stretched(total), strict=True)]
        clear(state.fresh)
        clear(state.score)
        return end.renew(omega), state._replace(total=total, steps=0)


def begin(state: Walked, theta: list[Tensor]) -> None:
    """Start a task's path where the parameters are."""
    clear(state.path)
    for column in (state.mark, state.last):
        torch._foreach_copy_(column, theta)


def settle(state: Walked, theta: list[Tensor]) -> None:
    """Turn the path of a window into score."""
    moved = [now - mark for now, mark in zip(theta, state.mark, strict=True)]
    for score, path, fisher, d in zip(state.score, state.path, state.fisher, moved, strict=True):
        score += (path / (fisher * d * d + XI)).relu_()
    clear(state.path)
    torch._foreach_copy_(state.mark, theta)


def move(fisher: list[Tensor], fresh: list[Tensor]) -> None:
    """Let the squares of a window move the running Fisher information."""
    for f, new in zip(fisher, fresh, strict=True):
        f.mul_(1 - ALPHA).add_(new, alpha=ALPHA / WINDOW)


def collect(fresh: list[Tensor], step: Step) -> None:
    """Add a step's squared gradients."""
    for new, g in zip(fresh, step.grad, strict=True):
        if g is not None:
            new.addcmul_(g, g)


def clear(tensors: Sequence[Tensor]) -> None:
    """Set tensors to 0."""
    for tensor in tensors:
        tensor.zero_()


class ReleasedMAS(Learner):
    """Their "MAS": on the last task alone, absolute gradients of the squared norm of ten outputs together."""

    def __init__(self, strength: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, memory=resolve(L2(), strength))

    def consolidate(self, memory: Consolidator, experience: Experience) -> None:
        """Measure on the task, and hold to that alone."""
        names = dict(self.model.named_parameters())
        omega = {name: torch.zeros_like(p) for name, p in names.items()}
        x, y = self.data(experience)
        for batch in x.split(10):
            norm = self.model(batch).square().sum()
            for total, g in zip(omega.values(), torch.autograd.grad(norm, list(names.values())), strict=True):
                total += g.abs() / len(y)
        memory.detach()
        memory.adopt(ElementwiseAnchor({name: p.detach().clone() for name, p in names.items()}, omega))
        memory.attach(self.optimizer)


class ReleasedAGEM(AGEM):
    """Their "A-GEM": of each class the examples that were trained on last are kept, in place of any. For one epoch a task."""

    def __init__(self, rehearsal: Rehearsal, seed: int) -> None:
        super().__init__(rehearsal, seed)
        self._order = torch.zeros(0)

    def begin(self, learner: Learner, experience: Experience) -> list[Experience]:
        """Remember the order of the only epoch."""
        self._order = torch.randperm(len(experience.train), generator=learner.generator.clone_state())
        return super().begin(learner, experience)

    def keep(self, learner: Learner, experience: Experience) -> None:
        """Store the end of the epoch."""
        x, y = learner.data(experience)
        late = self._order.flip(0).to(y.device)
        rows = torch.cat([late[y[late] == label][: self.rehearsal.size] for label in y.unique()])
        self.buffer.add(None, [(x[rows], y[rows])], task=len(self.tasks))
