"""What the callbacks of all hosts share: they make a memory at the first task, attach it to optimisers, and end tasks."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rwalk import Consolidator
from rwalk._errors import printable, warn
from rwalk._parameters import bare, listed
from rwalk.consolidation.going_back import check_share
from rwalk.consolidation.summary import Summary
from rwalk.finetuning import Snapshot
from rwalk.rules.base import Rule


class HostCallback:
    """A memory for a loop that makes model and optimiser only when training begins.

    Args:
        rule: how importance is measured; None for the recommended one; or an existing `Consolidator`, for example after
            `estimate`.
        strength: factor of the penalty; see `Consolidator`.
        blend: which part of the way back to its start each task goes when it ends; see `Consolidator.blend`.
        snapshot: what the model knew before; how much of it is left is logged with each evaluation.
        once: whether what the memory holds already, after `estimate` or `adopt`, is all that is ever held: no task is
            consolidated.
        journal: an `rwalk.report.Journal`, which gets the scores on the evaluation sets of all tasks when a task has ended.
        options: further arguments of `Consolidator`.
    """

    def __init__(
        self,
        rule: Rule[Any] | Consolidator | None = None,
        strength: float | None = None,
        *,
        blend: float = 0.0,
        snapshot: Snapshot | None = None,
        once: bool = False,
        journal: Any = None,
        **options: Any,
    ) -> None:
        self.blend, self.snapshot, self.once, self.journal = check_share(blend), snapshot, once, journal
        self._journalled: tuple[int, Summary] | None = None
        self._memory: Consolidator | None = None
        self._saved: Mapping[str, Any] | None = None
        if isinstance(rule, Consolidator):
            if strength is not None or options:
                raise TypeError(
                    "A `Consolidator` cannot be passed together with further arguments; pass these to the `Consolidator`."
                )
            self._memory = rule
            self._refuse_once()
            return
        self._refuse_once()
        if unknown := sorted({"warm_head", "distill"} & options.keys()):
            came = f"This callback got {listed(unknown)}, which only the one for Hugging Face's Trainer takes"
            raise TypeError(f"{came}. Call `rwalk.warm_head(model, loader)` before `fit`, or add `Distillation` to the loss.")
        known = {name: value for name, value in options.items() if name not in ("only", "exclude")}
        Consolidator(nn.Identity(), rule, strength, **known)  # raises errors about the arguments at once
        self._arguments: tuple[Any, ...] = (rule, strength, options)

    def _refuse_once(self) -> None:
        """Refuse `once` where nothing is held yet, or what only the end of a task makes is asked for."""
        memory = self._memory
        if self.once and (memory is None or not memory.anchor.point or memory.average != "none" or self.blend):
            raise ValueError(
                "With `once=True` no task is consolidated, so the memory has to hold something already, and cannot average or "
                'go back. Pass a `Consolidator(model, ..., average="none")` after its `estimate` or `adopt`, and no `blend`.'
            )

    @property
    def memory(self) -> Consolidator:
        """The consolidator.

        Raises:
            RuntimeError: before training has begun for the first time, as the model is not known then.
        """
        if self._memory is None:
            raise RuntimeError(
                "There is no memory before training has begun, as it needs the model. Train first, or build a "
                "`Consolidator(model, rule)` and pass that in place of the rule."
            )
        return self._memory

    def bind(self, model: nn.Module) -> Consolidator:
        """Return the memory of a model, with the state to continue from; make it if there is none.

        Raises:
            ValueError: if `model` is not the one of the tasks before, or a state to continue from does not fit.
        """
        memory = self._memory
        if memory is None:
            rule, strength, options = self._arguments
            memory = Consolidator(model, rule, strength, **options)
        if bare(memory.model) is not bare(model):
            raise ValueError(
                "This is another model than that of the tasks before, and a memory holds one. Train the same model again, or "
                "make a new callback for this one."
            )
        if self._saved is not None:
            memory.load_state_dict(self._saved)
        self._memory, self._saved = memory, None
        return memory

    def begin(self, model: nn.Module, optimizer: Optimizer) -> Consolidator:
        """Attach the memory to the optimiser of a new task, or of an interrupted task that continues.

        Raises:
            ValueError: if `model` is not the one of the tasks before, or a state to continue from does not fit.
        """
        memory = self.bind(model)
        memory.detach()
        memory.model = model  # a host may wrap it anew for each task
        memory.attach(optimizer)
        if self.journal is not None and self.journal.memory is None:
            self.journal.memory = memory
        if self.blend and not memory.tasks and not memory.steps:
            memory.mark()
        return memory

    def end(self, data: Iterable[Any] | None = None, **options: Any) -> None:
        """End the task: `Consolidator.consolidate`, unless all is held already, then detach."""
        if self.journal is not None:
            self._journalled = len(self.journal.done), self.memory.summary()
        if not self.once:
            self.memory.consolidate(data, blend=self.blend, **options)
        self.memory.detach()
        self.memory.model = bare(self.memory.model)

    def note(self, scores: Mapping[str, float | None]) -> None:
        """Hand the scores after the last task to the journal, with what the memory held before it was consolidated.

        A task without a score of the journal's metric is left out, with a warning: training that has ended is not lost for it.
        """
        if self._journalled is None:
            return
        if missing := [name for name, score in scores.items() if score is None]:
            warn(
                f"The evaluation of {listed(missing)} has no `{printable(self.journal.metric)}`, so the journal noted nothing."
            )
            return
        number, summary = self._journalled
        self.journal.log(number, scores, summary=summary)

    def refuse_later_changes(self) -> None:
        """Raise a RuntimeError if the weights are no longer those that `end` consolidated."""
        changed = self._memory._memory.changed() if self._memory is not None and not self._memory.steps else []
        if changed:
            raise RuntimeError(
                f"Something changed weights ({listed(changed)}) after the task was consolidated, so that model and anchor "
                f"differ. If it is a callback that averages or restores weights, put `{type(self).__name__}` after it in the "
                "list; else let it change the weights before training ends."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the memory's state; empty before training has begun."""
        return self._memory.state_dict() if self._memory is not None else dict(self._saved or {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, at once or as soon as there is a model.

        Raises:
            ValueError: if the state is of another format, rule or model.
        """
        if self._memory is not None and state_dict:
            self._memory.load_state_dict(state_dict)
        else:
            self._saved = state_dict or None
