"""Batches as models take them: which tensors hold the examples, and what a part of them is."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from rwalk._errors import explain

EXAMPLES_FIRST = "Put the examples first in inputs, targets and outputs; for an LSTM that is `batch_first=True`."
"""What to do where examples lie along another dimension."""


@dataclass
class Batch:
    """Examples as the model takes them: all tensors have them in their first dimension, except those whose id is `shared`.

    `given` is whether the model is given the target, too. `whole` are the tensors of the inputs as they came, in their order;
    by their places there, `along` are those whose first dimension is as long as there are examples, of which that may be an
    accident for those in `doubtful`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int
    shared: frozenset[int]
    given: bool = False
    whole: tuple[Tensor, ...] = ()
    along: frozenset[int] = frozenset()
    doubtful: frozenset[int] = frozenset()

    def sharing(self, places: Collection[int]) -> "Batch":
        """Return the same examples, with the tensors in some places of the inputs shared by all of them."""
        if not places:
            return self
        place = count()
        parts = self.args, self.kwargs
        args, kwargs = _mapped(parts, lambda t: self.whole[k] if (k := next(place)) in places else t)
        return replace(self, args=args, kwargs=kwargs, shared=self.shared | {id(self.whole[k]) for k in places})

    def cut(self, start: int, stop: int) -> "Batch":
        """Return the examples from `start` up to `stop`."""
        stop = min(stop, self.size)
        return self._each(lambda t: t[start:stop], stop - start)

    def keep(self, rows: Tensor) -> "Batch":
        """Return the examples for which `rows`, of shape (size,), is true."""
        return self if rows.all() else self._each(lambda t: t[rows], int(rows.sum()))

    def tree(self) -> tuple[Any, Any]:
        """Return all that a model and a loss need, and for each tensor the dimension to map over: the examples, if at all."""
        single = self._each(lambda t: t.unsqueeze(1), self.size)
        parts = (single.args, single.kwargs, single.target)
        return parts, _mapped(parts, lambda t: None if id(t) in self.shared else 0, lambda _: None)

    def _each(self, function: Callable[[Tensor], Tensor], size: int) -> "Batch":
        def apply(t: Tensor) -> Tensor:
            return t if id(t) in self.shared else function(t)

        args, kwargs, target = (_mapped(part, apply) for part in (self.args, self.kwargs, self.target))
        return replace(self, args=args, kwargs=kwargs, target=target, size=size)


def _mapped(tree: Any, leaf: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Replace the tensors in nested tuples, lists and mappings, and what is neither by `other`; mappings become dicts."""
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, leaf, other) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [_mapped(value, leaf, other) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return other(tree)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Go through the tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    for part in parts:
        yield from tensors(part)


def first_size(tree: Any) -> int | None:
    """Return the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in tensors(tree) if t.dim()), None)


def examples(data: Iterable[Any], samples: int | None, device: torch.device, flat: bool = False) -> Iterator[Batch]:
    """Read batches onto the device.

    Args:
        data: the batches.
        samples: read only the first so many examples.
        device: where the model is.
        flat: whether targets may be those of all rows of all examples, one after the other; they become one row for each.

    Raises:
        TypeError: for batches of another kind.
        ValueError: if the targets of a batch are not as many as its inputs.
    """
    left = math.inf if samples is None else samples
    if left <= 0:
        return
    for raw in data:
        batch = _read_batch(raw, device)
        batch = replace(batch, target=_by_example(batch, flat))
        batch = batch.cut(0, int(min(left, batch.size)))
        if batch.size:
            yield batch
        left -= batch.size
        if left <= 0:
            return


def _read_batch(raw: Any, device: torch.device) -> Batch:
    """Tell inputs from target in a batch, or raise a TypeError that names what came."""
    inputs, target = raw, None
    if isinstance(raw, Mapping):
        target = _as_tensors(raw.get("labels"))
        inputs = {**raw, "labels": target} if "labels" in raw else raw
    elif isinstance(raw, tuple | list):
        if len(raw) not in (1, 2):
            raise TypeError(_unreadable(f"a {type(raw).__name__} of {len(raw)}"))
        inputs, target = raw[0], _as_tensors(raw[1]) if len(raw) == 2 else None
    given = isinstance(raw, Mapping)
    inputs, target = (_mapped(part, partial(_placed, device=device)) for part in (inputs, target))
    target = inputs.get("labels") if given else target
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    own = {id(t) for t in tensors(target)}
    own = set() if own >= {id(t) for t in tensors(inputs)} else own  # the target may be the whole batch
    ranked = [t for t in tensors(inputs) if t.dim() and id(t) not in own]
    size = _size(ranked, first_size(target))
    if size is None:
        raise TypeError(_unreadable(f"a batch whose inputs, a `{type(inputs).__name__}`, hold no tensor"))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    _refuse_rows(ranked, size)
    shared = frozenset(id(t) for t in tensors((inputs, target)) if not t.dim() or t.shape[0] != size)
    whole = tuple(tensors((args, kwargs)))
    along = frozenset(k for k, t in enumerate(whole) if size > 1 and id(t) not in shared | own)
    doubtful = frozenset(k for k in along if any(_within(whole[k], whole[j]) for j in along))
    return Batch(args, kwargs, target, size, shared, given, whole, along, doubtful)


def _within(t: Tensor, other: Tensor) -> bool:
    """Tell whether the first dimension of a tensor may be a later one of a larger tensor, such as places of a sequence."""
    return other.dim() > t.dim() and t.shape[0] in other.shape[1:]


def _size(ranked: Sequence[Tensor], targets: int | None) -> int | None:
    """Return how many examples inputs hold: as many as targets if any do, else the most frequent number above 1, if any."""
    explained = [
        any(_within(t, other) and (len(other) > 1 or j < i) for j, other in enumerate(ranked)) for i, t in enumerate(ranked)
    ]
    sizes = [len(t) for t, within in zip(ranked, explained, strict=True) if not within] or [len(t) for t in ranked]
    if targets in sizes:
        return targets
    return max([n for n in sizes if n > 1] or sizes, key=sizes.count, default=None)


def _refuse_rows(ranked: Sequence[Tensor], size: int) -> None:
    """Raise a ValueError for inputs that look alike and have different numbers of rows."""
    mine, others = ([t for t in ranked if (len(t) == size) is same] for same in (True, False))
    for other in others:
        alike = any(other.shape[1:] == t.shape[1:] for t in mine)
        if len(other) != 1 and alike and not any(len(other) in t.shape[1:] for t in mine):
            came = f"inputs of {size} and of {len(other)} rows"
            remedy = "Keep what all examples share in the model, or give it a first dimension of 1."
            raise ValueError(explain(came, "as many rows in each, one for each example", remedy))


def _as_tensors(tree: Any) -> Any:
    """Make tensors of what holds numbers: NumPy arrays, and lists of numbers or of tensors of one number."""
    if isinstance(tree, tuple | list) and tree and all(isinstance(t, Tensor) and not t.dim() for t in tree):
        return torch.stack(list(tree))
    if _numbers(tree) or (hasattr(tree, "__array__") and not isinstance(tree, Tensor)):
        try:
            return torch.as_tensor(tree)
        except (TypeError, ValueError):  # words, or rows of different lengths
            return tree
    if isinstance(tree, Mapping):
        return {key: _as_tensors(value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_as_tensors(value) for value in tree)
    return tree


def _numbers(tree: Any) -> bool:
    return isinstance(tree, tuple | list) and bool(tree) and all(isinstance(v, Number) or _numbers(v) for v in tree)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, as one that autograd may keep."""
    return (tensor.clone() if tensor.is_inference() else tensor).to(device)


def _by_example(batch: Batch, flat: bool) -> Any:
    """Return a batch's target with the examples in the first dimension, or raise a ValueError if it is of other examples."""
    target, size = batch.target, batch.size
    ranked = [t for t in tensors(target) if t.dim() or t is target]
    wrong = [t for t in ranked if not t.dim() or len(t) not in (1, size)]
    if not size or not ranked or (not wrong and any(len(t) == size for t in ranked)):
        return ranked[0] if flat and len(ranked) == 1 else target
    if isinstance(target, Tensor) and target.numel() == size == 1:
        return target.reshape(1)
    flat = flat and not batch.given  # else the model itself would see all of it with each example
    if flat and isinstance(target, Tensor) and target.dim() == 1 and len(target) > size and not len(target) % size:
        return target.reshape(size, -1)
    came = f"a target of shape {tuple((wrong or ranked)[0].shape)} for {size} examples"
    raise ValueError(explain(came, "one target for each example, in the first dimension", EXAMPLES_FIRST))


def _unreadable(came: str) -> str:
    return explain(
        came,
        "batches that are a mapping of the model's arguments, a pair of inputs and target, or inputs as tensors",
        "Let the DataLoader's `collate_fn` return one of these.",
    )


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on the inputs of a batch, of any of the kinds that `over` takes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    read = _read_batch(batch, device)
    return model(*read.args, **read.kwargs)
