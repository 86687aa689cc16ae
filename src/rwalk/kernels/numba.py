"""One fused pass over each parameter on a CPU, compiled by Numba: lays out tensors for the loops of `loops`, and calls them.

Tensors go over as addresses in a table, because handing over arrays one by one costs more than a small visit. Taken are float32
and float64, and bfloat16 beside float32 state; the next backend does the rest.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwalk.kernels.blocked import AnyRow, one_order
from rwalk.kernels.loops import COARSE, NONE, TILE, WIDE, Compiled, after_rows, visit_rows
from rwalk.kernels.reference import noise, noise_start
from rwalk.kernels.visits import After, Row, Visit

SHARE = 2**18
"""Elements of work below which a second thread does not pay."""
ROW = (COARSE, COARSE, WIDE, WIDE, WIDE, WIDE, COARSE, WIDE, WIDE, COARSE)
AFTER = (COARSE, WIDE, COARSE, COARSE, WIDE)
"""The most that the compiled code takes in each column of `Row` and `After`."""
PATH, SCORE = 2, 5
"""Places of columns of `Row`."""
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
    numbers = (visit.eps, 2 * visit.strength * scale, scale)
    random = noise(CPU).numpy()
    far = sum(_run(visit_rows, table, numbers, visit.close, noise_start(visit.tick), random) for table in tables)
    settled = visit.close and any((kinds[:, [PATH, SCORE]] != NONE).all(1).any() for _, kinds, *_ in tables)
    return left, [torch.tensor(far)] if settled else []


def after_(rows: Iterable[After]) -> list[After]:
    """Visit parameters after a step: see `After`. Returns the rows left to the next backend."""
    tables, left = _tables(rows, AFTER)
    for table in tables:
        _run(after_rows, table, ())
    return left


def _tables(rows: Iterable[AnyRow], kinds: tuple[int, ...]) -> tuple[list[tuple[Any, ...]], list[AnyRow]]:
    """Lay out rows for the compiled code, those of each precision together: addresses, kinds, sizes and numbers.

    Also returns the rows that the compiled code cannot take.
    """
    entries: dict[torch.dtype, list[tuple[list[int], list[int], int, tuple[float, ...]]]] = {}
    left: list[AnyRow] = []
    for row in rows:
        tensors: tuple[Any, ...] = row[: len(kinds)]
        found = _kinds(tensors, kinds) if row.whole else None
        if found is None:
            left.append(row)
        else:
            numbers: tuple[Any, ...] = row[len(kinds) :]
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            entries.setdefault(PRECISION[row.theta.dtype], []).append((addresses, found, row.theta.numel(), numbers))
    types = {torch.float32: np.float32, torch.float64: np.float64}
    return [
        tuple(np.array(column, of) for column, of in zip(zip(*mine, strict=True), LAYOUT + (types[dtype],), strict=True))
        for dtype, mine in entries.items()
    ], left


def _kinds(tensors: tuple[Any, ...], allowed: tuple[int, ...]) -> list[int] | None:
    """Return the kind of each column of a row; None if one is not what the compiled code knows, or in another order."""
    wide = PRECISION.get(tensors[0].dtype)
    if wide is None or not tensors[0].is_cpu:
        return None
    kinds, dense = [], True
    for t, most in zip(tensors, allowed, strict=True):
        dtype = None if t is None else t.dtype
        kind = NONE if t is None else WIDE if dtype is wide else COARSE
        if kind > most or (kind == COARSE and not (dtype is torch.bfloat16 and wide is torch.float32)):
            return None
        kinds.append(kind)
        dense = dense and (t is None or t.is_contiguous())
    return kinds if dense or one_order([t for t in tensors if t is not None]) else None


def _run(kernel: Compiled, table: tuple[Any, ...], numbers: tuple[float, ...], *rest: Any) -> int:
    """Call compiled code, on as many of torch's threads as the work is worth, and add up what it returns."""
    dtype = table[3].dtype
    parts = max(1, min(torch.get_num_threads(), int(table[2].sum()) // SHARE))

    def call(part: int) -> int:
        scratch = np.empty((5, TILE), dtype)
        return int(kernel(*table, np.array(numbers, dtype), scratch.ctypes.data, dtype.type(1), part, parts, *rest))

    others = [_pool().submit(call, part) for part in range(1, parts)]
    return call(0) + sum(other.result() for other in others)


@cache
def _pool() -> ThreadPoolExecutor:
    """Keep threads for the compiled code, which holds no lock; Numba's own threads cannot be shared between callers."""
    return ThreadPoolExecutor(thread_name_prefix="rwalk")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
