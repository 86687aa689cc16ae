"""The programs that Triton compiles for a GPU: the formulas of `reference`, one chunk of one parameter each.

A table holds addresses: a row for each kind of tensor, a column for each parameter. Which kinds there are is known when code is
made, by None in `KINDS`.
"""

import triton
import triton.language as tl

THETA = tl.constexpr(0)
GRAD = tl.constexpr(1)
PREVIOUS = tl.constexpr(2)
LAST = tl.constexpr(3)
FISHER = tl.constexpr(4)
SQUARES = tl.constexpr(5)
POINT = tl.constexpr(6)
OMEGA = tl.constexpr(7)
SECOND = tl.constexpr(8)
AVERAGE = tl.constexpr(9)
PATH = tl.constexpr(10)
MARK = tl.constexpr(11)
SCORE = tl.constexpr(12)
MADE = tl.constexpr(13)
ON = tl.constexpr(14)
WEIGHT = tl.constexpr(0)
STEP = tl.constexpr(1)
CORRECTION = tl.constexpr(2)
ADAM_EPS = tl.constexpr(3)
SHARE = tl.constexpr(4)
PULL = tl.constexpr(5)
EPS = tl.constexpr(6)
NUMBERS = tl.constexpr(7)
"""Columns of the table of addresses, and of that of numbers with its width."""


@triton.jit
def _pointer(table, row, count, column: tl.constexpr, KINDS: tl.constexpr):
    """Find the tensor of a column."""
    return tl.load(table + column * count + row).to(tl.pointer_type(KINDS[column]))


@triton.jit
def _place(table, chunks, sizes, count, skip, gate: tl.constexpr, CHUNK_LENGTH: tl.constexpr, SKIPS: tl.constexpr):
    """Return a program's parameter, its elements, and a mask of those that exist, take part and are not skipped."""
    row = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    at = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK_LENGTH + tl.arange(0, CHUNK_LENGTH)
    size = tl.where(tl.load(table + gate * count + row) != 0, tl.load(sizes + row), 0)
    if SKIPS:
        size = tl.where(tl.load(skip) == 0, size, 0)
    return row, at, at < size


@triton.jit
def nonfinite(table, chunks, sizes, count, bad, KINDS: tl.constexpr, STATE: tl.constexpr, CHUNK_LENGTH: tl.constexpr):
    """Count elements of one chunk of a gradient that are not finite, or whose squares are not."""
    row, at, inside = _place(table, chunks, sizes, count, bad, GRAD, CHUNK_LENGTH, False)
    grad = tl.load(_pointer(table, row, count, GRAD, KINDS) + at, mask=inside, other=0).to(STATE)
    gap = grad * grad - grad * grad  # 0, or not a number
    tl.atomic_add(bad + row, tl.sum((inside & (gap != 0)).to(tl.int64)))


@triton.jit
def before_step(
    table, chunks, sizes, count, numbers, scale, skip,
    KINDS: tl.constexpr, STATE: tl.constexpr, CHUNK_LENGTH: tl.constexpr, SCALED: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one parameter before a step: `before_row_` of the reference."""
    row, at, inside = _place(table, chunks, sizes, count, skip, GRAD, CHUNK_LENGTH, SKIPS)
    grad = tl.load(_pointer(table, row, count, GRAD, KINDS) + at, mask=inside, other=0).to(STATE)
    g = grad
    if SCALED:
        g = grad / tl.load(scale)
    if KINDS[PREVIOUS] is not None:
        tl.store(_pointer(table, row, count, PREVIOUS, KINDS) + at, g, mask=inside)
    if KINDS[FISHER] is not None:
        _inform(table, row, at, inside, count, g, numbers, scale, KINDS, STATE, SCALED)
    if KINDS[OMEGA] is not None:
        theta = tl.load(_pointer(table, row, count, THETA, KINDS) + at, mask=inside, other=0).to(STATE)
        point = tl.load(_pointer(table, row, count, POINT, KINDS) + at, mask=inside, other=0)
        omega = tl.load(_pointer(table, row, count, OMEGA, KINDS) + at, mask=inside, other=0).to(STATE)
        if SCALED:
            omega = omega * tl.load(scale)
        grad += tl.load(numbers + PULL * count + row).to(STATE) * omega * (theta - point)
        tl.store(_pointer(table, row, count, GRAD, KINDS) + at, grad.to(KINDS[GRAD]), mask=inside)


@triton.jit
def _inform(table, row, at, inside, count, g, numbers, scale, KINDS: tl.constexpr, STATE: tl.constexpr, SCALED: tl.constexpr):
    """Take a gradient, or mean squares of per-example gradients, into the Fisher information; return it."""
    fresh = g * g
    if KINDS[SQUARES] is not None:  # noqa: SIM102 - what is known when the code is made must be told apart
        if tl.load(table + SQUARES * count + row) != 0:
            fresh = tl.load(_pointer(table, row, count, SQUARES, KINDS) + at, mask=inside, other=0).to(STATE)
            if SCALED:
                fresh = fresh / (tl.load(scale) * tl.load(scale))
    weight = tl.load(numbers + WEIGHT * count + row).to(STATE)
    fisher = tl.load(_pointer(table, row, count, FISHER, KINDS) + at, mask=inside, other=0).to(STATE)
    fisher = (1 - weight) * fisher + weight * fresh
    tl.store(_pointer(table, row, count, FISHER, KINDS) + at, fisher, mask=inside)
    return fisher


@triton.jit
def after_step(
    table, chunks, sizes, count, numbers, scale, skip, beyond_eps,
    KINDS: tl.constexpr, STATE: tl.constexpr, CHUNK_LENGTH: tl.constexpr,
    CLOSE: tl.constexpr, SCALED: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one parameter after a step: `after_row_` of the reference."""
    row, at, inside = _place(table, chunks, sizes, count, skip, ON, CHUNK_LENGTH, SKIPS)
    theta = tl.load(_pointer(table, row, count, THETA, KINDS) + at, mask=inside, other=0).to(STATE)
    if KINDS[OMEGA] is not None:
        theta = _drawn(table, row, at, inside, count, theta, numbers, KINDS, STATE)
        tl.store(_pointer(table, row, count, THETA, KINDS) + at, theta.to(KINDS[THETA]), mask=inside)
        theta = theta.to(KINDS[THETA]).to(STATE)
    if KINDS[AVERAGE] is not None:
        average = tl.load(_pointer(table, row, count, AVERAGE, KINDS) + at, mask=inside, other=0)
        share = tl.load(numbers + SHARE * count + row).to(STATE)
        tl.store(_pointer(table, row, count, AVERAGE, KINDS) + at, (1 - share) * average + share * theta, mask=inside)
    if KINDS[PATH] is not None:
        g = tl.load(_pointer(table, row, count, PREVIOUS, KINDS) + at, mask=inside, other=0)
        path = tl.load(_pointer(table, row, count, PATH, KINDS) + at, mask=inside, other=0)
        path -= g * (theta - tl.load(_pointer(table, row, count, LAST, KINDS) + at, mask=inside, other=0))
        tl.store(_pointer(table, row, count, LAST, KINDS) + at, theta, mask=inside)
        if KINDS[FISHER] is not None:
            fisher = _inform(table, row, at, inside, count, g, numbers, scale, KINDS, STATE, SCALED)
            if CLOSE:
                moved = theta - tl.load(_pointer(table, row, count, MARK, KINDS) + at, mask=inside, other=0)
                distance = moved * moved * fisher * 0.5  # in the reference's order, so that both count alike
                eps = tl.load(numbers + EPS * count + row).to(STATE)
                score = tl.load(_pointer(table, row, count, SCORE, KINDS) + at, mask=inside, other=0)
                score += path / (distance + eps)
                tl.store(_pointer(table, row, count, SCORE, KINDS) + at, score, mask=inside)
                tl.atomic_add(beyond_eps, tl.sum((inside & (distance > eps)).to(tl.int64)))
                tl.store(_pointer(table, row, count, MARK, KINDS) + at, theta, mask=inside)
                path = path * 0
        tl.store(_pointer(table, row, count, PATH, KINDS) + at, path, mask=inside)


@triton.jit
def _drawn(table, row, at, inside, count, theta, numbers, KINDS: tl.constexpr, STATE: tl.constexpr):
    """Return a chunk drawn towards the anchor: `draw_` and `draw_scaled_` of the reference."""
    omega = tl.load(_pointer(table, row, count, OMEGA, KINDS) + at, mask=inside, other=0).to(STATE)
    way = 1 / (omega * tl.load(numbers + STEP * count + row).to(STATE))
    if KINDS[SECOND] is not None:
        correction = tl.load(numbers + CORRECTION * count + row)
        if KINDS[MADE] is not None:
            made = tl.load(tl.load(table + MADE * count + row).to(tl.pointer_type(KINDS[MADE])))
            correction = 1 - tl.exp2(made.to(tl.float64) * tl.log2(correction))
        second = tl.load(_pointer(table, row, count, SECOND, KINDS) + at, mask=inside, other=0).to(STATE)
        way *= tl.sqrt(second / correction.to(STATE)) + tl.load(numbers + ADAM_EPS * count + row).to(STATE)
    point = tl.load(_pointer(table, row, count, POINT, KINDS) + at, mask=inside, other=0)
    return theta + (point - theta) / (1 + way)
