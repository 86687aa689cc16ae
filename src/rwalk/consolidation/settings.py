"""The settings of a consolidator, defaults filled in and checked."""

from typing import Any, Literal, NamedTuple, get_args

from rwalk.rules.base import Rule, number
from rwalk.rules.kronecker import Kronecker

Pull = Literal["gradient", "proximal"]
Average = Literal["none", "tail"]
Nonfinite = Literal["raise", "skip"]

STRONGEST = 1e30
"""The largest strength: beyond it products overflow in float32, and nothing is held harder."""


class Settings(NamedTuple):
    """What a consolidator works with."""

    rule: Rule[Any]
    strength: float
    pull: Pull
    average: Average


def resolve(
    rule: Rule[Any] | None, strength: float | None = None, pull: Pull | None = None, average: Average | None = None
) -> Settings:
    """Fill in the defaults of a rule; without a rule it is the recommended one, `Kronecker()`.

    Raises:
        TypeError: if `rule` is no rule.
        ValueError: if a setting is out of range, or the rule's anchor does not allow the pull.
    """
    rule = Kronecker() if rule is None else rule
    if not isinstance(rule, Rule):
        came = f"the class `{rule.__name__}`" if isinstance(rule, type) else f"a `{type(rule).__name__}`"
        raise TypeError(f"`rule` must be an instance of a rule such as `RWalk()`, but is {came}.")
    pull = rule.defaults.pull if pull is None else pull
    average = rule.defaults.average if average is None else average
    check_choice("pull", pull, get_args(Pull))
    check_choice("average", average, get_args(Average))
    if pull == "gradient" and not rule.anchor_kind.by_element:
        raise ValueError(
            f'{type(rule).__name__} cannot pull on gradients, as it holds whole layers. Leave out pull="gradient".'
        )
    return Settings(rule, check_strength(rule.defaults.strength if strength is None else strength), pull, average)


def check_strength(value: Any) -> float:
    """Return a strength as a float, or raise a ValueError if it is not from 0 to `STRONGEST`."""
    plain = number(value)
    if plain is None or not 0 <= plain <= STRONGEST:
        raise ValueError(f"`strength` must be a number from 0 to {STRONGEST:g}, but is {value!r}.")
    return float(plain)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {value!r}.")
