"""One fused pass over each parameter on a CPU, compiled by Numba: lays out addresses for `numba_loops`, and calls them.

Tensors go over as addresses in a table, because handing over arrays one by one costs more than a small pass. Taken are float32
and float64, and bfloat16 beside float32 state; the next backend does the rest.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import is_
from typing import Any

import numpy as np
import torch
from numba.core import event
from torch import Tensor

from rwalk.kernels import blocked, numba_loops
from rwalk.kernels.numba_loops import (
    COARSE,
    COLUMNS,
    GRAD,
    OMEGA,
    SECOND,
    SQUARES,
    THETA,
    TILE,
    WIDE,
    after_rows,
    before_rows,
    nonfinite_rows,
)
from rwalk.kernels.passes import AfterStep, BeforeStep, Column, Metric, Part, StepGradients
from rwalk.kernels.rows import RowByRow

SHARE = 2**18
"""Elements of work below which a second thread does not pay."""
LOG = logging.getLogger("rwalk")
PRECISION = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
"""State precision of each kind of parameter that the compiled code takes."""


class Announced(event.Listener):  # type: ignore[misc]
    """Says once in a process that code of ours is compiled, which does not happen where it is found on disk."""

    def on_start(self, event: Any) -> None:
        """Be told of a function that is going to be compiled."""
        if event.data["dispatcher"].py_func.__module__ == numba_loops.__name__ and not self.said:
            self.said = True
            LOG.warning("rwalk compiles its arithmetic for this machine, which takes some seconds; later runs find it on disk.")

    def on_end(self, event: Any) -> None:
        """Be told that it is done."""

    said = False


event.register("numba:compile", Announced())


def prepare(
    theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]
) -> tuple[list[Part], list[int]]:
    """Lay out the parameters that the compiled code takes, those with the same columns together: see `passes.Prepare`."""
    groups: dict[Any, list[int]] = {}
    rest = []
    for i in places:
        held = {name: t for name, c in columns.items() if (t := c[i]) is not None}
        if theta[i].numel() and _takes(theta[i], held):
            groups.setdefault((theta[i].dtype, *((name, t.dtype) for name, t in held.items())), []).append(i)
        else:
            rest.append(i)
    return [AddressTable(theta, columns, group) for group in groups.values()], rest


def _takes(theta: Tensor, held: dict[str, Tensor]) -> bool:
    """Return whether the compiled code can work on a parameter with what belongs to it."""
    wide = PRECISION.get(theta.dtype)
    kinds = all(
        t.dtype is wide or (name == "omega" and t.dtype is torch.bfloat16 and wide is torch.float32) for name, t in held.items()
    )
    return kinds and all(t.is_cpu for t in (theta, *held.values())) and blocked.one_order([theta, *held.values()])


class AddressTable:
    """Parameters with the same columns, as addresses.

    Args:
        theta: all parameters.
        columns: what belongs to each, by name.
        places: which of them these are.
    """

    def __init__(self, theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]) -> None:
        self.places, self._theta, self._columns = places, theta, columns
        first = theta[places[0]]
        self._like = np.float64(1) if first.dtype is torch.float64 else np.float32(1)
        self._kinds = np.full(len(COLUMNS), WIDE, np.int8)
        self._kinds[[THETA, GRAD]] = COARSE if first.dtype is torch.bfloat16 else WIDE
        self._at = np.zeros((len(places), len(COLUMNS)), np.int64)
        self._at[:, THETA] = [theta[i].data_ptr() for i in places]
        self._has = {name for name, c in columns.items() if c[places[0]] is not None}
        for name in self._has:
            self._at[:, COLUMNS.index(name)] = [c.data_ptr() for i in places if (c := columns[name][i]) is not None]
        omega = columns["omega"][places[0]] if "omega" in self._has else None
        self._kinds[OMEGA] = COARSE if omega is not None and omega.dtype is torch.bfloat16 else WIDE
        self._sizes = np.array([theta[i].numel() for i in places], np.int64)
        self._elements = int(self._sizes.sum())
        self._whole = len(places) == len(theta)
        self._contiguous = all(theta[i].is_contiguous() for i in places)
        self._grad: Any = None
        self._odd: list[int] = []
        self._second: list[Tensor | None] = []
        self._seen: list[Tensor | None] = []

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each of the places a number that is 0 unless an element of its gradient, or its square, is not finite."""
        self._find(grad)
        bad = np.zeros((self._parts(), len(self.places)), np.int64)
        self._run(nonfinite_rows, (), bad)
        found = torch.from_numpy(bad.sum(0))
        for i, value in zip(self._odd, self._alone(self._odd).nonfinite(grad), strict=True):
            found[self.places.index(i)] = int(bool(value != 0))
        return found

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        self._find(step.grad)
        weight = np.array(self._mine(step.weight), self._like.dtype) if step.weight is not None else np.zeros(0)
        moved = np.zeros(len(self.places), np.int8) if step.compare else None
        walks = "previous" in self._has
        if step.skip is None or not bool(step.skip):
            squared = not walks and self._see(SQUARES, step.squares)
            scale = 1.0 if step.scale is None else float(step.scale)
            numbers = np.array((2 * step.strength, scale), self._like.dtype)
            pulls = step.strength != 0 and "point" in self._has
            flags = (walks, not walks and "fisher" in self._has, squared, pulls)
            self._run(before_rows, (weight, numbers), moved, *[flag or None for flag in flags])
            if self._odd:
                self._alone(self._odd).before(step._replace(compare=False))
        elif moved is not None:
            return self._alone(self.places).moved()
        self._grad = None
        return [] if moved is None else [self.places[k] for k in moved.nonzero()[0]]

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""
        if step.skip is not None and bool(step.skip):
            return
        metric = None if step.metric is None else step.metric.counted()
        spreads = metric is not None and "point" in self._has and self._see_second(metric)
        if spreads is None:
            self._alone(self.places, blocked.pieces).after(step)
            return
        walks = "path" in self._has
        squared = walks and self._see(SQUARES, step.squares)
        rows = np.zeros((5, len(self.places)), self._like.dtype)
        pull = (None, None, None) if metric is None else (metric.step, metric.correction, metric.eps)
        for row, values in zip(rows, (*pull, step.share, step.weight), strict=True):
            if values is not None:
                row[:] = self._mine(values)
        scale = 1.0 if step.scale is None else float(step.scale)
        numbers = np.array((step.eps, scale), self._like.dtype)
        on = np.array(self._mine(step.moved), np.int8)
        pulls = metric is not None and "point" in self._has
        averages = step.share is not None and "average" in self._has
        flags = (pulls, spreads, averages, walks, walks and "fisher" in self._has, squared, walks and step.close)
        if pulls or averages or walks:
            beyond_eps = self._run(after_rows, (rows, numbers), on, *[flag or None for flag in flags])
            if flags[-1] and step.beyond_eps is not None:
                step.beyond_eps.add_(beyond_eps)

    def _alone(self, places: list[int], pieces: Any = iter) -> RowByRow:
        """Return some parameters as rows, for what the compiled code does not take."""
        return RowByRow(self._theta, self._columns, places, pieces)

    def _mine(self, values: Sequence[Any]) -> Sequence[Any]:
        return values if self._whole else [values[i] for i in self.places]

    def _find(self, grad: StepGradients) -> None:
        """Write down where the gradients lie; those in another order or precision are odd, and are none of ours."""
        if self._grad is grad:
            return
        self._grad, self._odd = grad, []
        self._at[:, GRAD] = self._mine(grad.addresses)
        if not (self._contiguous and grad.contiguous and grad.kinds == {self._theta[self.places[0]].dtype}):
            self._odd = [i for i in self.places if not self._fits(i, grad[i])]
            self._at[[self.places.index(i) for i in self._odd], GRAD] = 0

    def _fits(self, i: int, grad: Tensor | None) -> bool:
        theta = self._theta[i]
        return grad is None or (grad.dtype is theta.dtype and blocked.one_order([theta, grad]))

    def _see(self, column: int, tensors: Column | None) -> bool:
        """Write down where tensors in state precision lie, in the order of the parameters; return whether there are any."""
        if tensors is None:
            return False
        mine: list[Tensor | None] = [self._ordered(i, tensors[i]) for i in self.places]
        self._seen = mine  # which keeps copies alive
        self._at[:, column] = [0 if t is None else t.data_ptr() for t in mine]
        return any(t is not None for t in mine)

    def _ordered(self, i: int, tensor: Tensor | None) -> Tensor | None:
        """Return a tensor in the memory order of a parameter, a copy where it is in another one."""
        if tensor is None or blocked.one_order([self._theta[i], tensor]):
            return tensor
        return torch.empty_like(self._theta[i], dtype=tensor.dtype).copy_(tensor)

    def _see_second(self, metric: Metric) -> bool | None:
        """Write down where second moments lie; return whether there are any, None where compiled code takes none of them."""
        mine = self._mine(metric.second)
        if len(self._second) != len(mine) or not all(map(is_, mine, self._second)):
            kinds = {s.dtype for s in mine if s is not None}
            wide = PRECISION[self._theta[self.places[0]].dtype]
            if not kinds <= {wide} and not (kinds == {torch.bfloat16} and wide is torch.float32):
                return None
            pairs = zip(self.places, mine, strict=True)
            if not all(s is None or (s.is_cpu and blocked.one_order([self._theta[i], s])) for i, s in pairs):
                return None
            self._second = list(mine)
            self._kinds[SECOND] = COARSE if kinds == {torch.bfloat16} else WIDE
        self._at[:, SECOND] = [0 if s is None else s.data_ptr() for s in mine]
        return bool(self._at[:, SECOND].any())

    def _parts(self) -> int:
        return max(1, min(torch.get_num_threads(), self._elements // SHARE))

    def _run(self, kernel: Any, columns: tuple[Any, ...], *rest: Any) -> int:
        """Call compiled code, on as many of torch's threads as the work is worth, and add up what it returns."""
        parts = self._parts()

        def call(part: int) -> int:
            scratch = np.empty((3, TILE), self._like.dtype) if COARSE in self._kinds else None
            address = 0 if scratch is None else scratch.ctypes.data
            return int(kernel(self._at, self._kinds, self._sizes, *columns, address, self._like, part, parts, *rest) or 0)

        others = [_pool().submit(call, part) for part in range(1, parts)]
        return call(0) + sum(other.result() for other in others)


@cache
def _pool() -> ThreadPoolExecutor:
    """Keep threads for the compiled code, which holds no lock; Numba's own threads cannot be shared between callers."""
    return ThreadPoolExecutor(thread_name_prefix="rwalk")


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive it
