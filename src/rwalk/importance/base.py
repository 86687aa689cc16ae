"""What every rule is: a frozen dataclass that watches training and says how much each weight mattered."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from rwalk._errors import explain
from rwalk.anchor import Anchor

State = TypeVar("State", bound=tuple[Any, ...])
Item = TypeVar("Item")


class Step(NamedTuple):
    """What a rule sees of one optimiser step, just before the optimiser moves.

    Args:
        theta: the protected parameters.
        grad: the gradient of the task loss alone, parallel to `theta`; None where a parameter takes no part in this step.
    """

    theta: list[Tensor]
    grad: list[Tensor | None]

    def active(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Return positions, parameters and gradients of the parameters that take part in this step."""
        on = [i for i, g in enumerate(self.grad) if g is not None]
        return on, pick(self.theta, on), [g for g in self.grad if g is not None]


def pick(column: list[Item], positions: list[int]) -> list[Item]:
    """Return the entries of a list at some positions."""
    return [column[i] for i in positions]


class Finish(NamedTuple):
    """What a rule sees when a task ends.

    Args:
        theta: the protected parameters by name, in the order of the rule's state.
        anchor: what earlier tasks left behind.
        gradients: a callable over the task's data for rules that need it, or None when the user passed no data.
    """

    theta: Mapping[str, Tensor]
    anchor: Anchor
    gradients: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Importance(ABC, Generic[State]):
    """A rule: its fields are its hyperparameters, its state is an explicit named tuple, and it knows no model.

    The fields of a state are lists parallel to the protected parameters (of tensors, numbers or None) or plain values. Only
    `observe` and `conclude` may write into the tensors of the state they are given, and they touch no others.
    """

    @abstractmethod
    def init(self, theta: list[Tensor]) -> State:
        """Return the state before the first step, for protected parameters `theta`."""

    @abstractmethod
    def observe(self, state: State, step: Step) -> State:
        """Take one optimiser step into account, just before the optimiser moves."""

    @abstractmethod
    def conclude(self, state: State, finish: Finish) -> tuple[Anchor, State]:
        """End a task: return the anchor that protects all tasks so far, and the state for the next task."""


def check(holds: bool, rule: Importance[Any], name: str, expected: str) -> None:
    """Raise a ValueError about the field `name` of a rule unless `holds`."""
    if not holds:
        kind = type(rule).__name__
        raise ValueError(
            explain(f"{kind}({name}={getattr(rule, name)!r})", f"`{name}` to be {expected}", f"Pass such a value to {kind}.")
        )
