"""Batches as models take them: which tensors hold the examples, and what a part of them is."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwalk._errors import explain

EXAMPLES_FIRST = "Put the examples first in inputs, targets and outputs; for an LSTM that is `batch_first=True`."
"""What to do where examples lie along another dimension."""


@dataclass
class Batch:
    """Examples as the model takes them: all tensors have them in their first dimension, except those whose id is `shared`.

    `given` is whether the model is given the target, too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int
    shared: frozenset[int]
    given: bool = False

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
        return Batch(args, kwargs, target, size, self.shared, self.given)


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
        target = raw.get("labels")
    elif isinstance(raw, tuple | list):
        if len(raw) not in (1, 2):
            raise TypeError(_unreadable(f"a {type(raw).__name__} of {len(raw)}"))
        inputs, target = raw[0], raw[1] if len(raw) == 2 else None
    inputs, target = (_mapped(part, partial(_placed, device=device)) for part in (inputs, target))
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    size = first_size(inputs)
    if size is None:
        raise TypeError(_unreadable(f"a batch whose inputs, a `{type(inputs).__name__}`, hold no tensor"))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    shared = frozenset(id(t) for t in tensors((inputs, target)) if not t.dim() or t.shape[0] != size)
    return Batch(args, kwargs, target, size, shared, given=isinstance(raw, Mapping))


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, as one that autograd may keep."""
    return (tensor.clone() if tensor.is_inference() else tensor).to(device)


def _by_example(batch: Batch, flat: bool) -> Any:
    """Return a batch's target with the examples in the first dimension, or raise a ValueError if it is of other examples."""
    target, size = batch.target, batch.size
    ranked = [t for t in tensors(target) if t.dim() or t is target]
    if not size or not ranked or any(t.dim() and t.shape[0] == size for t in ranked):
        return target
    if isinstance(target, Tensor) and target.numel() == size == 1:
        return target.reshape(1)
    flat = flat and not batch.given  # else the model itself would see all of it with each example
    if flat and isinstance(target, Tensor) and target.dim() == 1 and len(target) > size and not len(target) % size:
        return target.reshape(size, -1)
    came = f"a target of shape {tuple(ranked[0].shape)} for {size} examples"
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
