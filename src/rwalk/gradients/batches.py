"""Batches as models take them: which tensors hold the examples, and how to take some of the examples."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from numbers import Number
from typing import Any

import torch
from torch import Tensor

EXAMPLES_FIRST = "Put the examples first in inputs, targets and outputs; for an LSTM that is `batch_first=True`."
"""What to do if examples lie along another dimension."""


@dataclass
class ExampleBatch:
    """Examples as the model takes them.

    Args:
        args, kwargs: the arguments of the model.
        target: the target, if any.
        size: how many examples there are.
        shared: the ids of tensors that all examples share; all other tensors have the examples in their first dimension.
        target_in_inputs: whether the model itself gets the target, too.
        inputs: the tensors of the inputs as they came, in order.
        with_examples: indices of inputs whose first dimension is as long as there are examples.
        doubtful: those of them for which this may be a coincidence.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int
    shared: frozenset[int]
    target_in_inputs: bool = False
    inputs: tuple[Tensor, ...] = ()
    with_examples: frozenset[int] = frozenset()
    doubtful: frozenset[int] = frozenset()

    def sharing(self, indices: Collection[int]) -> "ExampleBatch":
        """Return the same examples, with some of the inputs shared by all of them."""
        if not indices:
            return self
        index = count()
        parts = self.args, self.kwargs
        args, kwargs = map_tensors(parts, lambda t: self.inputs[k] if (k := next(index)) in indices else t)
        return replace(self, args=args, kwargs=kwargs, shared=self.shared | {id(self.inputs[k]) for k in indices})

    def cut(self, start: int, stop: int) -> "ExampleBatch":
        """Return the examples from `start` up to `stop`."""
        stop = min(stop, self.size)
        return self._each(lambda t: t[start:stop], stop - start)

    def keep(self, rows: Tensor) -> "ExampleBatch":
        """Return the examples for which `rows`, of shape (size,), is true."""
        return self if rows.all() else self._each(lambda t: t[rows], int(rows.sum()))

    def tree(self) -> tuple[Any, Any]:
        """Return arguments and target for `vmap`, and for each tensor the dimension to map over, None for shared ones."""
        single = self._each(lambda t: t.unsqueeze(1), self.size)
        parts = (single.args, single.kwargs, single.target)
        return parts, map_tensors(parts, lambda t: None if id(t) in self.shared else 0, lambda _: None)

    def _each(self, function: Callable[[Tensor], Tensor], size: int) -> "ExampleBatch":
        def apply(t: Tensor) -> Tensor:
            return t if id(t) in self.shared else function(t)

        args, kwargs, target = (map_tensors(part, apply) for part in (self.args, self.kwargs, self.target))
        return replace(self, args=args, kwargs=kwargs, target=target, size=size)


def map_tensors(tree: Any, leaf: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Apply `leaf` to tensors in nested tuples, lists and mappings, `other` to all other values; mappings become dicts."""
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, leaf, other) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [map_tensors(value, leaf, other) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return other(tree)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    for part in parts:
        yield from tensors(part)


def first_size(tree: Any) -> int | None:
    """Return the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in tensors(tree) if t.dim()), None)


def examples(data: Iterable[Any], samples: int | None, device: torch.device, flat: bool = False) -> Iterator[ExampleBatch]:
    """Read batches onto the device.

    Args:
        data: the batches.
        samples: how many examples to read at most.
        device: where the model is.
        flat: whether a target may be one dimension with the rows of all examples in turn; it then becomes one row for each.

    Raises:
        TypeError: for batches of another kind.
        ValueError: if a batch does not have one target for each example.
    """
    left = math.inf if samples is None else samples
    if left <= 0:
        return
    for raw in data:
        batch = read_batch(raw, device)
        batch = replace(batch, target=_by_example(batch, flat))
        batch = batch.cut(0, int(min(left, batch.size)))
        if batch.size:
            yield batch
        left -= batch.size
        if left <= 0:
            return


def read_batch(raw: Any, device: torch.device) -> ExampleBatch:
    """Separate inputs and target of a batch, and find its examples."""
    inputs, target = (map_tensors(part, partial(_to_device, device=device)) for part in _inputs_and_target(raw))
    target_in_inputs = isinstance(raw, Mapping)
    target = inputs.get("labels") if target_in_inputs else target
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    targets = {id(t) for t in tensors(target)}
    if targets >= {id(t) for t in tensors(inputs)}:  # the target may be the whole batch
        targets = set()
    candidates = [t for t in tensors(inputs) if t.dim() and id(t) not in targets]
    size = _size(candidates, first_size(target))
    if size is None:
        raise TypeError(_unreadable(f"a batch whose inputs, a `{type(inputs).__name__}`, hold no tensor"))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    _refuse_rows(candidates, size)
    shared = frozenset(id(t) for t in tensors((inputs, target)) if not t.dim() or t.shape[0] != size)
    each = tuple(tensors((args, kwargs)))
    with_examples = frozenset(k for k, t in enumerate(each) if size > 1 and id(t) not in shared | targets)
    doubtful = frozenset(k for k in with_examples if any(_may_be_within(each[k], each[j]) for j in with_examples))
    return ExampleBatch(args, kwargs, target, size, shared, target_in_inputs, each, with_examples, doubtful)


def _inputs_and_target(raw: Any) -> tuple[Any, Any]:
    """Separate inputs and target; raise a TypeError that names what came instead of a batch."""
    if isinstance(raw, Mapping):
        return ({**raw, "labels": _as_tensors(raw["labels"])} if "labels" in raw else raw), None
    if isinstance(raw, tuple | list):
        if len(raw) not in (1, 2):
            raise TypeError(_unreadable(f"a {type(raw).__name__} of {len(raw)}"))
        return raw[0], _as_tensors(raw[1]) if len(raw) == 2 else None
    return raw, None


def _may_be_within(t: Tensor, other: Tensor) -> bool:
    """Return whether the first dimension of a tensor may be a later one of a larger tensor, such as positions in a sequence."""
    return other.dim() > t.dim() and t.shape[0] in other.shape[1:]


def _size(candidates: Sequence[Tensor], targets: int | None) -> int | None:
    """Return how many examples the inputs hold: as many as targets if possible, else the most frequent length above 1."""
    within = [
        any(_may_be_within(t, other) and (len(other) > 1 or j < i) for j, other in enumerate(candidates))
        for i, t in enumerate(candidates)
    ]
    sizes = [len(t) for t, inside in zip(candidates, within, strict=True) if not inside] or [len(t) for t in candidates]
    if targets in sizes:
        return targets
    return max([n for n in sizes if n > 1] or sizes, key=sizes.count, default=None)


def _refuse_rows(candidates: Sequence[Tensor], size: int) -> None:
    """Raise a ValueError for inputs of the same kind with different numbers of rows."""
    fitting, others = ([t for t in candidates if (len(t) == size) is same] for same in (True, False))
    for other in others:
        alike = any(other.shape[1:] == t.shape[1:] for t in fitting)
        if len(other) != 1 and alike and not any(len(other) in t.shape[1:] for t in fitting):
            raise ValueError(
                f"There are inputs of {size} and of {len(other)} rows; each needs one row for each example. "
                "Keep what all examples share in the model, or give it a first dimension of 1."
            )


def _as_tensors(tree: Any) -> Any:
    """Convert NumPy arrays, lists of numbers and lists of tensors with one number to tensors."""
    if isinstance(tree, tuple | list) and tree and all(isinstance(t, Tensor) and not t.dim() for t in tree):
        return torch.stack(list(tree))
    if _numbers(tree) or (hasattr(tree, "__array__") and not isinstance(tree, Tensor)):
        try:
            return torch.as_tensor(tree)
        except (TypeError, ValueError):  # text, or rows of different lengths
            return tree
    if isinstance(tree, Mapping):
        return {key: _as_tensors(value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_as_tensors(value) for value in tree)
    return tree


def _numbers(tree: Any) -> bool:
    return isinstance(tree, tuple | list) and bool(tree) and all(isinstance(v, Number) or _numbers(v) for v in tree)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, and copy it if autograd could not save it."""
    return (tensor.clone() if tensor.is_inference() else tensor).to(device)


def _by_example(batch: ExampleBatch, flat: bool) -> Any:
    """Return a batch's target with the examples in the first dimension; raise a ValueError if it does not fit the inputs."""
    target, size = batch.target, batch.size
    candidates = [t for t in tensors(target) if t.dim() or t is target]
    wrong = [t for t in candidates if not t.dim() or len(t) not in (1, size)]
    if not size or not candidates or (not wrong and any(len(t) == size for t in candidates)):
        return candidates[0] if flat and len(candidates) == 1 else target
    if isinstance(target, Tensor) and target.numel() == size == 1:
        return target.reshape(1)
    flat = flat and not batch.target_in_inputs  # else the model itself would get all of it with each example
    if flat and isinstance(target, Tensor) and target.dim() == 1 and len(target) > size and not len(target) % size:
        return target.reshape(size, -1)
    raise ValueError(
        f"There is a target of shape {tuple((wrong or candidates)[0].shape)} for {size} examples; each example needs a target, "
        f"in the first dimension. {EXAMPLES_FIRST}"
    )


def _unreadable(came: str) -> str:
    return (
        f"The data yield {came}. A batch has to be a mapping of the model's arguments, a pair of inputs and target, or inputs "
        "as tensors; let the DataLoader's `collate_fn` return one of these."
    )
