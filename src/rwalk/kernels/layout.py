"""What a step touches, laid out once: a step then hands over its gradients and a few numbers."""

from collections.abc import Mapping, Sequence
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rwalk.kernels import blocked
from rwalk.kernels.passes import AfterStep, BeforeStep, Column, Part, StepGradients


class Layout:
    """Parameters with what belongs to each, divided among backends.

    It holds all of the memory that it knows by address, so that none of it can come to serve something else: a parameter that
    is where it was has not been given other memory in between.

    Args:
        theta: the parameters.
        columns: what belongs to each, by name: "previous" (where the gradient is kept for the pass after the step), "fisher",
            "path", "last", "mark" and "score" of a rule, "point" and "omega" of an anchor, and "average". Lists run parallel to
            `theta`; a backend may replace entries by the same numbers in another place.
        ascends: for each parameter, whether the optimiser goes up along its gradient; None for down everywhere.
        chain: the backends; each takes what it can work on and leaves the rest to the next one.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        columns: Mapping[str, Column | None],
        ascends: Sequence[bool] | None,
        chain: tuple[ModuleType, ...],
    ) -> None:
        self.columns = {name: list(column) for name, column in columns.items() if column is not None and len(column)}
        self._given = {name: column for name, column in columns.items() if column is not None}
        self._theta, self._ascends, self._chain = [t.detach() for t in theta], ascends, chain
        self._addresses, self._sizes = list(map(Tensor.data_ptr, theta)), list(map(Tensor.numel, theta))
        self._strides, self._contiguous = list(map(Tensor.stride, theta)), all(map(Tensor.is_contiguous, theta))
        self._parts: list[tuple[Part, bool]] = []
        for up in (False, True):
            places = [i for i in range(len(theta)) if (ascends is not None and ascends[i]) == up]
            for backend in chain:
                if places:
                    parts, places = backend.prepare(self._theta, self.columns, places)
                    self._parts += [(part, up) for part in parts]
        for name, column in self._given.items():
            if isinstance(column, list):
                column[:] = self.columns[name]

    def __len__(self) -> int:
        """Count the parameters."""
        return len(self._theta)

    def fits(self, columns: Mapping[str, Column | None], ascends: Sequence[bool] | None, chain: tuple[ModuleType, ...]) -> bool:
        """Return whether the same tensors belong to the parameters as when it was made."""
        if ascends != self._ascends or chain is not self._chain:
            return False
        given = {name: column for name, column in columns.items() if column is not None}
        return given.keys() == self._given.keys() and all(_same(self.columns[name], c) for name, c in given.items())

    def in_place(self, theta: Sequence[Tensor]) -> bool:
        """Return whether the parameters are as many elements in the same order where they were.

        Then they are of the same kind too, as nothing else can have come to lie there.
        """
        if not self.still_in_place(theta) or list(map(Tensor.numel, theta)) != self._sizes:
            return False
        if self._contiguous:
            return all(map(Tensor.is_contiguous, theta))
        return list(map(Tensor.stride, theta)) == self._strides

    def still_in_place(self, theta: Sequence[Tensor]) -> bool:
        """Return whether the parameters lie where they did just before the optimiser's step."""
        return list(map(Tensor.data_ptr, theta)) == self._addresses

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each parameter a number that is 0 unless an element of its gradient, or its square, is not finite."""
        if not grad:
            return torch.zeros(0, device="cpu")
        if grad.sizes != self._sizes:
            refuse_sizes(grad, self._sizes)
        if len(self._parts) == 1 and self._parts[0][0].places == list(range(len(grad))):
            return self._parts[0][0].nonfinite(grad)
        parts = [(part.places, part.nonfinite(grad)) for part, _ in self._parts]
        device = next((found.device for _, found in parts if not found.is_cpu), torch.device("cpu"))
        bad: list[Any] = [None] * len(grad)
        for places, found in parts:
            for i, value in zip(places, found.to(device, torch.float32), strict=True):
                bad[i] = value
        return torch.stack(bad)

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        moved: list[int] = []
        for part, up in self._parts:
            moved += part.before(step._replace(scale=_negative(step, self._theta[0])) if up else step)
        return sorted(moved)

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step; a window ends for parameters too that did not move in it."""
        for part, _ in self._parts:
            part.after(step)
        if step.close and not all(step.moved) and not (step.skip is not None and bool(step.skip)):
            self._close(step)

    def _close(self, step: AfterStep) -> None:
        """End the window of parameters that have taken no part in its last step."""
        for i, theta in enumerate(self._theta):
            if not step.moved[i]:
                held = [t for name in ("fisher", "path", "score", "mark") if (t := self.columns[name][i]) is not None]
                fisher, path, score, mark = held
                beyond_eps = blocked.settle_(theta, fisher, path, score, mark, step.eps)
                if step.beyond_eps is not None:
                    step.beyond_eps.add_(beyond_eps.to(step.beyond_eps.device))


def refuse_sizes(grad: StepGradients, sizes: Sequence[int]) -> None:
    """Raise a RuntimeError for gradients of other sizes than the parameters'."""
    if any(g is not None and g.numel() != size for g, size in zip(grad, sizes, strict=True)):
        raise RuntimeError(
            "A gradient has another number of elements than its parameter. Call `zero_grad()` before the next backward pass "
            "where a parameter's size is changed."
        )


def _same(mine: Sequence[Any], given: Sequence[Any]) -> bool:
    return len(mine) == len(given) and all(map(is_, mine, given))


def _negative(step: BeforeStep, like: Tensor) -> Tensor:
    """Return the loss scale of gradients that the optimiser goes up along."""
    return torch.full((), -1.0, device=like.device) if step.scale is None else -step.scale
