"""The layout of what a step touches: laid out once, and anew where something has come to lie elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk import kernels
from rwalk.consolidation.memory import Memory

ANCHOR = ("point", "omega")
"""The columns that an anchor has."""
MANY = 100
"""From how many tensors on it pays to lay them out where a step touches nothing but their gradients."""


class StepLayout:
    """Lays out parameters and the columns beside them for the passes of a step.

    Args:
        memory: holds what is laid out.

    Attributes:
        previous: a tensor for each of the path's, in which a step keeps the path as it was.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.release()

    def release(self) -> None:
        """Let go of what only steps need."""
        self._current: kernels.Layout | None = None
        self._held: tuple[Any, dict[str, Any], list[int]] = (None, {}, [])
        self.previous: list[Tensor] = []
        self._path: list[Tensor] | None = None

    def drop(self) -> None:
        """Have the next pass lay everything out anew."""
        self._current = None

    def in_place(self, theta: list[Tensor]) -> bool:
        """Return whether there is a layout, and the parameters are as many elements in the same order where it has them."""
        if self._current is not None and not self._current.in_place(theta):
            self._current = None
        return self._current is not None

    def nonfinite(self, grad: kernels.StepGradients) -> Tensor:
        """Return for each parameter a number that is 0 unless an element of its gradient, or its square, is not finite."""
        if self._current is None and not self._memory.by_element and len(grad) >= MANY:
            self._current = kernels.laid_out_alone(list(self._memory.protected.theta.values()))
        return kernels.nonfinite(grad) if self._current is None else self._current.nonfinite(grad)

    def after_step(self, optimizer: Optimizer, theta: list[Tensor], made: kernels.RuleUpdate) -> kernels.Layout:
        """Return the layout that the pass before the step had, unless the optimiser has put parameters elsewhere."""
        if self._current is not None and self._current.still_in_place(theta):
            return self._current
        self._current = None
        return self.of(optimizer, theta, made)

    def of(self, optimizer: Optimizer, theta: list[Tensor], made: kernels.RuleUpdate) -> kernels.Layout:
        """Return the layout of what a step touches: the last one, unless something is elsewhere now."""
        columns = self._columns(made)
        layout = kernels.laid_out(self._current, theta, columns, self._memory.protected.ascends(optimizer))
        if layout is not self._current:
            self._current = layout
            self._take_over(columns)
        return layout

    def _columns(self, made: kernels.RuleUpdate) -> dict[str, Any]:
        """List what lies beside the parameters."""
        memory, names = self._memory, list(self._memory.protected.theta)
        columns: dict[str, Any] = {name: getattr(made, name) for name in ("fisher", "path", "last", "mark", "score")}
        if made.path is not None:
            columns["previous"] = self._beside(made.path)
        if memory.anchor.point:
            columns |= self._anchor_columns(names)
        if memory.averages:
            columns["average"] = [memory.tail.average[name] for name in names]
        return columns

    def _take_over(self, columns: dict[str, Any]) -> None:
        """Have the memory hold the tensors of a new layout, which may have moved them."""
        memory, names = self._memory, list(self._memory.protected.theta)
        places = {"average": memory.tail.average, "point": memory.anchor.point, "omega": memory.anchor.omega}
        for name, into in places.items():
            _put_back(columns.get(name), names, into)
        self._held = memory.anchor, {name: columns[name] for name in ANCHOR if name in columns}, _addresses(columns)

    def _beside(self, path: list[Tensor]) -> list[Tensor]:
        """Return the tensors in which a step keeps the path as it was."""
        if self._path is not path:
            self._path = path
            if not _alike(self.previous, path):
                self.previous = [torch.empty_like(one) for one in path]
        return self.previous

    def _anchor_columns(self, names: list[str]) -> dict[str, Any]:
        """Return what the anchor holds; where users have been given it, see whether it is still what was laid out."""
        anchor, columns, addresses = self._held
        if self._current is None or anchor is not self._memory.anchor:
            return self._memory.anchor.columns(names)
        if self._memory.shown:
            columns = self._memory.anchor.columns(names)
            if _addresses(columns) != addresses:
                self._current = None
        return columns


def _alike(mine: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    """Return whether there is a tensor of the same kind, shape and place beside each."""
    pairs = zip(mine, like, strict=True) if len(mine) == len(like) else ()
    return len(mine) == len(like) and all(a.shape == b.shape and a.dtype is b.dtype and a.device == b.device for a, b in pairs)


def _addresses(columns: Mapping[str, Any]) -> list[int]:
    """Return where an anchor's tensors lie."""
    return [0 if t is None else t.data_ptr() for name in ANCHOR for t in columns.get(name, ())]


def _put_back(column: list[Tensor | None] | None, names: list[str], into: dict[str, Tensor]) -> None:
    """Have a dictionary hold the tensors of a column."""
    into |= {name: tensor for name, tensor in zip(names, column or (), strict=False) if tensor is not None}
