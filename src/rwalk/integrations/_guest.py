"""What the callbacks of all hosts do alike: make a memory at the first task, watch each task's optimiser, end the task."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rwalk import Consolidator
from rwalk._errors import explain
from rwalk.importance.base import Importance
from rwalk.parameters import bare, listed


class Guest:
    """A memory in a loop that makes or passes model and optimiser only when training begins.

    Args:
        rule: how importance is measured; None for the recommended recipe; or a `Consolidator` that exists already, for example
            after `estimate`.
        strength: factor of the penalty; see `Consolidator`.
        options: further arguments of `Consolidator`.
    """

    def __init__(
        self, rule: Importance[Any] | Consolidator | None = None, strength: float | None = None, **options: Any
    ) -> None:
        self._memory: Consolidator | None = None
        self._saved: Mapping[str, Any] | None = None
        if isinstance(rule, Consolidator):
            if strength is not None or options:
                raise TypeError(
                    explain(
                        "a `Consolidator` together with further arguments",
                        "one or the other",
                        "Pass strength and options to the `Consolidator`.",
                    )
                )
            self._memory = rule
            return
        Consolidator(nn.Identity(), rule, strength, **options)  # says at once what is wrong with the arguments
        self._arguments: tuple[Any, ...] = (rule, strength, options)

    @property
    def memory(self) -> Consolidator:
        """The consolidator.

        Raises:
            RuntimeError: before training has begun for the first time, as the model is not known then.
        """
        if self._memory is None:
            raise RuntimeError(
                explain(
                    "a question about the memory before training has begun",
                    "a model, which the first training brings",
                    "Train first, or build a `Consolidator(model, rule)` and pass that in place of the rule.",
                )
            )
        return self._memory

    def meet(self, model: nn.Module) -> Consolidator:
        """Return the memory of a model, with the state to continue from; made now if there is none.

        Raises:
            ValueError: if `model` is not the one of the tasks before, or a state to continue from does not fit.
        """
        memory = self._memory
        if memory is None:
            rule, strength, options = self._arguments
            memory = Consolidator(model, rule, strength, **options)
        if bare(memory.model) is not bare(model):
            raise ValueError(
                explain(
                    "another model than that of the tasks before",
                    "one model for one memory",
                    "Train the same model again, or make a new callback for the new one.",
                )
            )
        if self._saved is not None:
            memory.load_state_dict(self._saved)
        self._memory, self._saved = memory, None
        return memory

    def begin(self, model: nn.Module, optimizer: Optimizer) -> Consolidator:
        """Watch an optimiser from now on: of a new task, or of one that was interrupted and goes on.

        Raises:
            ValueError: if `model` is not the one of the tasks before, or a state to continue from does not fit.
        """
        memory = self.meet(model)
        memory.detach()
        memory.model = model  # a host may wrap it anew for each task
        return memory.attach(optimizer)

    def end(self, data: Iterable[Any] | None = None, **options: Any) -> None:
        """End the task: `Consolidator.consolidate`, then stop watching."""
        self.memory.consolidate(data, **options)
        self.memory.detach()
        self.memory.model = bare(self.memory.model)

    def refuse_later_changes(self) -> None:
        """Raise a RuntimeError if the weights are no longer those that `end` has consolidated."""
        changed = self._memory._changed() if self._memory is not None and not self._memory.steps else []
        if changed:
            raise RuntimeError(
                explain(
                    f"weights ({listed(changed)}) that something changed after the task was consolidated",
                    "that whatever averages or restores weights comes first, so that model and anchor are the same",
                    f"Put `{type(self).__name__}` after it in the list, or have it change the weights before training ends.",
                )
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
