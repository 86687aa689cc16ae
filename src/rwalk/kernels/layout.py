"""What a step touches, laid out once: a step then hands over its gradients and a few numbers."""

from collections.abc import Mapping, Sequence
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rwalk.kernels.passes import AfterStep, BeforeStep, Column, Part


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
        self._where = whereabouts(theta)
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
        self._anchored = _anchored(self.columns)

    def __len__(self) -> int:
        """Count the parameters."""
        return len(self._theta)

    def fits(
        self, columns: Mapping[str, Column | None], ascends: Sequence[bool] | None, chain: tuple[ModuleType, ...]
    ) -> bool:
        """Return whether the same tensors belong to the parameters as when it was made."""
        if ascends != self._ascends or chain is not self._chain:
            return False
        given = {name: column for name, column in columns.items() if column is not None}
        if given.keys() != self._given.keys() or not all(_same(self.columns[name], c) for name, c in given.items()):
            return False
        return self._anchored == _anchored(columns)

    def in_place(self, theta: Sequence[Tensor]) -> bool:
        """Return whether the parameters lie where they did, in the same shape, order and precision."""
        return whereabouts(theta) == self._where

    def nonfinite(self, grad: Column) -> Tensor:
        """Return for each parameter a number that is 0 unless an element of its gradient, or its square, is not finite."""
        if not grad:
            return torch.zeros(0, device="cpu")
        if len(self._parts) == 1 and self._parts[0][0].places == list(range(len(grad))):
            found = self._parts[0][0].nonfinite(grad)
            return found if isinstance(found, Tensor) else torch.stack(found)
        bad: list[Any] = [None] * len(grad)
        for part, _ in self._parts:
            for i, value in zip(part.places, part.nonfinite(grad), strict=True):
                bad[i] = value
        device = max((b.device for b in bad), key=lambda d: d.type != "cpu")
        return torch.stack([b.to(device, torch.float32) for b in bad])

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        moved: list[int] = []
        for part, up in self._parts:
            moved += part.before(step._replace(scale=_negative(step, self._theta[0])) if up else step)
        return sorted(moved)

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""
        for part, _ in self._parts:
            part.after(step)


def whereabouts(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Describe where tensors lie, and in which form."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        [t.shape for t in tensors],
        list(map(Tensor.stride, tensors)),
        [t.dtype for t in tensors],
    )


def _anchored(columns: Mapping[str, Column | None]) -> list[int]:
    """Return the addresses of an anchor's tensors, which users can reach."""
    return [0 if t is None else t.data_ptr() for name in ("point", "omega") for t in columns.get(name) or ()]


def _same(mine: Sequence[Any], given: Sequence[Any]) -> bool:
    return len(mine) == len(given) and all(map(is_, mine, given))


def _negative(step: BeforeStep, like: Tensor) -> Tensor:
    """Return the loss scale of gradients that the optimiser goes up along."""
    return torch.full((), -1.0, device=like.device) if step.scale is None else -step.scale
