"""The formulas of `reference`, run over blocks that fit the cache: the default, in plain PyTorch.

An elementwise formula of five operations reads its tensors five times. Cut into blocks of 2^15 elements, the first operation
brings a block into the cache and the others find it there, so each tensor crosses the memory bus once.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rwalk.kernels import reference

BLOCK = 2**15
"""Elements per block: five float32 streams of this length fit the second-level cache of the processors in use."""


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


def blocks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into pieces that fit the cache; what is small, on a device or not dense stays whole."""
    first = tensors[0]
    vectors = None if first.numel() <= BLOCK or first.device.type != "cpu" else flat(tensors)
    if vectors is None:
        yield tensors
        return
    yield from (list(piece) for piece in zip(*(v.split(BLOCK) for v in vectors), strict=True))


def _in_blocks(formula: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Turn an elementwise formula of the reference into one that goes block by block; scalars that it returns are summed."""
    tensors = sum(p.annotation is Tensor for p in inspect.signature(formula).parameters.values())

    @wraps(formula)
    def blocked(*args: Any) -> Tensor | None:
        parts = [formula(*piece, *args[tensors:]) for piece in blocks(list(args[:tensors]))]
        scalars = [part for part in parts if part is not None]
        return torch.stack(scalars).sum() if scalars else None

    return blocked


trace_ = _in_blocks(reference.trace_)
close_ = _in_blocks(reference.close_)
square_ = _in_blocks(reference.square_)
walk_ = _in_blocks(reference.walk_)
blend_ = _in_blocks(reference.blend_)
settle_ = _in_blocks(reference.settle_)
account_ = _in_blocks(reference.account_)
pull_ = _in_blocks(reference.pull_)
draw_ = _in_blocks(reference.draw_)
draw_scaled_ = _in_blocks(reference.draw_scaled_)
penalty = _in_blocks(reference.penalty)
