"""The loops that Numba compiles: the formulas of `reference`, on tiles that fit the cache.

A table holds addresses: a row for each parameter, a column for each tensor that belongs to it. Which columns a table has is
part of the types, by None, and code is made for each combination that occurs. It is kept on disk, beside this file or in the
user's cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, extending, njit, types

THETA, GRAD, PREVIOUS, LAST, FISHER, SQUARES, POINT, OMEGA = range(8)
"""Columns of the table of the pass before a step; the first two are those of the check of gradients."""
SECOND, AVERAGE, PATH, MARK, SCORE = range(8, 13)
"""Further columns, of the pass after a step."""
COLUMNS = (
    "theta",
    "grad",
    "previous",
    "last",
    "fisher",
    "squares",
    "point",
    "omega",
    "second",
    "average",
    "path",
    "mark",
    "score",
)
TILE = 2**12
"""Elements per tile: ten float32 streams of this length fit a second-level cache. Shorter tiles would fit the first one, but
bursts of less than a few pages per stream keep the memory prefetcher from running ahead: 512 took 1.6 times as long."""
WIDE, COARSE = 1, 2
"""Kinds of a column in a table: in state precision, or in bfloat16."""

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
def nonfinite_rows(at, kind, sizes, scratch, like, part, parts, bad):
    """Count in a part of every row the elements of its gradient that are not finite, or whose squares are not."""
    for k in range(sizes.size):
        if at[k, GRAD] == 0:
            continue
        begin, end = _span(sizes[k], part, parts)
        count = 0
        for lo in range(begin, end, TILE):
            grad = _read(at[k, GRAD], kind[GRAD], lo, min(TILE, end - lo), scratch, 0, like)
            for i in range(grad.size):
                square = grad[i] * grad[i]
                count += (square - square) != 0
        bad[part, k] = count


@compiled
def before_rows(at, kind, sizes, weights, numbers, scratch, like, part, parts, moved, walks, runs, squared, pulls):
    """Update a part of every row before a step, tile by tile: `before_row_` of the reference.

    `like` is a one of the table's precision, and `scratch` an address: views of bare memory need no reference counting. What is
    last among the arguments says which columns there are: None or True, so that code is made for just these. `moved` is set for
    rows that are not where the last step left them, where it is not None.
    """
    for k in range(sizes.size):
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            n = min(TILE, end - lo)
            theta = _read(at[k, THETA], kind[THETA], lo, n, scratch, 0, like)
            if moved is not None and _differ(theta, _read(at[k, LAST], WIDE, lo, n, scratch, 0, like)):
                moved[k] = 1
            if at[k, GRAD] != 0:
                _before_tile(at, kind, k, lo, n, theta, weights[k], numbers, scratch, like, walks, runs, squared, pulls)


@compiled
def _differ(a, b):
    """Return whether any two elements differ."""
    count = 0
    for i in range(a.size):
        count += a[i] != b[i]
    return count > 0


@compiled
def _before_tile(at, kind, k, lo, n, theta, weight, numbers, scratch, like, walks, runs, squared, pulls):
    """Update one tile of a parameter that takes part in the step."""
    grad = _read(at[k, GRAD], kind[GRAD], lo, n, scratch, 1, like)
    if walks is not None:
        _keep(_read(at[k, PREVIOUS], WIDE, lo, n, scratch, 0, like), grad, numbers[1])
    if runs is not None:
        fisher = _read(at[k, FISHER], WIDE, lo, n, scratch, 0, like)
        if squared is not None and at[k, SQUARES] != 0:
            _average(fisher, _read(at[k, SQUARES], WIDE, lo, n, scratch, 0, like), weight, numbers[1], like)
        else:
            _square(fisher, grad, weight, numbers[1], like)
    if pulls is not None:
        point = _read(at[k, POINT], WIDE, lo, n, scratch, 0, like)
        omega = _read(at[k, OMEGA], kind[OMEGA], lo, n, scratch, 2, like)
        for i in range(n):
            grad[i] += numbers[0] * numbers[1] * omega[i] * (theta[i] - point[i])
        if kind[GRAD] == COARSE:
            _write(at[k, GRAD], lo, grad)


@compiled
def _keep(previous, grad, scale):
    """Keep a gradient without its loss scale."""
    for i in range(previous.size):
        previous[i] = grad[i] / scale


@compiled
def _square(fisher, grad, weight, scale, one):
    """Take a gradient into the Fisher information: `square_` of the reference."""
    for i in range(fisher.size):
        g = grad[i] / scale
        fisher[i] = (one - weight) * fisher[i] + weight * (g * g)


@compiled
def _average(fisher, squares, weight, scale, one):
    """Take mean squares of per-example gradients into the Fisher information: `blend_` of the reference."""
    for i in range(fisher.size):
        fisher[i] = (one - weight) * fisher[i] + weight * (squares[i] / (scale * scale))


@compiled
def after_rows(
    at, kind, sizes, rows, numbers, scratch, like, part, parts, on, pulls, spreads, averages, walks, runs, squared, closes,
):  # fmt: skip
    """Update a part of every row after a step: `after_row_` of the reference. Returns the elements beyond eps.

    `rows` has for each row, as columns: step, correction, eps, share and weight.
    """
    beyond_eps = 0
    for k in range(sizes.size):
        if on[k] == 0:
            continue
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            n = min(TILE, end - lo)
            theta = _read(at[k, THETA], kind[THETA], lo, n, scratch, 0, like)
            if pulls is not None:
                _pull_tile(at, kind, k, lo, n, theta, rows[:, k], scratch, like, spreads)
                theta = _read(at[k, THETA], kind[THETA], lo, n, scratch, 0, like)
            if averages is not None:
                _blend(_read(at[k, AVERAGE], WIDE, lo, n, scratch, 0, like), theta, rows[3, k], like)
            if walks is not None:
                beyond_eps += _walk_tile(at, k, lo, n, theta, rows[4, k], numbers, scratch, like, runs, squared, closes)
    return beyond_eps


@compiled
def _pull_tile(at, kind, k, lo, n, theta, row, scratch, like, spreads):
    """Draw one tile of a parameter towards the anchor."""
    point = _read(at[k, POINT], WIDE, lo, n, scratch, 0, like)
    omega = _read(at[k, OMEGA], kind[OMEGA], lo, n, scratch, 1, like)
    if spreads is not None and at[k, SECOND] != 0:
        _draw_scaled(theta, point, omega, _read(at[k, SECOND], kind[SECOND], lo, n, scratch, 2, like), row, like)
    else:
        _draw(theta, point, omega, row[0], like)
    if kind[THETA] == COARSE:
        _write(at[k, THETA], lo, theta)


@compiled
def _walk_tile(at, k, lo, n, theta, weight, numbers, scratch, like, runs, squared, closes):
    """Update the Fisher information and the path of one tile, and end its window."""
    previous = _read(at[k, PREVIOUS], WIDE, lo, n, scratch, 0, like)
    path = _read(at[k, PATH], WIDE, lo, n, scratch, 0, like)
    if runs is not None:
        fisher = _read(at[k, FISHER], WIDE, lo, n, scratch, 0, like)
        if squared is not None and at[k, SQUARES] != 0:
            _average(fisher, _read(at[k, SQUARES], WIDE, lo, n, scratch, 0, like), weight, numbers[1], like)
        else:
            _square(fisher, previous, weight, like, like)
    _extend(theta, previous, path, _read(at[k, LAST], WIDE, lo, n, scratch, 0, like))
    if closes is None:
        return 0
    fisher = _read(at[k, FISHER], WIDE, lo, n, scratch, 0, like)
    mark = _read(at[k, MARK], WIDE, lo, n, scratch, 0, like)
    return _settle(theta, fisher, path, _read(at[k, SCORE], WIDE, lo, n, scratch, 0, like), mark, numbers[0])


@compiled
def _extend(theta, grad, path, last):
    """Extend the path: `extend_path_` of the reference."""
    for i in range(theta.size):
        path[i] -= grad[i] * (theta[i] - last[i])
        last[i] = theta[i]


@compiled
def _settle(theta, fisher, path, score, mark, eps):
    """End a window: `settle_` of the reference."""
    beyond_eps = 0
    half = theta.dtype.type(0.5)
    for i in range(theta.size):
        moved = theta[i] - mark[i]
        distance = moved * moved * fisher[i] * half
        beyond_eps += distance > eps
        score[i] += path[i] / (distance + eps)
        path[i] = 0
        mark[i] = theta[i]
    return beyond_eps


@compiled
def _draw(theta, point, omega, step, one):
    """Move towards the anchor: `draw_` of the reference."""
    for i in range(theta.size):
        theta[i] += (point[i] - theta[i]) / (one + one / (omega[i] * step))


@compiled
def _draw_scaled(theta, point, omega, second, row, one):
    """Move towards the anchor in Adam's metric: `draw_scaled_` of the reference."""
    step, correction, eps = row[0], row[1], row[2]
    for i in range(theta.size):
        way = (np.sqrt(second[i] / correction) + eps) / (omega[i] * step)
        theta[i] += (point[i] - theta[i]) / (one + way)


@compiled
def _blend(average, value, weight, one):
    for i in range(average.size):
        average[i] = (one - weight) * average[i] + weight * value[i]


@compiled
def _span(size, part, parts):
    """Return where one of several equal parts begins and ends, in whole tiles."""
    tiles = (size + TILE - 1) // TILE
    return tiles * part // parts * TILE, min(tiles * (part + 1) // parts * TILE, size)


@compiled
def _read(address, kind, lo, n, scratch, row, like):
    """View a tile in place, or widen one of bfloat16 into a row of scratch memory."""
    if kind != COARSE:
        return carray(_pointer(address + lo * _size(like), like), n)
    coarse = carray(_pointer(address + 2 * lo, np.uint16(0)), n)
    wide = carray(_pointer(scratch + row * TILE * _size(like), like), n)
    for i in range(n):
        wide[i] = _as_float(np.uint32(coarse[i]) << np.uint32(16))
    return wide


@compiled
def _write(address, lo, tile):
    """Round a tile to the nearest bfloat16, to even where two are as near; what is not a number stays so."""
    coarse = carray(_pointer(address + 2 * lo, np.uint16(0)), tile.size)
    for i in range(tile.size):
        b = _as_bits(np.float32(tile[i]))
        up = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        lost = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        coarse[i] = np.uint16((b >> np.uint32(16)) | np.uint32(0x40)) if lost else np.uint16(up)
