"""Examples of one's own as tensors: from arrays, lists, tables of pandas, and PyTorch's data sets and loaders."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from rwalk._errors import printable
from rwalk._parameters import listed

BATCH = 1024
"""How many examples of a data set are read at once."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The training or test examples of a task.

    Args:
        what: what they are, for messages.
        x: inputs, float32 or, where they number words, int64; first dimension examples.
        y: labels: int64 (examples,); float64 (examples, targets) for a regression; or a list of names.
    """

    what: str
    x: Tensor
    y: Tensor | list[str]

    @property
    def form(self) -> str:
        """What the labels are, in words."""
        if isinstance(self.y, list):
            return "that are names"
        return f"of {self.y.shape[1]} floating-point numbers" if self.y.is_floating_point() else "that are whole numbers"


def read(side: Any, what: str, tokens: int = 0) -> Examples:
    """Read examples once.

    Args:
        side: inputs and labels as a pair of arrays, tensors, lists or tables; a data set with a length, whose items are such
            pairs; or a loader: all its examples are read in the order of its data set, whether it shuffles or not.
        what: what they are, for messages.
        tokens: how many different numbers the inputs can be; 0 for inputs that number nothing.

    Raises:
        ValueError: if they are something else, or none, or hold values that are missing or out of range.
    """
    given = side if isinstance(side, tuple) and len(side) == 2 else _collected(side, what)
    x, y = (_tensor(part, f"{name} of {what}") for name, part in zip(("inputs", "labels"), given, strict=True))
    if isinstance(x, list) or x.dim() < 2:
        came = "names" if isinstance(x, list) else f"shape {tuple(x.shape)}"
        raise ValueError(f"The inputs of {what} are of {came}. Pass numbers in two dimensions or more, the first of examples.")
    if len(x) != len(y) or not len(y):
        raise ValueError(f"There are {len(x)} inputs and {len(y)} labels of {what}. Pass as many of both, and one or more.")
    return Examples(what, _words(x, what, tokens) if tokens else _numbers(x, what), _labels(y, what))


def _collected(side: Any, what: str) -> tuple[Any, Any]:
    """Read a data set or a loader; what it draws at random is the same each time, and leaves no trace."""
    loader = side if isinstance(side, torch_data.DataLoader) else None
    dataset = side if loader is None else loader.dataset
    if isinstance(dataset, torch_data.IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        came = f"{what[0].upper()}{what[1:]} came as a `{type(dataset).__name__}`"
        needed = "Pass a pair of arrays `(x, y)`, a data set with a length whose items are such pairs, or its `DataLoader`"
        raise ValueError(printable(f"{came}. {needed}; collect what has no length into tensors."))
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        batches = list(_batches(dataset, loader, what))
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            came = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a `{type(batch).__name__}`"
            raise ValueError(f"An item of {what} is {came}, and not a pair of an input and a label.")
    x, y = zip(*batches, strict=True) if batches else ((), ())
    return _behind_each_other(x), _behind_each_other(y)


def _batches(dataset: Any, loader: Any, what: str) -> Any:
    """Return a loader of all examples in the order of the data set."""

    def collate(items: list[Any]) -> Any:
        try:
            return torch_data.default_collate(items)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                printable(f"The items of {what} cannot be joined ({error}). Let a transform make tensors of one shape.")
            ) from None

    if loader is None:
        return torch_data.DataLoader(dataset, BATCH, collate_fn=collate)
    own = loader.batch_size is None and loader.batch_sampler is not None
    rows = sorted(chain.from_iterable(loader.batch_sampler) if own else loader.sampler)
    chosen, size = torch_data.Subset(dataset, rows), BATCH if own else loader.batch_size
    return torch_data.DataLoader(chosen, size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def _behind_each_other(parts: Sequence[Any]) -> Any:
    """Join what batches hold."""
    if parts and all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))
    return list(chain.from_iterable(parts))


def _tensor(values: Any, what: str) -> Tensor | list[str]:
    """Return numbers as a tensor, and names as a list."""
    if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
        values = torch.stack(list(values))
    if isinstance(values, Tensor):
        found = values.detach().cpu()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(printable(f"The {what} are no array ({error}). Give all of them one shape.")) from None
        if array.dtype.kind in "OUST" and array.ndim == 1:
            return _names(values if isinstance(values, list | tuple) else array.tolist(), what)
        if array.dtype.kind not in "biuf":
            types = getattr(values, "dtypes", {})
            odd = [name for name in getattr(values, "columns", ()) if getattr(types[name], "kind", "O") not in "biuf"]
            where = f" in {listed(odd)}" if odd else ""
            remedy = "Pass numbers; labels may also be names, in one dimension, as a column of a data frame is"
            raise ValueError(printable(f"The {what} are of type {array.dtype}{where}. {remedy}."))
        found = torch.tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    if found.is_complex() or not found.dim():
        raise ValueError(f"The {what} are of shape {tuple(found.shape)} and type {found.dtype}. Pass an array of real numbers.")
    return found


def _names(values: Sequence[Any], what: str) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            came = f"an object of type `{type(value).__name__}` (number {row}, counted from 0)"
            raise ValueError(printable(f"Among the {what} is {came}. Pass numbers alone, or names alone as labels."))
    return list(map(str, values))


def _numbers(x: Tensor, what: str) -> Tensor:
    """Return inputs in float32; bytes, as images have them, divided by 255."""
    found = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    _refuse_rows(~found.isfinite(), f"inputs of {what}", "missing, infinite or too large")
    return found


def _words(x: Tensor, what: str, tokens: int) -> Tensor:
    """Return inputs that number words."""
    found = x.long()
    came = f"no whole number from 0 to {tokens - 1}"
    _refuse_rows((found != x) | (found < 0) | (found >= tokens), f"inputs of {what}", came)
    return found


def _labels(y: Tensor | list[str], what: str) -> Tensor | list[str]:
    """Return labels in their form; a single column of labels is one label each."""
    if isinstance(y, list):
        return y
    if y.is_floating_point():
        targets = y.double() if y.dim() > 1 else y.double()[:, None]
        _refuse_rows(~targets.isfinite(), f"labels of {what}", "missing or infinite")
    else:
        targets = y.long().squeeze(1) if y.dim() == 2 and y.shape[1] == 1 else y.long()
    if targets.dim() != 1 + y.is_floating_point() or not targets.numel():
        raise ValueError(f"The labels of {what} have shape {tuple(y.shape)}. Pass one for each example, or a row of targets.")
    return targets


def _refuse_rows(bad: Tensor, what: str, came: str) -> None:
    rows = bad.flatten(1).any(1)
    if rows.any():
        row = int(rows.nonzero()[0])
        raise ValueError(f"Among the {what} is one that is {came} (number {row}, counted from 0). Correct or drop it.")
