"""One fused pass over each parameter on a CPU, compiled by Numba: lays out tensors for `numba_loops`, and calls them.

Tensors go over as addresses in a table, because handing over arrays one by one costs more than a small pass. Taken are float32
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
from rwalk.kernels.numba_loops import (
    COARSE,
    FISHER,
    GRAD,
    NONE,
    OMEGA,
    PATH,
    SCORE,
    SQUARES,
    TILE,
    WIDE,
    Compiled,
    after_step_rows,
    before_step_rows,
)
from rwalk.kernels.passes import PostStepRow, PreStepPass, PreStepRow, counted

SHARE = 2**18
"""Elements of work below which a second thread does not pay."""
ROW = (COARSE, COARSE, WIDE, WIDE, WIDE, WIDE, WIDE, WIDE, WIDE, COARSE)
AFTER = (COARSE, WIDE, COARSE, COARSE, WIDE)
"""The most that the compiled code takes in each column of `PreStepRow` and `PostStepRow`."""
FLAGS = (GRAD, PATH, SCORE, FISHER, SQUARES, OMEGA)
"""The columns that `before_step_rows` handles only where they are present."""
PRECISION = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
"""State precision of each kind of parameter that the compiled code takes."""

Key = tuple[Any, ...]
Entry = tuple[tuple[int, ...], int, tuple[float, ...]]


def before_step_(rows: Iterable[PreStepRow], step: PreStepPass) -> tuple[list[PreStepRow], list[Tensor]]:
    """Update parameters before a step: see `PreStepPass`. Returns rows for the next backend, and the counts of `settle_`."""
    tables, left = _tables(rows)
    if not tables or step.left_out:
        return left, []
    numbers = (step.eps, 2 * step.strength, 1.0 if step.scale is None else float(step.scale))
    beyond_eps = []
    for key, table in tables.items():
        has = [True if key[place] else None for place in FLAGS]
        count = _run(before_step_rows, key, table, numbers, step.close, *has)
        beyond_eps += [torch.tensor(count)] if step.close and key[PATH] and key[SCORE] else []
    return left, beyond_eps


def after_step_(rows: Iterable[PostStepRow], skip: Tensor | None = None) -> list[PostStepRow]:
    """Update parameters after a step: see `PostStepRow`. Returns the rows left to the next backend."""
    if skip is not None and skip.is_cpu and bool(skip):
        return []
    tables, left = _tables(counted(rows))
    for key, table in tables.items():
        _run(after_step_rows, key, table, (), *[True if kind else None for kind in key[2 : len(AFTER)]])
    return left


def _tables(rows: Iterable[AnyRow]) -> tuple[dict[Key, list[Entry]], list[AnyRow]]:
    """Lay out rows for the compiled code, those with the same columns together: addresses, size and numbers of each.

    Also returns the rows that the compiled code cannot take.
    """
    tables: dict[Key, list[Entry]] = {}
    left: list[AnyRow] = []
    for row in rows:
        columns, numbers = _parts(row)
        kind: Any = type(row)
        key = _key(kind, tuple([None if t is None else t.dtype for t in columns]))
        if key is None or not row.theta.is_cpu or not one_order([t for t in columns if t is not None]):
            left.append(row)
            continue
        addresses = tuple([0 if t is None else t.data_ptr() for t in columns])
        tables.setdefault(key, []).append((addresses, row.theta.numel(), numbers))
    return tables, left


def _parts(row: Any) -> tuple[Any, Any]:
    """Return the tensors of a row, and its numbers."""
    return (row[: len(AFTER)], row[len(AFTER) : -1]) if isinstance(row, PostStepRow) else (row[: len(ROW)], (row.weight,))


@lru_cache(maxsize=64)
def _key(row: Any, dtypes: tuple[Any, ...]) -> Key | None:
    """Return the kind of each column of a row, then the precision of state.

    None if the compiled code does not know such rows.
    """
    wide = PRECISION.get(dtypes[0])
    allowed = AFTER if row is PostStepRow else ROW
    if wide is None or not row(*dtypes).whole:
        return None
    kinds = [NONE if dtype is None else WIDE if dtype is wide else COARSE for dtype in dtypes]
    for dtype, kind, most in zip(dtypes, kinds, allowed, strict=True):
        if kind > most or (kind == COARSE and not (dtype is torch.bfloat16 and wide is torch.float32)):
            return None
    return *kinds, np.float64 if wide is torch.float64 else np.float32


def _run(kernel: Compiled, key: Key, table: list[Entry], numbers: tuple[float, ...], *rest: Any) -> int:
    """Call compiled code, on as many of torch's threads as the work is worth, and add up what it returns."""
    kinds, wide = key[:-1], key[-1]
    addresses, sizes, own = zip(*table, strict=True)
    columns = (_array(addresses, np.int64), _array((kinds,) * len(sizes), np.int8), _array(sizes, np.int64), _array(own, wide))
    parts = max(1, min(torch.get_num_threads(), sum(sizes) // SHARE))

    def call(part: int) -> int:
        scratch = np.empty((4, TILE), wide) if COARSE in kinds else None
        address = 0 if scratch is None else scratch.ctypes.data
        return int(kernel(*columns, _array(numbers, wide), address, wide(1), part, parts, *rest))

    others = [_pool().submit(call, part) for part in range(1, parts)]
    return call(0) + sum(other.result() for other in others)


@lru_cache(maxsize=64)
def _array(values: tuple[Any, ...], dtype: Any) -> Any:
    """Make a column of a table; most are as at the step before, gradients are often where they were then."""
    return np.array(values, dtype)


@cache
def _pool() -> ThreadPoolExecutor:
    """Keep threads for the compiled code, which holds no lock; Numba's own threads cannot be shared between callers."""
    return ThreadPoolExecutor(thread_name_prefix="rwalk")


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive it
