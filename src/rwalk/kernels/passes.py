"""What a step does to protected parameters: one pass over memory before the optimiser moves, and one after.

`reference` has the formulas. A row is what they are applied to: one parameter with what belongs to it, many small ones that lie
side by side, or a piece of a large one.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Column = Sequence[Tensor | None]


class StepGradients(list[Tensor | None]):
    """The gradients of a step, None where a parameter has none, and what was looked up about them."""

    @cached_property
    def there(self) -> list[Tensor]:
        """Those that there are."""
        return list(self) if self.complete else [g for g in self if g is not None]  # type: ignore[arg-type]

    @cached_property
    def complete(self) -> bool:
        """Whether there are all of them."""
        return not any(map(is_, self, repeat(None)))

    @cached_property
    def addresses(self) -> list[int]:
        """Where they lie, 0 for none."""
        if self.complete:
            return list(map(Tensor.data_ptr, self.there))
        return [0 if g is None else g.data_ptr() for g in self]

    @cached_property
    def sizes(self) -> list[int]:
        """How many elements they have, 0 for none."""
        return list(map(Tensor.numel, self.there)) if self.complete else [0 if g is None else g.numel() for g in self]

    @cached_property
    def contiguous(self) -> bool:
        """Whether all that there are lie in the order of their indices, without gaps."""
        return all(map(Tensor.is_contiguous, self.there))

    @cached_property
    def kinds(self) -> set[torch.dtype]:
        """Their types."""
        return {g.dtype for g in self.there}


class RuleUpdate(NamedTuple):
    """What a rule has done to its state at a step; lists run parallel to the parameters.

    A rule that follows the path is updated once the optimiser has moved, any other one before.

    Args:
        fisher: running Fisher information.
        weight: the new square's share in it, for each parameter.
        path: the path integral so far.
        last: where the optimiser's last move ended.
        mark: the parameters at the start of the window.
        score: where the path of a finished window goes.
        close: whether this step ends a window.
        eps: damping in the score's denominator.
        beyond_eps: one element, to which is added for how many elements a finished window was longer than eps allows.
    """

    fisher: list[Tensor] | None = None
    weight: Sequence[float] | None = None
    path: list[Tensor] | None = None
    last: list[Tensor] | None = None
    mark: list[Tensor] | None = None
    score: list[Tensor] | None = None
    close: bool = False
    eps: float = 0.0
    beyond_eps: Tensor | None = None


class BeforeStep(NamedTuple):
    """One step before the optimiser moves: keep the gradient, update the Fisher information, add the pull.

    Args:
        grad: the gradients, multiplied by `scale`; None where a parameter takes no part in the step.
        squares: what to average in the Fisher information, multiplied by the square of `scale`; None for the gradient's square.
        weight: the new square's share in it, for each parameter.
        strength: factor of the penalty whose gradient is added; 0 for no pull.
        scale: what a loss scaler has multiplied the gradients by: one element, on their device; None for 1.
        skip: one element, not 0 if the optimiser is going to leave out this step, and so shall the pass; None for 0.
        compare: whether to find the parameters that are not where the last step left them.
    """

    grad: StepGradients
    squares: Column | None = None
    weight: Sequence[float] | None = None
    strength: float = 0.0
    scale: Tensor | None = None
    skip: Tensor | None = None
    compare: bool = False


class Metric(NamedTuple):
    """In which metric the proximal pull is made; lists run parallel to the parameters.

    Args:
        step: 2 * strength * learning rate, or what takes its place.
        second: the optimiser's running mean of squared gradients; None where the pull is along `step` alone.
        eps: what the optimiser adds to the root of `second`.
        correction: what `second` is divided by; where `made` is given, the decay of `second` instead.
        made: the count of the optimiser's steps where it lies on a device, None elsewhere; None for no such count at all. Then
            `second` is divided by 1 - correction ** made.
    """

    step: Sequence[float]
    second: Column
    eps: Sequence[float]
    correction: Sequence[float]
    made: Column | None = None

    def counted(self) -> "Metric":
        """Return it without `made`; this waits for the device."""
        if self.made is None:
            return self
        known = iter(torch.stack([m.float() for m in self.made if m is not None]).tolist())
        pairs = zip(self.correction, self.made, strict=True)
        return self._replace(correction=[c if m is None else 1 - c ** next(known) for c, m in pairs], made=None)


class AfterStep(NamedTuple):
    """One step after the optimiser has moved: pull and average the parameters, then update a rule that follows the path.

    Args:
        moved: which parameters have moved.
        metric: that of the proximal pull; None for no pull.
        share: of each parameter in its average; None for no average.
        squares: as in `BeforeStep`, for a rule that follows the path.
        weight: likewise.
        close: whether a window ends.
        eps: damping in the score's denominator.
        beyond_eps: one element to add to: in how many elements the squared Riemannian distance of a window exceeded eps.
        scale: what `squares` were multiplied by the square of.
        skip: one element, not 0 if the step did not count and nothing is to be done; None for 0.
    """

    moved: Sequence[bool]
    metric: Metric | None = None
    share: Sequence[float] | None = None
    squares: Column | None = None
    weight: Sequence[float] | None = None
    close: bool = False
    eps: float = 0.0
    beyond_eps: Tensor | None = None
    scale: Tensor | None = None
    skip: Tensor | None = None


class BeforeRow(NamedTuple):
    """The tensors that `BeforeStep` works on, all of one shape, and the numbers."""

    theta: Any
    grad: Any
    previous: Any = None
    fisher: Any = None
    squares: Any = None
    point: Any = None
    omega: Any = None
    last: Any = None
    weight: float = 0.0
    strength: float = 0.0


class AfterRow(NamedTuple):
    """The tensors that `AfterStep` works on, all of one shape, and the numbers."""

    theta: Any
    point: Any = None
    omega: Any = None
    second: Any = None
    average: Any = None
    previous: Any = None
    path: Any = None
    last: Any = None
    fisher: Any = None
    squares: Any = None
    mark: Any = None
    score: Any = None
    step: float = 0.0
    correction: float = 1.0
    adam_eps: float = 0.0
    share: float = 0.0
    weight: float = 0.0
    eps: float = 0.0


class Part(Protocol):
    """Some parameters that one backend works on, laid out in its way.

    Attributes:
        places: where they stand in the lists of a step.
    """

    places: list[int]

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each of the places a number that is 0 unless an element of its gradient, or its square, is not finite."""

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""


Prepare = Callable[[Sequence[Tensor], dict[str, list[Tensor | None]], list[int]], tuple[list[Part], list[int]]]
"""What each backend has as `prepare`: it lays out those places that it can work on, and returns the others."""
