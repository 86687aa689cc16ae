"""Small tensors on a CPU whose state lies side by side, so that one operation serves all of them."""

from collections.abc import Sequence
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor

from rwalk.kernels import reference
from rwalk.kernels.passes import AfterRow, AfterStep, BeforeRow, BeforeStep, StepGradients
from rwalk.kernels.rows import AFTER, BEFORE, RowByRow

SMALL = 2**14
"""Elements up to which a tensor costs more in calls than in bytes."""
WIDE = (torch.float32, torch.float64)
"""Kinds of parameters whose state has their own precision, so that values may be rounded where they lie side by side."""


def packed(
    theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int], size: int
) -> tuple[list[list[int]], list[int]]:
    """Group the places of small tensors that can lie side by side, at most `size` elements together; return the others too."""
    waiting: dict[Any, list[int]] = {}
    groups, rest = [], []
    for i in places:
        t = theta[i]
        held: list[Any] = [t, *(h for c in columns.values() if (h := c[i]) is not None)]
        fits = t.dtype in WIDE and 0 < t.numel() <= SMALL and _dense(t)
        if not fits or not all(h.is_cpu and h.shape == t.shape for h in held):
            rest.append(i)
            continue
        kind = (t.dtype, *(None if (h := c[i]) is None else h.dtype for c in columns.values()))
        group = waiting.setdefault(kind, [])
        if group and sum(theta[k].numel() for k in group) + t.numel() > size:
            groups.append(waiting.pop(kind))
            group = waiting.setdefault(kind, [])
        group.append(i)
    return [*groups, *waiting.values()], rest


def _dense(t: Tensor) -> bool:
    """Return whether a tensor fills its stretch of memory, in any order."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(order).is_contiguous()


class Pack:
    """Small tensors of one kind. What belongs to them is moved into one vector for each column, and they are views of it.

    Args:
        theta: all parameters.
        columns: what belongs to each, by name; entries are replaced by views of the vectors.
        places: which of them these are.
    """

    def __init__(self, theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]) -> None:
        self.places, self._theta = places, [theta[i] for i in places]
        self._columns = {name: self._moved(column) for name, column in columns.items() if column[places[0]] is not None}
        self._flat = [in_storage_order(t) for t in self._theta]
        self._known: list[Tensor] = []
        self._places: list[int] = []
        self._flat_second: list[Tensor] = []
        self._gathered: Any = None
        self._whole = len(places) == len(theta)
        self._alone = RowByRow(theta, columns, places, iter)

    @cached_property
    def _values(self) -> "Views":
        return Views(self._theta, self._theta[0].dtype)

    @cached_property
    def _grads(self) -> "Views":
        return Views(self._theta, self._theta[0].dtype)

    @cached_property
    def _seconds(self) -> "Views":
        return Views(self._theta, self._theta[0].dtype)

    def _moved(self, column: list[Tensor | None]) -> Tensor:
        """Move a column into one vector, and return it."""
        held = [t for i in self.places if (t := column[i]) is not None]
        side_by_side = Views(self._theta, held[0].dtype)
        side_by_side.gather(held)
        for i, view in zip(self.places, side_by_side.views, strict=True):
            column[i] = view
        return side_by_side.vector

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each of the places a number that is 0 unless an element of its gradient, or its square, is not finite."""
        if self._gather(grad):
            norm = torch.linalg.vector_norm(self._grads.vector)
            if not self._columns:
                self._gathered = None  # no pass follows, and gradients are not to be kept
            if bool(torch.isfinite(norm)):
                return torch.zeros(len(self.places), device="cpu")
        return self._alone.nonfinite(grad)

    def _gather(self, grad: StepGradients) -> bool:
        """Lay the gradients side by side, if all are there."""
        if self._gathered is not grad:
            mine: Any = grad.there if self._whole and grad.complete else [g for i in self.places if (g := grad[i]) is not None]
            if len(mine) < len(self.places):
                return False
            self._grads.gather(mine)
            self._gathered = grad
        return True

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        weight = self._one(step.weight)
        pulls = step.strength != 0 and "point" in self._columns
        if weight is None or step.squares is not None or step.skip is not None or not self._gather(step.grad):
            return self._alone.before(step)
        if step.compare or pulls:
            torch.cat(self._flat, out=self._values.vector)
        held: dict[str, Any] = {name: self._columns.get(name) for name in (*BEFORE, *["last"] * step.compare)}
        row = BeforeRow(self._values.vector, self._grads.vector, **held, weight=weight, strength=step.strength)
        moved = reference.before_row_(row, step.scale)
        if pulls:
            torch._foreach_copy_([g for i in self.places if (g := step.grad[i]) is not None], self._grads.views)
        self._gathered = None
        return self._alone.moved() if moved else []

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""
        numbers = self._numbers(step)
        if numbers is None or step.squares is not None or step.skip is not None or not all(step.moved[i] for i in self.places):
            self._alone.after(step)
            return
        torch.cat(self._flat, out=self._values.vector)
        held: dict[str, Any] = {name: self._columns.get(name) for name in AFTER}
        row = AfterRow(self._values.vector, **held, **numbers, eps=step.eps)
        beyond_eps = reference.after_row_(row, step.close)
        if beyond_eps is not None and step.beyond_eps is not None:
            step.beyond_eps.add_(beyond_eps)
        if step.metric is not None and row.point is not None:
            torch._foreach_copy_(self._theta, self._values.views)

    def _numbers(self, step: AfterStep) -> dict[str, Any] | None:
        """Return the numbers that all of these share, and the second moments side by side; None where they do not agree."""
        numbers: dict[str, Any] = {"weight": self._one(step.weight), "share": self._one(step.share)}
        if step.metric is not None:
            m = step.metric.counted()
            numbers |= {"step": self._one(m.step), "adam_eps": self._one(m.eps), "correction": self._one(m.correction)}
            second = [s for i in self.places if (s := m.second[i]) is not None]
            if second and (len(second) < len(self.places) or not all(s.is_cpu for s in second)):
                return None
            if second and "point" in self._columns:
                places = list(map(Tensor.data_ptr, second))
                if places != self._places or not all(map(is_, second, self._known)):
                    if any(
                        s.stride() != t.stride() or s.dtype is not t.dtype for s, t in zip(second, self._theta, strict=True)
                    ):
                        return None
                    self._known, self._places, self._flat_second = second, places, [in_storage_order(s) for s in second]
                torch.cat(self._flat_second, out=self._seconds.vector)
                numbers["second"] = self._seconds.vector
        return None if any(value is None for value in numbers.values()) else numbers

    def _one(self, numbers: Sequence[float] | None) -> float | None:
        """Return the number that all of these share; None if they differ."""
        if numbers is None:
            return 0.0
        mine = set(numbers) if self._whole else {numbers[i] for i in self.places}
        return mine.pop() if len(mine) == 1 else None


def in_storage_order(t: Tensor) -> Tensor:
    """View a tensor without gaps as a vector."""
    return t.detach().as_strided((t.numel(),), (1,))


class Views:
    """A vector, and views of it in the shape and order of some tensors.

    Args:
        like: the tensors.
        dtype: the kind of the vector.
    """

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype) -> None:
        sizes = [t.numel() for t in like]
        self.vector = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
        split = zip(self.vector.split(sizes), like, strict=True)
        self.views = [piece.as_strided(t.shape, t.stride()) for piece, t in split]

    def gather(self, tensors: list[Tensor]) -> None:
        """Copy tensors here."""
        torch._foreach_copy_(self.views, tensors)
