"""One launch over all parameters on a GPU, compiled by Triton: the formulas of `reference`, fused.

Tensors come in as addresses in a table on the device, so that any number of them takes one launch; a list of chunks says which
program works on which piece of which tensor. Loss scale and the flag of a skipped step are read on the device: the host waits
for nothing. With the environment variable TRITON_INTERPRET=1 the same code runs on the CPU, slowly, for tests.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwalk.kernels.blocked import AnyRow, one_order
from rwalk.kernels.passes import PostStepRow, PreStepPass, PreStepRow

CHUNK = 2**12
"""Elements per program: enough loads in flight for each column, and few enough registers."""
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
KINDS: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
THETA = tl.constexpr(0)
GRAD = tl.constexpr(1)
PATH = tl.constexpr(2)
MARK = tl.constexpr(3)
PREVIOUS = tl.constexpr(4)
SCORE = tl.constexpr(5)
FISHER = tl.constexpr(6)
SQUARES = tl.constexpr(7)
POINT = tl.constexpr(8)
OMEGA = tl.constexpr(9)
"""Columns of a `PreStepRow`."""
AFTER_POINT = tl.constexpr(1)
AFTER_OMEGA = tl.constexpr(2)
AFTER_SECOND = tl.constexpr(3)
AFTER_AVERAGE = tl.constexpr(4)
"""Columns of a `PostStepRow`, after theta."""
ROW_COLUMNS, AFTER_COLUMNS = 10, 5
"""How many of the fields of `PreStepRow` and `PostStepRow` are tensors."""
Group = tuple[tuple[torch.dtype | None, ...], int, bool]
"""What rows of one launch have in common: the kinds of their columns, their device's number, and whether they hold counts."""


def before_step_(rows: Iterable[PreStepRow], step: PreStepPass) -> tuple[list[PreStepRow], list[Tensor]]:
    """Update parameters before a step: see `PreStepPass`. Returns rows for the next backend, and the counts of `settle_`."""
    groups, left = _sort(rows, ROW_COLUMNS)
    beyond_eps: list[Tensor] = []
    for (kinds, *_), mine in groups.items():
        device = mine[0].theta.device
        count = torch.zeros((), dtype=torch.int64, device=device)
        flags = {"SCALED": step.scale is not None, "SKIPS": step.skip is not None}
        tables = (_on(step.scale, count), _on(step.skip, count), count)
        numbers = _on_device(tuple([(row.weight, step.eps, 2 * step.strength) for row in mine]), torch.float64, device)
        _launch(_before_step, mine, kinds, numbers, *tables, CLOSE=step.close, **flags)
        beyond_eps += [count] if step.close and kinds[PATH.value] is not None and kinds[SCORE.value] is not None else []
    return left, beyond_eps


def after_step_(rows: Iterable[PostStepRow], skip: Tensor | None = None) -> list[PostStepRow]:
    """Update parameters after a step: see `PostStepRow`. Returns the rows left to the next backend."""
    groups, left = _sort(rows, AFTER_COLUMNS)
    for (kinds, *_), mine in groups.items():
        _launch(_after_step, mine, kinds, _corrected(mine), _on(skip, mine[0].theta), SKIPS=skip is not None)
    return left


def _sort(rows: Iterable[AnyRow], columns: int) -> tuple[dict[Group, list[AnyRow]], list[AnyRow]]:
    """Group rows that one launch can take; return the others too."""
    groups: dict[Group, list[AnyRow]] = {}
    left: list[AnyRow] = []
    for row in rows:
        held: Any = row[:columns]
        tensors = [t for t in held if t is not None]
        kinds = tuple([None if t is None else t.dtype for t in held])
        kind: Any = type(row)
        alone = len({t.get_device() for t in tensors}) == 1
        if alone and row.theta.device.type in DEVICES and _known(kind, kinds) and one_order(tensors):
            counted = isinstance(row, PostStepRow) and row.made is not None
            groups.setdefault((kinds, row.theta.get_device(), counted), []).append(row)
        else:
            left.append(row)
    return groups, left


@lru_cache(maxsize=64)
def _known(row: Any, kinds: tuple[torch.dtype | None, ...]) -> bool:
    """Return whether the kernels can work on columns of these kinds."""
    return bool(all(kind is None or kind in KINDS for kind in kinds) and row(*kinds).whole)


def _launch(kernel: Any, rows: list[Any], kinds: tuple[torch.dtype | None, ...], *rest: Any, **flags: Any) -> None:
    """Start one program for each chunk of the rows."""
    device, columns = rows[0].theta.device, len(kinds)
    sizes = tuple([row.theta.numel() for row in rows])
    addresses = tuple([tuple([0 if t is None else t.data_ptr() for t in row[:columns]]) for row in rows])
    chunks = _chunks(sizes, device)
    if len(chunks):
        table, lengths = _on_device(addresses, torch.int64, device), _on_device(sizes, torch.int64, device)
        options = {"num_warps": 8, "enable_fp_fusion": True}
        flags |= {"KINDS": tuple([None if kind is None else KINDS[kind] for kind in kinds]), "CHUNK_LENGTH": CHUNK}
        with torch.cuda.device_of(table):  # Triton starts programs on the device that is the current one
            kernel[(len(chunks),)](table, chunks, lengths, *rest, **flags, **options)


def _corrected(rows: list[PostStepRow]) -> Tensor:
    """Return the numbers of rows; where Adam's correction depends on a count that a GPU has, it is worked out there."""
    numbers = _on_device(tuple([row[AFTER_COLUMNS:-1] for row in rows]), torch.float64, rows[0].theta.device)
    made = [row.made for row in rows if row.made is not None]
    if not made:
        return numbers
    numbers = numbers.clone()
    numbers[:, 1] = 1 - numbers[:, 1] ** torch.stack(made)
    return numbers


@lru_cache(maxsize=16)
def _on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bring a table to the device without waiting for it; gradients are often where they were the step before."""
    there = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=there).to(device, non_blocking=there)


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """List the chunks of tensors of some sizes: pairs of a tensor's place and a chunk's number in it."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    place = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([place, torch.arange(len(place)) - first], 1).to(device, torch.int32)


def _on(flag: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a flag of one element on the device of its stand-in, or the stand-in."""
    return stand_in if flag is None else flag.to(stand_in.device)


@triton.jit
def _pointer(table, row, column: tl.constexpr, KINDS: tl.constexpr):
    """Find the tensor of a column."""
    return tl.load(table + row * len(KINDS) + column).to(tl.pointer_type(KINDS[column]))


@triton.jit
def _place(chunks, sizes, skip, CHUNK_LENGTH: tl.constexpr, SKIPS: tl.constexpr):
    """Return a program's parameter, its elements, and a mask of those that exist and are not skipped."""
    row = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    at = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK_LENGTH + tl.arange(0, CHUNK_LENGTH)
    size = tl.load(sizes + row)
    if SKIPS:
        size = tl.where(tl.load(skip) == 0, size, 0)
    return row, at, at < size


@triton.jit
def _pull(table, row, at, inside, theta, grad, numbers, scale, KINDS: tl.constexpr, SCALED: tl.constexpr):
    """Add the penalty's gradient: `pull_` of the reference."""
    point = tl.load(_pointer(table, row, POINT, KINDS) + at, mask=inside, other=0)
    omega = tl.load(_pointer(table, row, OMEGA, KINDS) + at, mask=inside, other=0).to(theta.dtype)
    if SCALED:
        omega = omega * tl.load(scale)
    grad += tl.load(numbers + 3 * row + 2).to(theta.dtype) * omega * (theta - point)
    tl.store(_pointer(table, row, GRAD, KINDS) + at, grad.to(KINDS[GRAD]), mask=inside)


@triton.jit
def _before_step(
    table, chunks, sizes, numbers, scale, skip, beyond_eps,
    KINDS: tl.constexpr, CHUNK_LENGTH: tl.constexpr,
    CLOSE: tl.constexpr, SCALED: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one parameter; columns are those of `PreStepRow`."""
    row, at, inside = _place(chunks, sizes, skip, CHUNK_LENGTH, SKIPS)
    STATE: tl.constexpr = tl.float64 if KINDS[THETA] == tl.float64 else tl.float32
    theta = tl.load(_pointer(table, row, THETA, KINDS) + at, mask=inside, other=0).to(STATE)
    if KINDS[FISHER] is not None:
        fisher = tl.load(_pointer(table, row, FISHER, KINDS) + at, mask=inside, other=0).to(STATE)
    if KINDS[PATH] is not None:
        path = tl.load(_pointer(table, row, PATH, KINDS) + at, mask=inside, other=0)
        previous = tl.load(_pointer(table, row, PREVIOUS, KINDS) + at, mask=inside, other=0)
        moved = theta - tl.load(_pointer(table, row, MARK, KINDS) + at, mask=inside, other=0)
        if CLOSE:
            path -= previous * moved
            if KINDS[SCORE] is not None:
                distance = moved * moved * fisher * 0.5  # in the reference's order, so that both count alike
                score = tl.load(_pointer(table, row, SCORE, KINDS) + at, mask=inside, other=0)
                eps = tl.load(numbers + 3 * row + 1).to(STATE)
                tl.store(_pointer(table, row, SCORE, KINDS) + at, score + path / (distance + eps), mask=inside)
                tl.atomic_add(beyond_eps, tl.sum((inside & (distance > eps)).to(tl.int64)))
                path = path * 0
            tl.store(_pointer(table, row, MARK, KINDS) + at, theta, mask=inside)
            moved = moved * 0
            previous = previous * 0
    if KINDS[GRAD] is not None:
        grad = tl.load(_pointer(table, row, GRAD, KINDS) + at, mask=inside, other=0).to(STATE)
        g = grad
        if SCALED:
            g = grad / tl.load(scale)
        if KINDS[PATH] is not None:
            path += (g - previous) * moved
            previous = g
        if KINDS[FISHER] is not None:
            weight = tl.load(numbers + 3 * row).to(STATE)
            if KINDS[SQUARES] is not None:
                fresh = tl.load(_pointer(table, row, SQUARES, KINDS) + at, mask=inside, other=0).to(STATE)
                if SCALED:
                    fresh = fresh / (tl.load(scale) * tl.load(scale))
            else:
                fresh = g * g
            fisher = (1 - weight) * fisher + weight * fresh
            tl.store(_pointer(table, row, FISHER, KINDS) + at, fisher, mask=inside)
        if KINDS[OMEGA] is not None:
            _pull(table, row, at, inside, theta, grad, numbers, scale, KINDS, SCALED)
    if KINDS[PATH] is not None:
        tl.store(_pointer(table, row, PATH, KINDS) + at, path, mask=inside)
        tl.store(_pointer(table, row, PREVIOUS, KINDS) + at, previous, mask=inside)


@triton.jit
def _after_step(
    table, chunks, sizes, numbers, skip, KINDS: tl.constexpr, CHUNK_LENGTH: tl.constexpr, SKIPS: tl.constexpr
):  # fmt: skip
    """Update one chunk of one parameter after a step; columns are those of `PostStepRow`."""
    row, at, inside = _place(chunks, sizes, skip, CHUNK_LENGTH, SKIPS)
    STATE: tl.constexpr = tl.float64 if KINDS[THETA] == tl.float64 else tl.float32
    theta = tl.load(_pointer(table, row, THETA, KINDS) + at, mask=inside, other=0).to(STATE)
    if KINDS[AFTER_OMEGA] is not None:
        omega = tl.load(_pointer(table, row, AFTER_OMEGA, KINDS) + at, mask=inside, other=0).to(STATE)
        way = 1 / (omega * tl.load(numbers + 4 * row).to(STATE))
        if KINDS[AFTER_SECOND] is not None:
            second = tl.load(_pointer(table, row, AFTER_SECOND, KINDS) + at, mask=inside, other=0).to(STATE)
            way *= tl.sqrt(second / tl.load(numbers + 4 * row + 1).to(STATE)) + tl.load(numbers + 4 * row + 2).to(STATE)
        point = tl.load(_pointer(table, row, AFTER_POINT, KINDS) + at, mask=inside, other=0)
        theta += (point - theta) / (1 + way)
        tl.store(_pointer(table, row, THETA, KINDS) + at, theta.to(KINDS[THETA]), mask=inside)
    if KINDS[AFTER_AVERAGE] is not None:
        average = tl.load(_pointer(table, row, AFTER_AVERAGE, KINDS) + at, mask=inside, other=0)
        weight = tl.load(numbers + 4 * row + 3).to(STATE)
        average = (1 - weight) * average + weight * theta.to(KINDS[THETA]).to(STATE)
        tl.store(_pointer(table, row, AFTER_AVERAGE, KINDS) + at, average, mask=inside)
