"""The consolidator binds a model, a rule and an anchor to any training loop that calls `optimizer.step()`."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwalk._parameters import once_built, refuse_odd
from rwalk.anchors.base import Anchor
from rwalk.anchors.match import Match
from rwalk.consolidation import hooks, misuse
from rwalk.consolidation.adoption import adopt
from rwalk.consolidation.ended_weights import averaged
from rwalk.consolidation.going_back import GoingBack, Way, check_share, go_back, weights_kept
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.moves import Writes
from rwalk.consolidation.offload import Offload
from rwalk.consolidation.protected import find_protected, refuse_nothing
from rwalk.consolidation.saved_state import SavedState
from rwalk.consolidation.scope import Named, Scope
from rwalk.consolidation.settings import Average, Nonfinite, Pull, check_choice, check_strength, resolve
from rwalk.consolidation.step import StepObserver
from rwalk.consolidation.summary import KeptFigures, Summary, summarise
from rwalk.consolidation.task_end import end_task, refuse_data, refuse_estimate
from rwalk.rules.base import Rule


class Consolidator(GoingBack, SavedState):
    """Hold a model to what earlier tasks need, in a training loop that stays as it is.

    `Consolidator(model)` is what we recommend: the rule `Kronecker()`, strength 0.1, proximal pull and tail averaging.
    `Consolidator(model, RWalk())` is Riemannian Walk as published. The arguments that are not given follow from the rule.

    Args:
        model: the network; parameters that the attached optimiser holds and that require gradients are protected.
        rule: how importance is measured, for example `RWalk()`.
        strength: factor of the penalty strength * sum of omega * (theta - point)^2, which has no half; at least 0.
        pull: "gradient" adds the penalty's gradient before the optimiser's step; "proximal" moves the weights towards the
            anchor after it, in the optimiser's own metric, and is stable for every strength.
        average: "none", or "tail": the average of each task's later iterates becomes model and anchor at its end.
        nonfinite: what happens when a gradient is not finite: "raise" an error, one step late on a GPU, since nothing waits for
            the device; or "skip" the step, the optimiser's too. Either way the memory stays as it was.
        state_dtype: `torch.bfloat16` keeps importance in two bytes an element instead of four.
        state_device: "cpu" keeps the anchor, and what is read only when a task ends, off the accelerator.
        strict: for rules with `fisher="example"`: raise an error, instead of a warning, where a layer's per-example gradients
            cannot be computed.
        only: what may be protected: parameters or modules by name, by a pattern such as "encoder.*.bias", or modules of the
            model, one or a list; None for everything that the optimiser trains.
        exclude: what may not, for example a head that is to learn freely.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule[Any] | None = None,
        strength: float | None = None,
        *,
        pull: Pull | None = None,
        average: Average | None = None,
        nonfinite: Nonfinite = "raise",
        state_dtype: torch.dtype | None = None,
        state_device: torch.device | str | None = None,
        strict: bool = False,
        only: Named | None = None,
        exclude: Named | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a `torch.nn.Module`, but is a `{type(model).__name__}`.")
        check_choice("nonfinite", nonfinite, get_args(Nonfinite))
        settings = resolve(rule, strength, pull, average)
        scope = Scope(model, only, exclude)
        self._memory = Memory(model, settings, scope, Offload.of(state_dtype, state_device), strict)
        self._observer = StepObserver(self._memory, settings.pull, nonfinite)
        self._hooks: hooks.StepHooks | None = None

    rule = property(lambda self: self._memory.rule, doc="How importance is measured; fixed.")
    pull = property(lambda self: self._observer.pull, doc='How weights are pulled, "gradient" or "proximal"; fixed.')
    average = property(lambda self: self._memory.average, doc='What the model is at a task\'s end, "none" or "tail"; fixed.')

    def __repr__(self) -> str:
        """Show the configuration and what was learned so far."""
        options = f"strength={self.strength}, pull={self.pull!r}, average={self.average!r}"
        return f"Consolidator({self.rule}, {options}, tasks={self.tasks}, tensors={len(self._memory.protected.theta)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of: everything except the hooks, which the copy makes anew."""
        memory = self._memory
        if memory.protected.shard_group.groups:
            raise TypeError(
                "The consolidator of a sharded model cannot be copied. Pass what `state_dict()` returns to `load_state_dict` "
                "of a consolidator of the other model."
            )
        self._observer.resolve()
        memory.moves.keep_changed(memory.changed())
        return {**vars(self), "_hooks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy, and watch the copy of the optimiser."""
        vars(self).update(state)
        memory = self._memory
        refuse_odd(memory.protected.theta)
        memory.moves.note_all(memory.protected.theta)
        memory.begun = Writes({})  # which counts writes to the original's tensors
        if memory.optimizer is not None:
            self._watch(memory.optimizer)
            once_built(memory.model, memory.collect_again)

    def __copy__(self) -> "Consolidator":
        """Refuse: two consolidators would pull on one model."""
        raise TypeError("A consolidator cannot be copied without its model. Use `copy.deepcopy((model, optimizer, memory))`.")

    @property
    def model(self) -> nn.Module:
        """The network; another one whose parameters have the same names may take its place between tasks."""
        return self._memory.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        misuse.refuse_lent(self._memory)
        self._memory.model = model

    @property
    def anchor(self) -> Anchor:
        """What earlier tasks left behind: `anchor.point` and `anchor.importance()` map parameter names to tensors.

        Under `fully_shard` these are DTensors in the memory of each rank's parts.
        """
        self._memory.shown = True
        return self._memory.whole_anchor()

    @property
    def strength(self) -> float:
        """Factor of the penalty; may be changed at any time."""
        return self._memory.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._memory.strength = check_strength(value)

    @property
    def tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._memory.tasks

    @property
    def steps(self) -> int:
        """How many steps of the current task have been observed; 0 right after `consolidate`."""
        self._observer.resolve(looking=True)
        return self._memory.steps

    @property
    def skipped(self) -> int:
        """How many steps were left out: by a fused optimiser for its loss scaler, or because gradients were not finite."""
        return self._observer.skipped

    @torch.inference_mode(False)
    def attach(self, optimizer: Optimizer) -> "Consolidator":
        """Watch an optimiser from now on, and pull on the weights once there is an anchor.

        Between tasks, attaching to another optimiser replaces the one before. If `optimizer` wraps another (as Accelerate
        does), the inner one is watched. Returns the consolidator itself.

        Args:
            optimizer: what trains the model.

        Raises:
            TypeError: if `optimizer` is not a `torch.optim.Optimizer`, is LBFGS, or does not call the hooks of its steps.
            RuntimeError: if a consolidator watches the optimiser already, or a task under another one is unfinished.
            ValueError: if the optimiser holds none of the model's trainable parameters.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a `torch.optim.Optimizer`, but is a `{type(optimizer).__name__}`.")
        self._observer.resolve()
        memory, optimizer = self._memory, hooks.innermost(optimizer)
        hooks.refuse_unwatchable(optimizer)
        hooks.refuse_attachment(optimizer, self, memory.steps if memory.optimizer is not None else 0)
        found = find_protected(memory.model, optimizer, memory.scope, memory.protected.theta)
        refuse_odd(found.theta)
        refuse_nothing(found)
        misuse.warn_of_second_optimizer(memory, found.in_optimizer)
        self.detach()
        misuse.warn_of_second_memory(memory, found.theta)
        begins = not memory.steps and not found.same(memory.protected)
        memory.follow(found)
        memory.begun = Writes(found.theta) if begins else memory.begun
        memory.optimizer, memory.last_optimizer, memory.stepped = optimizer, weakref.ref(optimizer), False
        memory.watch_next()
        self._watch(optimizer)
        return self

    def _watch(self, optimizer: Optimizer) -> None:
        after = self._observer.after if self._observer.works_after else None
        self._hooks = hooks.StepHooks(self, optimizer, self._observer.before, after)

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self) -> None:
        """Stop watching; what was learned stays, and `attach` continues from there.

        What moves the weights in between counts for nothing.
        """
        if self._hooks is not None:
            self._hooks.close()
            self._memory.moves.pause()
        self._observer.release()
        self._memory.stop_collecting()
        self._memory.optimizer, self._hooks = None, None

    @torch.inference_mode(False)
    @torch.no_grad()
    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[..., Tensor] | None = None,
        blend: float = 0.0,
    ) -> None:
        """End a task: turn what was observed into importance, and hold to the weights as they are now.

        Args:
            data: batches of the task, `(inputs, labels)` as a loader yields them, for rules that measure on data and for
                models with BatchNorm under tail averaging; iterated once for each of the two.
            loss: what the model's outputs mean where targets do not show it, such as `torch.nn.functional.mse_loss`; for
                `labels="true"` any negative log-likelihood of one example; see `rwalk.gradients.per_example_over`.
            logits: reads logits, (batch, classes) or (batch, rows, classes), from the output, or from `(output, batch)`.
            blend: which part of the way back to the anchor to go first, from 0 to 1; see `blend`.

        Raises:
            RuntimeError: if the consolidator was never attached and the rule measures during training, or something else than
                the optimiser it was attached to has trained.
            ValueError: if the rule measures on data and there is none.
        """
        refuse_data(data, self.rule)
        if not self._memory.protected.theta and self.rule.measures != "data":
            raise RuntimeError(
                "`consolidate()` was called before `attach`. Call `attach(optimizer)` before training; to protect a "
                "pretrained model call `estimate(loader)`, under a rule that can measure on data."
            )
        if not check_share(blend):
            self._end_task(data, loss, logits)
            return
        self._observer.resolve()
        with weights_kept(self._memory):
            go_back(self._memory, blend, Way(data=data))
            self._end_task(data, loss, logits)

    @torch.no_grad()
    def _end_task(self, data: Any, loss: Any, logits: Any, estimating: bool = False) -> None:
        self._observer.resolve()
        self._observer.release()
        if not estimating:
            misuse.refuse_unwatched(self._memory)
        end_task(self._memory, data, loss, logits, estimating)

    @torch.inference_mode(False)
    def estimate(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[..., Tensor] | None = None,
    ) -> None:
        """Protect a pretrained model before any training: `consolidate` on data it already does well.

        Needs no optimiser: all parameters that require gradients are protected. Arguments are those of `consolidate`.

        Raises:
            RuntimeError: if the rule measures during training, or a task is unfinished.
            ValueError: if the rule measures on data and there is none.
        """
        self._observer.resolve()
        refuse_estimate(self.rule, self._memory.steps)
        refuse_data(data, self.rule, estimating=True)
        self._memory.widen(self._memory.scope.trainable(self.model))
        self._memory.count_data_again()
        self._end_task(data, loss, logits, estimating=self.rule.measures != "nothing")

    @contextmanager
    @torch.inference_mode(False)
    def averaged(self, data: Iterable[Any] | None = None) -> Iterator[nn.Module]:
        """Give the model the weights that `consolidate()` would leave now, to validate them; restore every bit afterwards.

        That is the average of the task so far, where there is averaging. `with memory.averaged() as model:` lends the model
        itself. Inside, a step of the watched optimiser is refused, and so is what changes, saves or copies the memory.

        Args:
            data: batches of the task, for models with BatchNorm, whose statistics are renewed on them and restored as well.
        """
        refuse_data(data)
        self._observer.resolve()
        with averaged(self._memory, data) as model:
            yield model

    @torch.inference_mode(False)
    def adopt(self, anchor: Anchor, rename: Mapping[str, str] | Callable[[str], str] | None = None) -> Match:
        """Hold to an anchor that was made elsewhere, for example `Anchor.load("anchor.safetensors")`.

        Args:
            anchor: the anchor; entries of tensors that grew since become their leading block.
            rename: from the anchor's names to this model's, for models that call their parameters otherwise.

        An anchor of a rule with another unit than `TaskFisher` and `Kronecker` have counts under these as one task does.

        Returns:
            What matched, grew, and did not match; print it.

        Raises:
            ValueError: if no name and shape matches, or the anchor is damaged or of another geometry than the rule's.
        """
        self._observer.resolve()
        return adopt(self._memory, anchor, rename)

    @torch.inference_mode(False)
    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Return the current penalty, strength * sum of omega * (theta - point)^2, as a scalar for logging."""
        self._observer.resolve(looking=True)
        return torch.as_tensor(self._memory.penalty() * self.strength)

    @torch.inference_mode(False)
    @torch.no_grad()
    def summary(self, loss: float | Tensor | None = None, snapshot: KeptFigures | None = None) -> Summary:
        """Return what is held and how it works, in figures; pass the current loss for the ratio of penalty to loss.

        Besides the penalty: each layer's share of the importance and its drift from the anchor, and what the rule reports; and
        how much of what the model knew when a `snapshot` of it was taken is left.
        """
        return summarise(self._memory, self.pull, self.skipped, float(self.penalty()), loss, snapshot)

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for rule, anchor, average and per-example squares, on this rank."""
        return self._observer.nbytes
