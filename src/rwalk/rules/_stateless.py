"""What rules share that do not watch training: they look at the weights, or at data, when a task ends."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rwalk.rules.base import Rule, Step, check_count


class Nothing(NamedTuple):
    """State of a rule that holds nothing beside the anchor."""


@dataclass(frozen=True)
class Stateless(Rule[Nothing]):
    """A rule that only concludes."""

    @property
    def accumulates(self) -> bool:
        """Whether the anchor of earlier tasks enters the next one."""
        return True

    def init(self, theta: list[Tensor]) -> Nothing:  # noqa: ARG002
        """Hold nothing."""
        return Nothing()

    def observe(self, state: Nothing, step: Step) -> Nothing:  # noqa: ARG002
        """Look at nothing during training."""
        return state


def check_samples(rule: Rule[Any]) -> None:
    """Raise a ValueError unless the field `samples` of a rule that measures on data is a number of examples or None."""
    if getattr(rule, "samples", None) is not None:
        check_count(rule, "samples", "a whole number of 1 or more, or None for all")
