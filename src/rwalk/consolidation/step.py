"""One optimiser step: it is checked, observed by the rule, and followed by the pull and the average."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk import kernels
from rwalk.anchors.base import Anchor, PullColumns
from rwalk.consolidation import proximal
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.protected import refuse_sparse, shares_memory
from rwalk.consolidation.settings import Nonfinite, Pull
from rwalk.consolidation.validity import PendingCheck, loss_scale, skip_flag
from rwalk.kernels import PostStepRow
from rwalk.rules.base import Step


class StepObserver:
    """Works before and after each step of an optimiser.

    Args:
        memory: what the step changes.
        pull: "gradient" pulls before the step, "proximal" after it.
        nonfinite: "raise" an error where gradients are not finite, or "skip" the step.

    Attributes:
        skipped: how many steps were left out.
    """

    def __init__(self, memory: Memory, pull: Pull, nonfinite: Nonfinite) -> None:
        self.memory, self.pull, self.nonfinite = memory, pull, nonfinite
        self.skipped = 0
        self._moved: list[str] = []
        self._averaged: list[str] = []
        self._pending: PendingCheck | None = None
        self._checked_anchor: Anchor | None = None
        self._largest = 0.0
        self._checked_optimizer: Optimizer | None = None

    @property
    def works_after(self) -> bool:
        """Whether there is anything to do after a step."""
        return self.pull == "proximal" or self.memory.averages or self.memory.rule.walks

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """Let the rule observe the step that the optimiser is about to take, then add the pull to its gradients."""
        self.resolve()
        memory = self.memory
        self._moved, self._averaged = [], []
        squares = memory.squares.take() if memory.squares is not None else None
        grad = self._gradients(optimizer)
        check = self._checked(optimizer, grad)
        if check is None or not grad:
            return
        pending = check if check.on_device else None
        skip = None if pending is None else pending.flag
        memory.state = memory.moves.before_step(memory.rule, memory.state, memory.protected, memory.steps, skip)
        self._moved = list(grad)
        theta = memory.protected.theta
        step = Step(
            list(theta.values()),
            [grad.get(name) for name in theta],
            squares=None if squares is None else [squares.get(name) for name in theta],
            pull=self._gradient_pull(optimizer),
            scale=loss_scale(optimizer),
            skip=skip,
            ascends=memory.protected.ascends(optimizer),
        )
        memory.state = memory.rule.observe(memory.state, step)
        step.finish()
        memory.steps += 1
        self._pending = None if pending is None else pending.sent()

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Draw the parameters that have just moved towards the anchor, average them, and note where they are."""
        moved, self._moved = self._moved, []
        if not moved:
            return
        memory, pending = self.memory, self._pending
        skip = None if pending is None else pending.flag
        if memory.anchor.reads_skip_flag or pending is None or not pending.fails():
            self._draw_and_average(moved, optimizer, skip)
        memory.state = memory.moves.after_step(memory.rule, memory.state, memory.protected, moved, skip)

    def resolve(self) -> None:
        """Take back what was counted for the last step, if it has turned out not to count."""
        memory = self.memory
        memory.renew()
        pending, self._pending = self._pending, None
        if pending is not None and pending.fails():
            memory.state = pending.before
            memory.tail.take_back(self._averaged)
            memory.steps -= 1
            self.skipped += 1
            memory.moves.forget()
            pending.raise_if_not_finite()

    def forget_pending(self) -> None:
        """Forget a check whose step belongs to a state that was replaced."""
        self._pending = None

    def _gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the gradients of the protected parameters that the optimiser holds now."""
        memory = self.memory
        if memory.protected.stale(optimizer):
            memory.follow_optimizer(optimizer)
        grad = memory.protected.gradients()
        refuse_sparse(grad)
        shared = self.pull == "gradient" and shares_memory(grad.values())
        return memory.protected.own_gradients() if shared else grad

    def _checked(self, optimizer: Optimizer, grad: dict[str, Tensor]) -> PendingCheck | None:
        """Return the check of a step that counts, as far as is known without waiting for a device; None if it does not."""
        memory = self.memory
        check = PendingCheck.of(memory.state, grad, skip_flag(optimizer), memory.steps + 1, memory.protected.shard_group)
        if check.on_device and not (self.nonfinite == "skip" and check.norms is not None):
            return check
        if not check.fails():
            return check.passed()
        if self.nonfinite == "raise":
            check.raise_if_not_finite()
        elif check.norms is not None:
            optimizer.zero_grad(set_to_none=True)  # an optimiser leaves out parameters without a gradient
        self.skipped += 1
        return None

    def _gradient_pull(self, optimizer: Optimizer) -> PullColumns | None:
        """Return the pull to add to the gradients, None for none; warn where it overshoots at the learning rate."""
        memory = self.memory
        if self.pull != "gradient" or not memory.strength or not memory.anchor.point:
            return None
        self._warn_of_overshoot(max(map(proximal.rate, optimizer.param_groups)))
        return memory.anchor.pull_columns(list(memory.protected.theta), memory.strength)

    def _warn_of_overshoot(self, lr: float) -> None:
        """Warn, once for an anchor, when steps along the penalty's gradient are longer than the distance to the anchor."""
        memory = self.memory
        if self._checked_anchor is not memory.anchor:
            self._checked_anchor = memory.anchor
            self._largest = memory.protected.shard_group.maxima([memory.anchor.largest()])[0]
        largest, strength = self._largest, memory.strength
        if lr * 2 * strength * largest > 1:
            self._largest = 0.0
            warnings.warn(
                "The gradient pull overshoots the anchor: lr * 2 * strength * max omega is more than 1, at strength "
                f"{strength:g}, learning rate {lr:g} and largest importance {largest:.3g}. Build the consolidator with "
                f'`pull="proximal"`, or with a strength below {0.5 / (lr * largest):.3g}.',
                stacklevel=5,
            )

    def _draw_and_average(self, moved: list[str], optimizer: Optimizer, skip: Tensor | None) -> None:
        memory = self.memory
        rows = {name: PostStepRow(memory.protected.theta[name]) for name in moved}
        if self.pull == "proximal" and memory.strength and memory.anchor.point:
            self._warn_of_unknown_metric(optimizer)
            rows = proximal.drawn(rows, optimizer, memory.anchor, memory.strength, memory.protected.parameters)
        if memory.averages:
            rows = memory.tail.averaged(rows)
            self._averaged = moved
        kernels.after_step_(rows.values(), skip)

    def _warn_of_unknown_metric(self, optimizer: Optimizer) -> None:
        """Warn, once for an optimiser, where the pull does not know the length of its steps."""
        if self._checked_optimizer is not optimizer:
            self._checked_optimizer = optimizer
            if proximal.unknown(optimizer):
                proximal.warn_unknown(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies are made of."""
        return {**vars(self), "_checked_optimizer": None}
