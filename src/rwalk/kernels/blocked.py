"""The formulas of `reference`, run over pieces that fit the cache: the default, in plain PyTorch.

An elementwise formula of five operations reads its tensors five times. Cut into blocks, the first operation
brings a block into the cache and the others find it there, so each tensor crosses the memory bus once. On a GPU the pieces are
larger, and all that have the same work to do go through each operation together, in one launch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rwalk.kernels import reference
from rwalk.kernels.foreach import TensorList
from rwalk.kernels.passes import PostStepRow, PreStepPass, PreStepRow, counted

BLOCK = 2**17
"""Elements per block on a CPU. At 2^15 the streams of a pass fit a second-level cache, but a small network then pays more for
cutting and calling than it saves; at 2^17 they fit the third level, and no size of network takes longer."""
BATCH = 2**21
"""Elements per launch on a GPU: a handful of float32 streams of this length fit the second-level cache of a data-centre GPU."""

SMALL, TOGETHER = 2**14, 64
"""Elements of tensors that are worth going through together where no row has to be built, and how many of them at once."""

AnyRow = TypeVar("AnyRow", PreStepRow, PostStepRow)


def before_step_(rows: Iterable[PreStepRow], step: PreStepPass) -> tuple[list[PreStepRow], list[Tensor]]:
    """Update parameters before a step: see `PreStepPass`. Returns the rows it leaves (none), and `settle_`'s counts."""
    if step.left_out:
        return [], []
    beyond_eps = [reference.before_step_one_(piece, step) for piece in _pieces(rows)]
    return [], [count for count in beyond_eps if count is not None]


def after_step_(rows: Iterable[PostStepRow], skip: Tensor | None = None) -> list[PostStepRow]:
    """Update parameters after a step: see `PostStepRow`. Returns the rows left to do: none."""
    rows = list(rows)
    if rows and skip is not None and bool(skip):
        return []
    for piece in _pieces(counted(rows)):
        reference.after_step_one_(piece)
    return []


def blocks(tensors: list[Tensor], size: int = BLOCK) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into pieces of a size; what is small or not dense stays whole."""
    vectors = None if tensors[0].numel() <= size else flat(tensors)
    if vectors is None:
        yield tensors
    else:
        yield from (list(piece) for piece in zip(*(v.split(size) for v in vectors), strict=True))


def flat(tensors: list[Tensor]) -> list[Tensor] | None:
    """View tensors of one shape as vectors in storage order, or return None where they do not share one dense order."""
    first = tensors[0]
    if any(t.stride() != first.stride() for t in tensors):
        return None
    if first.is_contiguous():
        return [t.view(-1) for t in tensors]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    ordered = [t.permute(order) for t in tensors]
    return [t.view(-1) for t in ordered] if ordered[0].is_contiguous() else None


def one_order(tensors: list[Tensor]) -> bool:
    """Return whether tensors of one shape are dense and in one order, so that they can be viewed as vectors."""
    return all(map(Tensor.is_contiguous, tensors)) or flat(tensors) is not None


def _pieces(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """Cut rows into pieces; on a GPU, join those that have the same work to do."""
    pieces: list[AnyRow] = []
    elsewhere: list[AnyRow] = []
    for row in rows:
        if not row.theta.is_cpu:
            elsewhere.append(row)
        elif row.theta.numel() <= BLOCK:
            pieces.append(row)
        else:
            pieces += _cut(row, BLOCK)
    pieces += batches(elsewhere)
    return pieces


def _cut(row: AnyRow, size: int) -> Iterator[AnyRow]:
    if row.theta.numel() <= size:
        yield row
        return
    present = [i for i, value in enumerate(row) if isinstance(value, Tensor)]
    for piece in blocks([cast(Tensor, row[i]) for i in present], size):
        values: list[Any] = list(row)
        for i, tensor in zip(present, piece, strict=True):
            values[i] = tensor
        yield type(row)(*values)


def batches(rows: Iterable[AnyRow], size: int = BATCH) -> Iterator[AnyRow]:
    """Join the pieces of rows that have the same work to do: rows whose columns are lists of tensors that act as one tensor."""
    waiting: dict[Any, list[AnyRow]] = {}
    room: dict[Any, int] = {}
    for row in rows:
        for piece in _cut(row, size):
            work, elements = _work(piece), piece.theta.numel()
            if work in waiting and elements > room[work]:
                yield _joined(waiting.pop(work))
            room[work] = (room[work] if work in waiting else size) - elements
            waiting.setdefault(work, []).append(piece)
    yield from map(_joined, waiting.values())


def _work(row: PreStepRow | PostStepRow) -> tuple[Any, ...]:
    """Return what rows must share to be joined: the kinds of their tensors, and their numbers."""
    return (row.theta.device, *(value.dtype if isinstance(value, Tensor) else value for value in row))


def _joined(batch: list[AnyRow]) -> AnyRow:
    columns = zip(*batch, strict=True)
    values: list[Any] = [TensorList(list(column)) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return type(batch[0])(*values)


def rest_(rows: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], skip: Tensor | None) -> None:
    """End the optimiser's last move, of small tensors together: see the reference."""
    small: dict[Any, list[tuple[Tensor, ...]]] = {}
    for row in rows:
        if skip is None and row[0].numel() <= SMALL:
            small.setdefault((row[0].device, row[0].dtype, row[1].dtype), []).append(row)
        else:
            for t, p, m, q in blocks(list(row)):
                reference.rest_(t, p, m, q, None if skip is None else skip.to(t.device))
    for group in small.values():
        for at in range(0, len(group), TOGETHER):
            columns: list[Any] = [TensorList(column) for column in zip(*group[at : at + TOGETHER], strict=True)]
            reference.rest_(columns[0], columns[1], columns[2], columns[3], None)


def unlike(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """List the places of pairs of tensors that are not equal; small ones are looked at together."""
    small = [i for i, (a, b) in enumerate(pairs) if 0 < a.numel() <= SMALL and a.dtype == b.dtype and a.is_cpu]
    apart = set(range(len(pairs))) - set(small)
    for at in range(0, len(small), TOGETHER):
        some = small[at : at + TOGETHER]
        gaps = torch._foreach_sub([pairs[i][0].detach() for i in some], [pairs[i][1] for i in some])
        largest = torch.stack(torch._foreach_norm(gaps, math.inf))
        apart |= {some[i] for i in largest.ne(0).nonzero().flatten().tolist()}  # a NaN is not 0
    return [i for i in sorted(apart) if not torch.equal(pairs[i][0].to(pairs[i][1].dtype), pairs[i][1])]


def settle_(theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, eps: float) -> Tensor:
    """End a window whose path is whole: see the reference."""
    pieces = blocks([theta, fisher, path, score, mark])
    return torch.stack([reference.settle_(t, f, p, s, m, None, eps) for t, f, p, s, m in pieces]).sum()


def settled(
    theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, previous: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the score as it is once the window has ended, and the count of `settle_`; write nothing."""
    whole = torch.empty_like(score)
    beyond_eps = []
    for piece in blocks([whole, theta, fisher, path, score, mark, *([] if previous is None else [previous])]):
        into, t, f, *scratch = piece
        p, s, m, *q = (tensor.clone() for tensor in scratch)
        beyond_eps.append(reference.settle_(t, f, p, s, m, q[0] if q else None, eps))
        into.copy_(s)
    return whole, torch.stack(beyond_eps).sum()


def add_si_importance_(
    total: Tensor, path: Tensor, start: Tensor, theta: Tensor, mark: Tensor, previous: Tensor | None, xi: float
) -> None:
    """Add a task's share of the path integral to an importance, and write nothing else: see the reference."""
    for piece in blocks([total, path, start, theta, mark, *([] if previous is None else [previous])]):
        into, p, s, t, m, *q = piece
        whole = p.clone()
        if q:
            reference.finish_path_(t, whole, m, q[0].clone())
        reference.add_si_importance_(into, whole, s, t, xi)


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar."""
    return torch.stack([reference.penalty(*piece) for piece in blocks([theta, point, omega])]).sum()
