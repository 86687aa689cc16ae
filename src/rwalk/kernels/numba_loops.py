"""The loops that Numba compiles: the formulas of `reference`, on tiles that fit the cache.

All formulas of a step stand in one loop, which the compiler vectorises, so that every tensor is read and written once. Which
columns a table has is part of the types, by None, and code is made for each combination that occurs. It is kept on disk, beside
this file or in the user's cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, extending, njit, types

THETA, GRAD, PATH, MARK, PREVIOUS, SCORE, FISHER, SQUARES, POINT, OMEGA = range(10)
"""Columns of a `PreStepRow`."""
AFTER_POINT, AFTER_OMEGA, AFTER_SECOND, AFTER_AVERAGE = range(1, 5)
"""Columns of a `PostStepRow`, after theta."""
TILE = 2**12
"""Elements per tile: ten float32 streams of this length fit a second-level cache. Shorter tiles would fit the first one, but
bursts of less than a few pages per stream keep the memory prefetcher from running ahead: 512 took 1.6 times as long."""
NONE, WIDE, COARSE = 0, 1, 2
"""Kinds of a column in a table: not there, in state precision, or in bfloat16."""

Compiled = Callable[..., Any]
intrinsic: Callable[[Compiled], Compiled] = extending.intrinsic


def compiled(function: Compiled) -> Compiled:
    """Compile at the first call, and keep the code on disk where there is a place for it.

    No liberty is taken with the arithmetic but the sign of zeros. Fused multiply-adds are not allowed: the same function,
    compiled for itself and within another one, fuses others, and which of the two a process runs depends on what it has
    compiled before, so that the run that made the code and those that found it on disk rounded differently.
    """
    made: Compiled
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"nsz"}}
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written to
        made = njit(**options)(function)
    return made


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:  # noqa: ARG001
    """Turn an address into a pointer to numbers of a type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), code


@intrinsic
def _size(context: Any, like: Any) -> Any:  # noqa: ARG001
    """Return the bytes of a number of a type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), code


def _reinterpretation(came: Any, wanted: Any) -> Any:
    """Make an intrinsic that reads the bits of one 32-bit type as another."""

    @intrinsic
    def reinterpret(context: Any, value: Any) -> Any:  # noqa: ARG001
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(signature.return_type))

        return wanted(came), code

    return reinterpret


_as_float: Compiled = _reinterpretation(types.uint32, types.float32)
_as_bits: Compiled = _reinterpretation(types.float32, types.uint32)


@compiled
def before_step_rows(
    at, kind, sizes, rows, numbers, scratch, like, part, parts, close,
    graded, walks, scores, runs, squared, pulls,
):  # fmt: skip
    """Update a part of every row of a table, tile by tile; return how many elements were beyond_eps from their mark.

    `like` is a one of the table's precision, and `scratch` an address: views of bare memory need no reference counting. What is
    on the last line of arguments says which columns there are: None or True, so that code is made for just these.
    """
    beyond_eps = 0
    for k in range(sizes.size):
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            beyond_eps += _before_step_tile(
                at, kind, k, lo, min(TILE, end - lo), rows[k], numbers, scratch, like, close,
                graded, walks, scores, runs, squared, pulls,
            )  # fmt: skip
    return beyond_eps


@compiled
def _before_step_tile(
    at, kind, k, lo, n, row, numbers, scratch, like, close,
    graded, walks, scores, runs, squared, pulls,
):  # fmt: skip
    """Update one tile; columns are those of `PreStepRow`."""
    beyond_eps = 0
    theta = _read(at[k, THETA], kind[k, THETA], lo, n, scratch, 0, like)
    path = _column(walks, at[k, PATH], WIDE, lo, n, scratch, 0, like)
    mark = _column(walks, at[k, MARK], WIDE, lo, n, scratch, 0, like)
    previous = _column(walks, at[k, PREVIOUS], WIDE, lo, n, scratch, 0, like)
    fisher = _column(runs, at[k, FISHER], WIDE, lo, n, scratch, 0, like)
    if walks is not None and close:
        score = _column(scores, at[k, SCORE], WIDE, lo, n, scratch, 0, like)
        beyond_eps = _end_stretch(theta, fisher, path, score, mark, previous, numbers[0])
    if graded is not None:
        grad = _read(at[k, GRAD], kind[k, GRAD], lo, n, scratch, 2, like)
        squares = _column(squared, at[k, SQUARES], WIDE, lo, n, scratch, 0, like)
        point = _column(pulls, at[k, POINT], WIDE, lo, n, scratch, 0, like)
        omega = _column(pulls, at[k, OMEGA], kind[k, OMEGA], lo, n, scratch, 3, like)
        _step(theta, grad, path, mark, previous, fisher, squares, point, omega, row[0], numbers, like)
        if pulls is not None and kind[k, GRAD] == COARSE:
            _write(at[k, GRAD], lo, grad)
    return beyond_eps


@compiled
def _end_stretch(theta, fisher, path, score, mark, previous, eps):
    """End a stretch of the path, and a window where there is a score: `end_stretch_` and `settle_` of the reference."""
    beyond_eps = 0
    half = theta.dtype.type(0.5)
    for i in range(theta.size):
        moved = theta[i] - mark[i]
        whole = path[i]
        whole -= previous[i] * moved
        previous[i] = 0
        if score is not None:
            distance = moved * moved * fisher[i] * half
            beyond_eps += distance > eps
            score[i] += whole / (distance + eps)
            whole *= 0
        path[i] = whole
        mark[i] = theta[i]
    return beyond_eps


@compiled
def _step(theta, grad, path, mark, previous, fisher, squares, point, omega, weight, numbers, one):
    """Extend the path, update the Fisher information, and pull, in one loop."""
    pull, scale = numbers[1], numbers[2]
    for i in range(theta.size):
        g, t = grad[i] / scale, theta[i]
        if previous is not None:
            path[i] += (g - previous[i]) * (t - mark[i])
            previous[i] = g
        if fisher is not None:
            if squares is None:  # noqa: SIM108 - what is not None must be told by a statement
                new = g * g
            else:
                new = squares[i] / (scale * scale)
            fisher[i] = (one - weight) * fisher[i] + weight * new
        if point is not None:
            grad[i] += pull * scale * omega[i] * (t - point[i])


@compiled
def after_step_rows(at, kind, sizes, rows, _, scratch, like, part, parts, pulls, spreads, averages):
    """Update a part of every row of a table after a step; columns are those of `After`, flags as in `before_step_rows`."""
    for k in range(sizes.size):
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            n = min(TILE, end - lo)
            theta = _read(at[k, THETA], kind[k, THETA], lo, n, scratch, 0, like)
            if pulls is not None:
                point = _read(at[k, AFTER_POINT], WIDE, lo, n, scratch, 0, like)
                omega = _read(at[k, AFTER_OMEGA], kind[k, AFTER_OMEGA], lo, n, scratch, 1, like)
                second = _column(spreads, at[k, AFTER_SECOND], kind[k, AFTER_SECOND], lo, n, scratch, 2, like)
                _draw(theta, point, omega, second, rows[k], like)
                if kind[k, THETA] == COARSE:
                    _write(at[k, THETA], lo, theta)
            if averages is not None:
                rounded = _read(at[k, THETA], kind[k, THETA], lo, n, scratch, 0, like)
                _blend(_read(at[k, AFTER_AVERAGE], WIDE, lo, n, scratch, 0, like), rounded, rows[k, 3], like)
    return 0


@compiled
def _span(size, part, parts):
    """Return where one of several equal parts begins and ends, in whole tiles."""
    tiles = (size + TILE - 1) // TILE
    return tiles * part // parts * TILE, min(tiles * (part + 1) // parts * TILE, size)


def _column(there, address, kind, lo, n, scratch, row, like):
    """Return a tile as `_read` does, or None where the column is not there."""


@extending.overload(_column)
def _column_by_type(there, address, kind, lo, n, scratch, row, like):  # noqa: ARG001
    """Choose by the type of `there`, so that the type of the result is one or the other, and not either."""
    if isinstance(there, types.NoneType):
        return lambda there, address, kind, lo, n, scratch, row, like: None  # noqa: ARG005
    return lambda there, address, kind, lo, n, scratch, row, like: _read(address, kind, lo, n, scratch, row, like)  # noqa: ARG005


@compiled
def _read(address, kind, lo, n, scratch, row, like):
    """View a tile in place, or widen one of bfloat16 into a row of scratch memory."""
    if kind != COARSE:
        return carray(_pointer(address + lo * _size(like), like), n)
    coarse = carray(_pointer(address + 2 * lo, np.uint16(0)), n)
    wide = _spare(scratch, row, n, like)
    for i in range(n):
        wide[i] = _as_float(np.uint32(coarse[i]) << np.uint32(16))
    return wide


@compiled
def _spare(scratch, row, n, like):
    """View a row of scratch memory."""
    return carray(_pointer(scratch + row * TILE * _size(like), like), n)


@compiled
def _write(address, lo, tile):
    """Round a tile to the nearest bfloat16, to even where two are as near; what is not a number stays so."""
    coarse = carray(_pointer(address + 2 * lo, np.uint16(0)), tile.size)
    for i in range(tile.size):
        b = _as_bits(np.float32(tile[i]))
        up = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        lost = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        coarse[i] = np.uint16((b >> np.uint32(16)) | np.uint32(0x40)) if lost else np.uint16(up)


@compiled
def _draw(theta, point, omega, second, row, one):
    """Move towards the anchor: `draw_` and `draw_scaled_` of the reference."""
    step, correction, eps = row[0], row[1], row[2]
    for i in range(theta.size):
        way = one / (omega[i] * step)
        if second is not None:
            way *= np.sqrt(second[i] / correction) + eps
        theta[i] += (point[i] - theta[i]) / (one + way)


@compiled
def _blend(average, value, weight, one):
    for i in range(average.size):
        average[i] = (one - weight) * average[i] + weight * value[i]
