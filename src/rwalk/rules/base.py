"""What every rule is: a frozen dataclass that watches training and says how much each weight mattered."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import listed
from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.anchors.factors import Moments
from rwalk.distributed.shards import ALONE, ShardGroup

State = TypeVar("State", bound=tuple[Any, ...])
Objective = Literal["true", "sample", "exact", "norm", "output"]
"""What a per-example gradient is of: the log-likelihood of the data's label, of one drawn from the model, of every label
weighted by its probability, the squared norm of the output, or the output along a random direction."""

Fisher = Literal["batch", "example"]
"""What the running Fisher information averages: the square of the batch's gradient, or the squares of its examples'."""


@dataclass
class Step:
    """What a rule sees of one optimiser step, just before the optimiser moves.

    Args:
        theta: the protected parameters.
        grad: the gradient of the task loss alone, parallel to `theta`, multiplied by a loss scaler's scale; None where a
            parameter takes no part in this step.
        made: what the rule has updated, once it has called `update`.
    """

    theta: list[Tensor]
    grad: list[Tensor | None]
    made: kernels.RuleUpdate = field(default_factory=kernels.RuleUpdate)

    def update(self, **columns: Any) -> None:
        """Have all of a rule's elementwise work at this step done: before the optimiser moves, or after it for a path.

        Call it once, at most.

        Args:
            columns: fields of `rwalk.kernels.RuleUpdate`: lists of the rule's state parallel to `theta`, and numbers.
        """
        if self.made != kernels.RuleUpdate():
            raise RuntimeError("`step.update` was called twice in a step. Call it once, with all columns of the rule.")
        self.made = kernels.RuleUpdate(**columns)


class Gradients(Protocol):
    """Per-example gradients over a task's data, as `rwalk.gradients.per_example_over` makes them."""

    def __call__(
        self,
        objective: Objective,
        of: Callable[[Tensor], Tensor],
        samples: int | None = None,
        only: Collection[str] | None = None,
    ) -> list[Tensor]:
        """Return the mean over examples of `of(gradient of the objective)`, for all protected parameters or `only` some."""


class Factors(Protocol):
    """Second moments of layers, over a task's data as `rwalk.gradients.moments` makes them, or over its measured steps."""

    def __call__(self, objective: Objective, samples: int | None = None, rank: int | None = None) -> dict[str, Moments]:
        """Return the moments of the layers that can be measured, by the names of their weights."""


def no_factors(objective: Objective, samples: int | None = None, rank: int | None = None) -> dict[str, Moments]:  # noqa: ARG001
    """Return no moments: there was nothing to measure them on."""
    return {}


def no_data(
    objective: Objective,  # noqa: ARG001
    of: Callable[[Tensor], Tensor],  # noqa: ARG001
    samples: int | None = None,  # noqa: ARG001
    only: Collection[str] | None = None,  # noqa: ARG001
) -> list[Tensor]:
    """Raise a ValueError that asks for the data to measure gradients on."""
    raise ValueError(
        "`consolidate()` needs data under a rule that measures importance on the task's data. "
        "Call `consolidate(loader)`, or choose a rule that measures during training, such as `RWalk()` or `SI()`."
    )


class TaskEnd(NamedTuple):
    """What a rule sees when a task ends.

    Args:
        theta: where the optimiser left the protected parameters, by name, in the order of the rule's state.
        point: the parameters that will be kept: those of `theta`, or their average over the task.
        anchor: what earlier tasks left behind.
        gradients: per-example gradients over the task's data; raises an error when the user passed no data.
        shard_group: the ranks that hold the other parts of all these tensors, for figures about whole tensors.
        factors: second moments of layers, over the task's data or its measured steps; none where there was nothing to measure.
        squares: mean squared gradients over the measured steps, by name; None where data is measured on.
    """

    theta: Mapping[str, Tensor]
    point: Mapping[str, Tensor]
    anchor: Anchor
    gradients: Gradients = no_data
    shard_group: ShardGroup = ALONE
    factors: Factors = no_factors
    squares: Mapping[str, Tensor] | None = None

    def alone(self, objective: Objective, samples: int | None, names: Sequence[str]) -> dict[str, Tensor]:
        """Return mean squared gradients of some parameters, over the measured steps or the task's data."""
        if self.squares is not None:
            return {name: self.squares[name] for name in names if name in self.squares}
        return dict(zip(names, self.gradients(objective, torch.square, samples, only=names), strict=True)) if names else {}

    def earlier(self) -> list[Tensor | None]:
        """Return the importance that earlier tasks left, None for parameters that are new to the anchor."""
        return [self.anchor.omega.get(name) for name in self.point]

    def renew(self, omega: list[Tensor]) -> Anchor:
        """Return an anchor at `point` with this importance, which runs parallel to it."""
        return ElementwiseAnchor.at(self.point, omega)


class Defaults(NamedTuple):
    """How a rule works unless the user says otherwise: the settings of its paper."""

    strength: float = 1.0
    pull: Literal["gradient", "proximal"] = "gradient"
    average: Literal["none", "tail"] = "none"


@dataclass(frozen=True)
class Rule(ABC, Generic[State]):
    """A rule: its fields are its hyperparameters, its state is an explicit named tuple, and it knows no model.

    The fields of a state are lists parallel to the protected parameters (of tensors, numbers or None) or plain values.
    Only `observe`, `resume` and `renew` write into tensors of the state that they are given, and into no others. So a task's
    end that fails can be repeated.

    Attributes:
        measures: what the rule needs: "steps" of training, "data" at a task's end, or "nothing".
        slow: fields of its state that may be kept on another device between tasks: what only `conclude` reads.
        counters: fields of its state that count elements, so that parts of tensors have parts of the count.
        defaults: how it works unless the user says otherwise.
        anchor_kind: the kind of anchor that it makes.
        unit: of its importance: "own", or "task" if that of each task is brought to the same mean.
        walks: whether it follows the path, so that it must be told which moves are not the optimiser's. Its state then has
            `last`, where each parameter was left by the last step.
    """

    measures: ClassVar[Literal["steps", "data", "nothing"]] = "steps"
    slow: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Defaults] = Defaults()
    anchor_kind: ClassVar[type[Anchor]] = ElementwiseAnchor
    unit: ClassVar[Literal["own", "task"]] = "own"
    walks: ClassVar[bool] = False

    @abstractmethod
    def init(self, theta: list[Tensor]) -> State:
        """Return the state before the first step, for protected parameters `theta`."""

    @abstractmethod
    def observe(self, state: State, step: Step) -> State:
        """Take one optimiser step into account, just before the optimiser moves."""

    @abstractmethod
    def conclude(self, state: State, end: TaskEnd) -> tuple[Anchor, State]:
        """End a task: return the anchor that protects all tasks so far, and the state for the next task."""

    def renew(self, state: State) -> None:
        """Clear what a new task starts without. Called with the state that `conclude` returned, perhaps more than once."""

    def resume(self, state: State, theta: Sequence[Tensor], places: Sequence[int]) -> State:  # noqa: ARG002
        """Return a state that starts anew for the parameters at `places`, which something other than the optimiser has moved.

        Called between steps of a rule that `walks`; may write into the state's tensors.
        """
        return state

    @property
    def estimates(self) -> bool:
        """Whether it can protect a model before any training."""
        return self.measures != "steps"

    @property
    def moments_every(self) -> int | None:
        """After how many steps second moments of layers are measured in training; None for never."""
        return None

    @property
    def directions(self) -> int | None:
        """How many directions are kept of each matrix that is measured in training; None for all."""
        return None

    @property
    def pull_every(self) -> int:
        """After how many steps whole layers are pulled."""
        return 1

    @property
    def accumulates(self) -> bool:
        """Whether `conclude` builds on the anchor it is given, whoever made it, and not only on the rule's state."""
        return False

    @property
    def per_example(self) -> bool:
        """Whether `observe` asks for squared per-example gradients."""
        return False

    def report(
        self,
        state: State,  # noqa: ARG002
        anchor: Anchor,  # noqa: ARG002
        theta: Mapping[str, Tensor],  # noqa: ARG002
        shard_group: ShardGroup = ALONE,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return figures about the rule's own workings, by name, for `Consolidator.summary`."""
        return {}


def counted(seen: list[int], grad: Sequence[Tensor | None]) -> list[int]:
    """Count for each parameter that takes part in a step one step more."""
    return [n + (g is not None) for n, g in zip(seen, grad, strict=True)]


TINY, HUGE = 1e-30, 1e30
"""The least and the most that may be added to a denominator: float32 turns neither into 0 or infinity."""


def number(value: Any) -> Any:
    """Return a number, NumPy's or a tensor's too, as a plain one; None for anything else, also for a bool or NaN."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return value if isinstance(value, Real) and not isinstance(value, bool) and value == value else None


def check_number(rule: Rule[Any], name: str, least: float, most: float, expected: str) -> None:
    """Keep the field `name` of a rule as a plain number; raise a ValueError unless it is one from `least` to `most`."""
    value = number(getattr(rule, name))
    check(value is not None and least <= value <= most, rule, name, expected)
    object.__setattr__(rule, name, value)


def check_share(rule: Rule[Any], name: str) -> None:
    """Raise a ValueError unless the field `name` of a rule is a number from 0 to 1."""
    check_number(rule, name, 0, 1, "a number in [0, 1]")


def check_count(rule: Rule[Any], name: str, expected: str) -> None:
    """Raise a ValueError unless the field `name` of a rule is a whole number of 1 or more."""
    value = number(getattr(rule, name))
    check(isinstance(value, Integral), rule, name, expected)
    check_number(rule, name, 1, math.inf, expected)


def check_damping(rule: Rule[Any], name: str) -> None:
    """Raise a ValueError unless the field `name` of a rule, which is added to a denominator, is from `TINY` to `HUGE`."""
    check_number(rule, name, TINY, HUGE, f"a number from {TINY:g} to {HUGE:g}")


def check(holds: bool, rule: Rule[Any], name: str, expected: str) -> None:
    """Raise a ValueError about the field `name` of a rule unless `holds`."""
    if not holds:
        raise ValueError(f"`{name}` of {type(rule).__name__} must be {expected}, but is {getattr(rule, name)!r}.")


def check_finite(omega: Mapping[str, Tensor], remedy: str) -> None:
    """Raise a FloatingPointError that names the parameters whose importance is not finite."""
    bad = [name for name, o in omega.items() if not bool(torch.isfinite(o).all())]
    if bad:
        raise FloatingPointError(f"The importance of {listed(bad)} is not finite. Nothing was changed. {remedy}")
