"""The loops that Numba compiles: the formulas of `reference`, on tiles that fit the cache.

A tile goes through a few short loops, one for each formula, so that every tensor crosses the memory bus once. One loop for
everything would touch ten arrays, and the compiler gives up on proving that they do not overlap; short loops it vectorises.
Compiled code is kept on disk, beside this file or in the user's cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, extending, njit, types

from rwalk.kernels.reference import NOISE

TILE = 2**12
"""Elements per tile: ten float32 streams of this length fit a second-level cache. Shorter tiles would fit the first one, but
bursts of less than a few pages per stream keep the memory prefetcher from running ahead: 512 took 1.6 times as long."""
NONE, WIDE, COARSE = 0, 1, 2
"""Kinds of a column in a table: not there, in state precision, or in bfloat16."""

Compiled = Callable[..., Any]
intrinsic: Callable[[Compiled], Compiled] = extending.intrinsic


def compiled(function: Compiled) -> Compiled:
    """Compile at the first call, and keep the code on disk where there is a place for it.

    Contraction to fused multiply-add rounds once instead of twice; no other liberty is taken with the arithmetic.
    """
    made: Compiled
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
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
def visit_rows(addresses, kinds, sizes, weights, numbers, scratch, like, part, parts, close, first, noise):
    """Visit a part of every row of a table, tile by tile; return how many elements were far from their mark.

    `like` is a one of the table's precision, and `scratch` an address: views of bare memory need no reference counting.
    """
    far = 0
    for k in range(sizes.size):
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            n = min(TILE, end - lo)
            far += _visit_tile(addresses, kinds, k, lo, n, weights[k, 0], numbers, scratch, like, close, first, noise)
    return far


@compiled
def _visit_tile(at, kind, k, lo, n, weight, numbers, scratch, like, close, first, noise):
    """Visit one tile; columns are those of `Row`, and one that is not there is an empty one or one that nobody reads."""
    eps, pull, scale = numbers[0], numbers[1], numbers[2]
    far = 0
    theta = _read(at[k, 0], kind[k, 0], lo, n, scratch, 0, like)
    path, mark, previous = (
        _read(at[k, 2], WIDE, lo, n, scratch, 0, like),
        _read(at[k, 3], WIDE, lo, n, scratch, 0, like),
        _read(at[k, 4], WIDE, lo, n, scratch, 0, like),
    )
    fisher = _read(at[k, 6], kind[k, 6], lo, n, scratch, 1, like)
    if close and kind[k, 2] and kind[k, 5]:
        far = _settle(theta, fisher, path, _read(at[k, 5], WIDE, lo, n, scratch, 0, like), mark, previous, eps)
    elif close and kind[k, 2]:
        _close(theta, path, mark, previous)
    if not kind[k, 1]:
        return far
    grad = _read(at[k, 1], kind[k, 1], lo, n, scratch, 2, like)
    g = grad
    if scale != 1:
        g = _spare(scratch, 3, n, like)
        _divide(g, grad, scale)
    if kind[k, 2]:
        _trace(theta, g, path, mark, previous)
    if kind[k, 6] and kind[k, 7]:
        _blend(fisher, _read(at[k, 7], WIDE, lo, n, scratch, 0, like), weight, scale * scale)
    elif kind[k, 6]:
        _square(fisher, g, weight)
    if kind[k, 6] == COARSE:
        _write_at_random(at[k, 6], lo, fisher, noise, first)
    if kind[k, 9]:
        _pull(
            grad,
            theta,
            _read(at[k, 8], WIDE, lo, n, scratch, 0, like),
            _read(at[k, 9], kind[k, 9], lo, n, scratch, 4, like),
            pull,
        )
        if kind[k, 1] == COARSE:
            _write(at[k, 1], lo, grad)
    return far


@compiled
def after_rows(at, kind, sizes, numbers, _, scratch, like, part, parts):
    """Visit a part of every row of a table after a step; columns are those of `After`."""
    for k in range(sizes.size):
        step, correction, eps, weight = numbers[k, 0], numbers[k, 1], numbers[k, 2], numbers[k, 3]
        begin, end = _span(sizes[k], part, parts)
        for lo in range(begin, end, TILE):
            n = min(TILE, end - lo)
            theta = _read(at[k, 0], kind[k, 0], lo, n, scratch, 0, like)
            if kind[k, 2]:
                way = _spare(scratch, 1, n, like)
                _weigh(way, _read(at[k, 2], kind[k, 2], lo, n, scratch, 2, like), step)
                if kind[k, 3]:
                    _rescale(way, _read(at[k, 3], kind[k, 3], lo, n, scratch, 3, like), correction, eps)
                _approach(theta, _read(at[k, 1], WIDE, lo, n, scratch, 0, like), way)
                if kind[k, 0] == COARSE:
                    _write(at[k, 0], lo, theta)
            if kind[k, 4]:
                rounded = _read(at[k, 0], kind[k, 0], lo, n, scratch, 0, like)
                _blend(_read(at[k, 4], WIDE, lo, n, scratch, 0, like), rounded, weight, like)
    return 0


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
def _write_at_random(address, lo, tile, noise, first):
    """Round a tile to bfloat16 up or down by the bits of the table of noise: `rounded` of the reference."""
    coarse = carray(_pointer(address + 2 * lo, np.uint16(0)), tile.size)
    bits = noise[(first + lo) % NOISE :]
    for i in range(tile.size):
        coarse[i] = np.uint16((_as_bits(np.float32(tile[i])) + np.uint32(bits[i])) >> np.uint32(16))


@compiled
def _divide(g, grad, scale):
    for i in range(g.size):
        g[i] = grad[i] / scale


@compiled
def _trace(theta, g, path, mark, previous):
    for i in range(g.size):
        path[i] += (g[i] - previous[i]) * (theta[i] - mark[i])
    for i in range(g.size):
        previous[i] = g[i]


@compiled
def _close(theta, path, mark, previous):
    for i in range(theta.size):
        path[i] -= previous[i] * (theta[i] - mark[i])
    for i in range(theta.size):
        previous[i] = 0
        mark[i] = theta[i]


@compiled
def _settle(theta, fisher, path, score, mark, previous, eps):
    far = 0
    half = theta.dtype.type(0.5)
    for i in range(theta.size):
        moved = theta[i] - mark[i]
        distance = moved * moved * fisher[i] * half
        far += distance > eps
        score[i] += (path[i] - previous[i] * moved) / (distance + eps)
    for i in range(theta.size):
        path[i] = 0
        previous[i] = 0
        mark[i] = theta[i]
    return far


@compiled
def _square(fisher, g, weight):
    keep = fisher.dtype.type(1) - weight
    for i in range(g.size):
        fisher[i] = keep * fisher[i] + weight * (g[i] * g[i])


@compiled
def _blend(average, value, weight, scale):
    keep = average.dtype.type(1) - weight
    share = weight / scale
    for i in range(average.size):
        average[i] = keep * average[i] + share * value[i]


@compiled
def _pull(grad, theta, point, omega, pull):
    for i in range(grad.size):
        grad[i] += pull * omega[i] * (theta[i] - point[i])


@compiled
def _weigh(way, omega, step):
    one = way.dtype.type(1)
    for i in range(way.size):
        way[i] = one / (omega[i] * step)


@compiled
def _rescale(way, second, correction, eps):
    for i in range(way.size):
        way[i] *= np.sqrt(second[i] / correction) + eps


@compiled
def _approach(theta, point, way):
    one = way.dtype.type(1)
    for i in range(theta.size):
        theta[i] += (point[i] - theta[i]) / (one + way[i])
