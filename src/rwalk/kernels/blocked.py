"""The formulas of `reference` in plain PyTorch, over pieces that fit the cache.

An elementwise formula of five operations reads its tensors five times. Cut into blocks, the first operation
brings a block into the cache and the others find it there, so each tensor crosses the memory bus once. Many small tensors cost
more in calls than in bytes: their state lies side by side, so that a formula serves all of them at once. On a GPU pieces are
larger, and all that have the same work to do go through each operation together, in one launch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rwalk.kernels import reference
from rwalk.kernels.foreach import TensorList
from rwalk.kernels.packs import Pack, packed
from rwalk.kernels.passes import Part
from rwalk.kernels.rows import RowByRow

BLOCK = 2**17
"""Elements per block on a CPU. At 2^15 the streams of a pass fit a second-level cache, but a small network then pays more for
cutting and calling than it saves; at 2^17 they fit the third level, and no size of network takes longer."""
BATCH = 2**21
"""Elements per launch on a GPU: a handful of float32 streams of this length fit the second-level cache of a data-centre GPU."""


def prepare(
    theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]
) -> tuple[list[Part], list[int]]:
    """Lay out all parameters, small ones on a CPU side by side: see `passes.Prepare`."""
    groups, rest = packed(theta, columns, places, BLOCK)
    parts: list[Part] = [Pack(theta, columns, group) for group in groups]
    return [*parts, RowByRow(theta, columns, rest, pieces)] if rest else parts, []


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


def pieces(rows: Iterable[Any]) -> list[Any]:
    """Cut rows into pieces; on a GPU, join those that have the same work to do."""
    found: list[Any] = []
    elsewhere: list[Any] = []
    for row in rows:
        if row.theta.is_cpu:
            found += _cut(row, BLOCK)
        else:
            elsewhere.append(row)
    return [*found, *batches(elsewhere)]


def _cut(row: Any, size: int) -> Iterator[Any]:
    if row.theta.numel() <= size:
        yield row
        return
    present = [i for i, value in enumerate(row) if isinstance(value, Tensor)]
    for piece in blocks([cast(Tensor, row[i]) for i in present], size):
        values: list[Any] = list(row)
        for i, tensor in zip(present, piece, strict=True):
            values[i] = tensor
        yield type(row)(*values)


def batches(rows: Iterable[Any], size: int = BATCH) -> Iterator[Any]:
    """Join the pieces of rows that have the same work to do: rows whose columns are lists of tensors that act as one tensor."""
    waiting: dict[Any, list[Any]] = {}
    room: dict[Any, int] = {}
    for row in rows:
        for piece in _cut(row, size):
            work, elements = _work(piece), piece.theta.numel()
            if work in waiting and elements > room[work]:
                yield _joined(waiting.pop(work))
            room[work] = (room[work] if work in waiting else size) - elements
            waiting.setdefault(work, []).append(piece)
    yield from map(_joined, waiting.values())


def _work(row: Any) -> tuple[Any, ...]:
    """Return what rows must share to be joined: the kinds of their tensors, and their numbers."""
    return (row.theta.device, *(value.dtype if isinstance(value, Tensor) else value for value in row))


def _joined(batch: list[Any]) -> Any:
    columns = zip(*batch, strict=True)
    values: list[Any] = [TensorList(list(column)) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return type(batch[0])(*values)


def settled(last: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the score as it is once the window has ended, and the count of `settle_`; write nothing."""
    whole = torch.empty_like(score)
    beyond_eps = []
    for into, t, f, *scratch in blocks([whole, last, fisher, path, score, mark]):
        p, s, m = (tensor.clone() for tensor in scratch)
        beyond_eps.append(reference.settle_(t, f, p, s, m, eps))
        into.copy_(s)
    return whole, torch.stack(beyond_eps).sum()


def settle_(theta: Tensor, fisher: Tensor, path: Tensor, score: Tensor, mark: Tensor, eps: float) -> Tensor:
    """End a window: see the reference."""
    whole = blocks([theta, fisher, path, score, mark])
    return torch.stack([reference.settle_(t, f, p, s, m, eps) for t, f, p, s, m in whole]).sum()


def add_si_importance_(total: Tensor, path: Tensor, start: Tensor, last: Tensor, xi: float) -> None:
    """Add a task's share of the path integral to an importance: see the reference."""
    for into, p, s, t in blocks([total, path, start, last]):
        reference.add_si_importance_(into, p, s, t, xi)


def penalty(theta: Tensor, point: Tensor, omega: Tensor) -> Tensor:
    """Return the sum of omega * (theta - point)^2 as a scalar."""
    return torch.stack([reference.penalty(*piece) for piece in blocks([theta, point, omega])]).sum()
