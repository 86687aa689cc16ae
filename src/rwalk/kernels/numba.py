"""One fused pass over each parameter on a CPU, compiled by Numba: lays out tensors for the loops of `loops`, and calls them.

Tensors go over as addresses in a table, because handing over arrays one by one costs more than a small visit. Taken are float32
and float64, and bfloat16 beside float32 state; the next backend does the rest.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwalk.kernels.blocked import AnyRow, one_order
from rwalk.kernels.loops import COARSE, NONE, TILE, WIDE, Compiled, after_rows, visit_rows
from rwalk.kernels.reference import noise, noise_start
from rwalk.kernels.visits import After, Rates, Row, Visit

SHARE = 2**18
"""Elements of work below which a second thread does not pay."""
ROW = (COARSE, COARSE, WIDE, WIDE, WIDE, WIDE, COARSE, WIDE, WIDE, COARSE, WIDE, WIDE)
AFTER = (COARSE, WIDE, COARSE, COARSE, WIDE)
"""The most that the compiled code takes in each column of `Row` and `After`."""
GRAD, PATH, PREVIOUS, SCORE, FISHER, SQUARES, OMEGA, FIRST, SECOND, MOVES = 1, 2, 4, 5, 6, 7, 9, 10, 11, 12
"""Places of columns of `Row`, and after them of whether the optimiser's step is to be made."""
STILL = Rates(0.0)
"""Stands where the optimiser makes its own step."""
PRECISION = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
"""State precision of each kind of parameter that the compiled code takes."""
LAYOUT: tuple[Any, ...] = (np.int64, np.int8, np.int64)
CPU = torch.device("cpu")


def visit_(rows: Iterable[Row], visit: Visit) -> tuple[list[Row], list[Tensor]]:
    """Visit parameters before a step: see `Visit`. Returns the rows left to the next backend, and counts as `settle_` does."""
    tables, left = _tables(rows, ROW)
    if not tables or visit.left_out:
        return left, []
    scale = 1.0 if visit.scale is None else float(visit.scale)
    numbers = (visit.eps, 2 * visit.strength, scale)
    rest = (visit.close, noise_start(visit.tick), noise(CPU).numpy())
    far = []
    for there, table in tables.items():
        has = [there[place] for place in (GRAD, PATH, PREVIOUS, SCORE, FISHER, SQUARES, OMEGA, MOVES, FIRST, SECOND)]
        count = _run(visit_rows, table, numbers, *rest, *(flag or None for flag in has))
        far += [torch.tensor(count)] if visit.close and there[PATH] and there[SCORE] else []
    return left, far


def after_(rows: Iterable[After]) -> list[After]:
    """Visit parameters after a step: see `After`. Returns the rows left to the next backend."""
    tables, left = _tables(rows, AFTER)
    for there, table in tables.items():
        _run(after_rows, table, (), *(flag or None for flag in there[2:5]))
    return left


def _tables(rows: Iterable[AnyRow], kinds: tuple[int, ...]) -> tuple[dict[tuple[Any, ...], tuple[Any, ...]], list[AnyRow]]:
    """Lay out rows for the compiled code, those with the same columns together: addresses, kinds, sizes and numbers.

    The keys say for each column whether it is there, then whether the optimiser's step is to be made, and the precision.
    Also returns the rows that the compiled code cannot take.
    """
    entries: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    left: list[AnyRow] = []
    for row in rows:
        tensors: tuple[Any, ...] = row[: len(kinds)]
        moves, numbers = _numbers(row)
        takes = row.whole and not (moves and row.theta.dtype is torch.bfloat16)
        found: Any = _kinds(tensors, kinds) if takes else None
        if found is None:
            left.append(row)
            continue
        there = (*map(bool, found), moves, PRECISION[row.theta.dtype])
        addresses = tuple([0 if t is None else t.data_ptr() for t in tensors])
        entries.setdefault(there, []).append((addresses, found, row.theta.numel(), numbers))
    tables = {}
    for there, mine in entries.items():
        kind = np.float64 if there[-1] is torch.float64 else np.float32
        tables[there] = tuple(map(_array, zip(*mine, strict=True), (*LAYOUT, kind)))
    return tables, left


def _numbers(row: Row | After) -> tuple[bool, tuple[Any, ...]]:
    """Return whether the optimiser's step is to be made, and the numbers of a row."""
    if isinstance(row, After):
        return False, row[len(AFTER) :]
    return row.rates is not None, (row.weight, *(row.rates or STILL))


@lru_cache(maxsize=64)
def _array(values: tuple[Any, ...], dtype: Any) -> Any:
    """Make a column of a table; most are as at the step before, gradients are often where they were then."""
    return np.array(values, dtype)


def _kinds(tensors: tuple[Any, ...], allowed: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the kind of each column of a row; None if one is not what the compiled code knows, or in another order."""
    wide = PRECISION.get(tensors[0].dtype)
    if wide is None or not tensors[0].is_cpu:
        return None
    present = [t for t in tensors if t is not None]
    if all(t.dtype is wide for t in present) and all(map(Tensor.is_contiguous, present)):  # nearly always
        return tuple([NONE if t is None else WIDE for t in tensors])
    kinds = []
    for t, most in zip(tensors, allowed, strict=True):
        dtype = None if t is None else t.dtype
        kind = NONE if t is None else WIDE if dtype is wide else COARSE
        if kind > most or (kind == COARSE and not (dtype is torch.bfloat16 and wide is torch.float32)):
            return None
        kinds.append(kind)
    return tuple(kinds) if one_order(present) else None


def _run(kernel: Compiled, table: tuple[Any, ...], numbers: tuple[float, ...], *rest: Any) -> int:
    """Call compiled code, on as many of torch's threads as the work is worth, and add up what it returns."""
    dtype = table[3].dtype
    parts = max(1, min(torch.get_num_threads(), int(table[2].sum()) // SHARE))

    def call(part: int) -> int:
        scratch = np.empty((4, TILE), dtype)
        return int(kernel(*table, np.array(numbers, dtype), scratch.ctypes.data, dtype.type(1), part, parts, *rest))

    others = [_pool().submit(call, part) for part in range(1, parts)]
    return call(0) + sum(other.result() for other in others)


@cache
def _pool() -> ThreadPoolExecutor:
    """Keep threads for the compiled code, which holds no lock; Numba's own threads cannot be shared between callers."""
    return ThreadPoolExecutor(thread_name_prefix="rwalk")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
