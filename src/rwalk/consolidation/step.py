"""One optimiser step: it is checked, observed by the rule, and followed by the pull and the average."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk import gradients, kernels
from rwalk._errors import warn
from rwalk.consolidation import proximal
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.misuse import note_first_step, refuse_lent
from rwalk.consolidation.overshoot import OvershootCheck
from rwalk.consolidation.protected import refuse_sparse, shares_memory
from rwalk.consolidation.settings import Nonfinite, Pull
from rwalk.consolidation.step_layout import StepLayout
from rwalk.consolidation.turns import take_turn, turning
from rwalk.consolidation.validity import ACCEPTED, PendingCheck, loss_scale, refuse_capture, scaler_scale, skip_flag
from rwalk.rules.base import Step

UNTOUCHED = kernels.RuleUpdate()
"""What a rule updates that looks at nothing in each step."""
PATIENCE = 10
"""Steps in a row that may be left out before a warning."""


class OpenStep(NamedTuple):
    """A step between the pass before it and the one after it.

    Args:
        moved: which of the protected parameters it moves.
        made: what the rule has updated.
        squares: the mean squares of per-example gradients, where there are any.
        scale: the loss scale.
        skip: one element, not 0 if the step does not count; None where it does.
        before: the rule's state before the step.
    """

    moved: list[bool]
    made: kernels.RuleUpdate
    squares: list[Tensor | None] | None
    scale: Tensor | None
    skip: Tensor | None
    before: Any


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
        self.skipped = self._skipped_in_a_row = 0
        self._open: OpenStep | None = None
        self._averaged: list[str] = []
        self._changed: list[str] = []
        self._pending: PendingCheck | None = None
        self._overshoot = OvershootCheck()
        self._metrics: tuple[Any, Any, proximal.Metrics] | None = None
        self._checked_optimizer: Optimizer | None = None
        self._layout = StepLayout(memory)
        self._measured: gradients.StepMoments | None = None
        self._counted: list[float] = []

    @property
    def works_after(self) -> bool:
        """Whether there is anything to do after a step."""
        return self.pull == "proximal" or self.memory.averages or self.memory.rule.walks

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """Let the rule observe the step that the optimiser is about to take, then add the pull to its gradients."""
        self.resolve()
        memory = self.memory
        self._averaged = []
        if not memory.protected.on_cpu:
            refuse_capture()
        squares = memory.squares.take() if memory.squares is not None else None
        grad = self._gradients(optimizer)
        check = self._checked(optimizer, grad)
        if check is None or not grad.there:
            return
        if not memory.steps or memory.loaded:
            note_first_step(memory)
        before, changed = memory.state, memory.moves.noticed(memory.protected) if check.on_device else []
        if check.on_device or not memory.protected.on_cpu:  # otherwise the pass before the step finds foreign moves
            memory.state = memory.moves.drop_foreign(memory.rule, memory.state, memory.protected, memory.steps)
        theta = list(memory.protected.theta.values())
        self._take_moments(optimizer, grad, check)
        step = Step(theta, grad)
        memory.state = memory.rule.observe(memory.state, step)
        memory.steps += 1
        memory.stepped = True
        skip = check.flag if check.on_device else None
        columns = None if squares is None else [squares.get(name) for name in memory.protected.theta]
        moved = [True] * len(grad) if grad.complete else [g is not None for g in grad]
        self._open = OpenStep(moved, step.made, columns, loss_scale(optimizer), skip, before)
        if step.made != UNTOUCHED or self.pull == "gradient":
            self._visit(optimizer, theta, grad, self._open)
        self._pending = check._replace(before=before).sent() if check.on_device else None
        self._changed = changed

    def _visit(self, optimizer: Optimizer, theta: list[Tensor], grad: kernels.StepGradients, step: OpenStep) -> None:
        """Make the pass before the step; foreign moves that it comes upon count for nothing."""
        memory = self.memory
        compare = memory.rule.walks and memory.steps > 1 and memory.protected.on_cpu and step.skip is None
        strength = self._gradient_pull(optimizer)
        places = self._layout.of(optimizer, theta, step.made).before(
            kernels.BeforeStep(grad, step.squares, step.made.weight, strength, step.scale, step.skip, compare)
        )
        if places:
            memory.state = memory.rule.resume(memory.state, theta, places)
            names = list(memory.protected.theta)
            memory.moves.note_changed(names[i] for i in places if not step.moved[i])

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Draw the parameters that have just moved towards the anchor, average them, and extend the path."""
        step, self._open = self._open, None
        if step is None:
            return
        memory = self.memory
        if not memory.by_element:
            self._take_turn(optimizer, step)
            return
        names, theta = list(memory.protected.theta), list(memory.protected.theta.values())
        share = None
        metric = self._metric(optimizer, step.moved)
        if memory.averages:
            share = memory.tail.shares(names, step.moved)
            self._averaged = [name for name, has in zip(names, step.moved, strict=True) if has]
        made = step.made
        numbers = (made.weight, made.close, made.eps, made.beyond_eps, step.scale, step.skip)
        self._layout.after_step(optimizer, theta, made).after(
            kernels.AfterStep(step.moved, metric, share, step.squares, *numbers)
        )
        memory.moves.after_step(memory.protected, names, step.moved, memory.rule.walks)

    def _take_moments(self, optimizer: Optimizer, grad: kernels.StepGradients, check: PendingCheck) -> None:
        """Take what a measured step has told; where nothing waits for the device, it counts once that has answered."""
        moments = self.memory.moments
        if moments is None or not moments.open:
            return
        by_name = dict(zip(self.memory.protected.theta, grad, strict=True))
        kept = loss_scale(optimizer)
        taken = moments.take(by_name, scaler_scale(), 1.0 if kept is None else float(kept))
        if taken is not None and not check.on_device:
            moments.commit(taken)
        else:
            self._measured = taken

    def _take_turn(self, optimizer: Optimizer, step: OpenStep) -> None:
        """Count how far the step went; every few steps, pull whole layers and average."""
        memory, names = self.memory, list(self.memory.protected.theta)
        self._warn_of_unknown_metric(optimizer)
        metrics = self._read_metrics(optimizer)
        strength = memory.strength if memory.anchor.point else 0.0
        lengths = metrics.lengths(2 * strength)
        memory.turns.add(names, step.moved, lengths)
        self._averaged = [name for name, has in zip(names, step.moved, strict=True) if has]
        self._counted = [length for length, has in zip(lengths, step.moved, strict=True) if has]
        moved, foreign = step.moved, list[str]()
        if memory.turns.since >= memory.rule.pull_every and (self._pending is None or not self._pending.fails()):
            resting = {*turning(memory)} - {*self._averaged}
            foreign = [name for name in memory.moves.noticed(memory.protected) if name in resting]
            take_turn(memory, metrics)
            self._averaged = []
            moved = [has or name in resting for name, has in zip(names, moved, strict=True)]
        memory.moves.after_step(memory.protected, names, moved, walks=False)
        memory.moves.note_changed(foreign)
        memory.watch_next()

    def _read_metrics(self, optimizer: Optimizer) -> proximal.Metrics:
        """Return what reads the optimiser's metric."""
        if self._metrics is None or self._metrics[0] is not optimizer or self._metrics[1] is not self.memory.protected:
            protected = self.memory.protected
            self._metrics = optimizer, protected, proximal.Metrics(optimizer, protected.parameters.values())
        return self._metrics[2]

    def resolve(self, looking: bool = False) -> None:
        """Take back what was counted for the last step, if it has turned out not to count, or has failed.

        Raises:
            RuntimeError: inside `averaged`, except for a mere look at the memory.
        """
        memory = self.memory
        if not looking:
            refuse_lent(memory)
        memory.renew()
        pending, self._pending = self._pending, None
        step, self._open = self._open, None
        measured, self._measured = self._measured, None
        if measured is not None and memory.moments is not None and not (pending is not None and pending.fails()):
            memory.moments.commit(measured)
        if pending is not None and pending.fails():
            memory.state = pending.before
            if memory.by_element:
                memory.tail.take_back(self._averaged)
            elif self._averaged:
                memory.turns.take_back(self._averaged, self._counted)
            memory.steps -= 1
            self._skip(pending)
            memory.moves.forget(self._changed)
            pending.raise_if_not_finite()
        elif step is not None and memory.rule.walks:  # the optimiser has not come to the end of its step
            memory.state = step.before
            memory.steps -= 1

    def forget_pending(self) -> None:
        """Forget a check whose step belongs to a state that was replaced."""
        self._pending = self._open = self._measured = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, on this rank, the gradients of the last step among them."""
        squares = self.memory.squares
        every = (*self.memory.tensors(), *self._layout.previous)
        held = (t for t in every if any(t.stride()) or not t.dim())  # the others expand
        return sum(t.nbytes for t in held) + (0 if squares is None else squares.nbytes)

    def release(self) -> None:
        """Let go of what only steps need."""
        self._layout.release()
        self._metrics = None

    def _gradients(self, optimizer: Optimizer) -> kernels.StepGradients:
        """Return the gradients of the protected parameters, None for those that the optimiser does not move now."""
        memory = self.memory
        if memory.protected.stale(optimizer, self._layout.in_place(list(memory.protected.theta.values()))):
            memory.follow_optimizer(optimizer)
            self._layout.drop()
        grad = memory.protected.gradients()
        refuse_sparse(grad, memory.protected.theta)
        shared = self.pull == "gradient" and memory.anchor.point and shares_memory(grad)
        return memory.protected.own_gradients() if shared else grad

    def _checked(self, optimizer: Optimizer, grad: kernels.StepGradients) -> PendingCheck | None:
        """Return the check of a step that counts, as far as is known without waiting for a device; None if it does not."""
        check = self._check(optimizer, grad)
        if check.on_device and not (self.nonfinite == "skip" and check.bad is not None):
            return check
        if not check.fails():
            self._skipped_in_a_row = 0
            return check.passed()
        if self.nonfinite == "raise":
            check.raise_if_not_finite()
        elif check.bad is not None:
            optimizer.zero_grad(set_to_none=True)  # an optimiser leaves out parameters without a gradient
        self._skip(check)
        return None

    def _skip(self, check: PendingCheck) -> None:
        """Count a step that is left out, and warn where nothing else comes."""
        self.skipped += 1
        self._skipped_in_a_row += self.nonfinite == "skip" and check.bad is not None
        if self._skipped_in_a_row == PATIENCE:
            warn(
                f"{PATIENCE} steps in a row were left out, as gradients were not finite. Once a weight is not finite either, "
                "no further step will count: go back to weights that are, and lower the learning rate."
            )

    def _check(self, optimizer: Optimizer, grad: kernels.StepGradients) -> PendingCheck:
        """Take a loss scaler's word for a step where there is one, else look at the gradients."""
        memory, flag = self.memory, skip_flag(optimizer)
        if flag is not None:
            return PendingCheck(flag, memory.state)
        protected = memory.protected
        beside = protected.gradients_beside() if protected.beside else {}
        if not grad.there and not beside:
            return PendingCheck(ACCEPTED, memory.state)
        bad = self._layout.nonfinite(grad)
        if beside:
            bad = torch.cat(
                [bad.float(), kernels.nonfinite(kernels.StepGradients(beside.values())).to(bad.device, torch.float32)]
            )
        names = [*protected.theta, *beside]
        return PendingCheck.of_gradients(bad, memory.state, names, memory.steps + 1, protected.shard_group)

    def _gradient_pull(self, optimizer: Optimizer) -> float:
        """Return the strength of the pull to add to gradients, 0 for none; warn where it overshoots at the learning rate."""
        memory = self.memory
        if self.pull != "gradient" or not memory.strength or not memory.anchor.point:
            return 0.0
        self._overshoot.look(memory, max(map(proximal.rate, optimizer.param_groups)))
        return memory.strength

    def _metric(self, optimizer: Optimizer, moved: list[bool]) -> kernels.Metric | None:
        """Return the metric of the proximal pull; None for no pull."""
        memory = self.memory
        if self.pull != "proximal" or not memory.strength or not memory.anchor.point:
            return None
        self._warn_of_unknown_metric(optimizer)
        return self._read_metrics(optimizer).read(moved, 2 * memory.strength)

    def _warn_of_unknown_metric(self, optimizer: Optimizer) -> None:
        """Warn, once for an optimiser, where the pull does not know the length of its steps."""
        if self._checked_optimizer is not optimizer:
            self._checked_optimizer = optimizer
            if proximal.unknown(optimizer):
                proximal.warn_unknown(optimizer, not self.memory.by_element)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies are made of."""
        nothing = dict.fromkeys(("_checked_optimizer", "_metrics", "_open"))
        return {**vars(self), **nothing, "_layout": StepLayout(self.memory)}
