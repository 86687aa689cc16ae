"""Columns of numbers, truth values, times and categories as tensors, in float64 until they are standardised.

What is known of a column comes from its rows for training: mean and deviation, and which values a category has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds
import torch
from torch import Tensor

from rwalk._errors import printable
from rwalk.bench.dataset import scaled
from rwalk.bench.rows import Rows, is_text, refuse_rows

VALUES = 100
"""The most values that a category may have; each becomes a column."""


def columns(chosen: Sequence[str], train: Rows, test: Rows) -> tuple[Tensor, Tensor]:
    """Return columns side by side: numbers and times with mean 0 and standard deviation 1, categories as 0 and 1.

    Returns:
        Train and test inputs, float32 (rows, columns). A category has a column for each value in the rows for training; others
        are 0 in all of them.

    Raises:
        ValueError: if a column is of another type, has missing or infinite numbers, or more than `VALUES` categories.
    """
    parts = []
    for column in chosen:
        whole = _joined(train.name, column, *(rows.table.column(column) for rows in (train, test)))
        _refuse_missing(column, train, test, whole.is_null().to_numpy(zero_copy_only=False))
        if is_text(whole.type):
            parts.append(_one_hot(train.name, column, whole, len(train)))
        elif numeric(whole.type):
            values = torch.from_numpy(_numbers(whole, len(train)))[:, None]
            parts.append(_standardised(column, train, test, values))
        else:
            needed = "numbers, truth values, times or categories, or one image, list of numbers or `text` in each row"
            came = f"The column `{column}` of `{train.name}` holds {whole.type}, and not {needed}"
            raise ValueError(printable(f"{came}. Drop this column, or convert it."))
    x = torch.cat(parts, 1)
    return x[: len(train)], x[len(train) :]


def lists(column: str, train: Rows, test: Rows) -> tuple[Tensor, Tensor]:
    """Return lists of numbers, each place with mean 0 and standard deviation 1 over the rows for training.

    Returns:
        Train and test inputs, float32 (rows, length), or with more dimensions for lists in lists.

    Raises:
        ValueError: if lists differ in length, are empty, or hold missing or infinite numbers.
    """
    (known, shape), (other, second) = (_flat(column, rows) for rows in (train, test))
    if shape != second:
        came = f"The column `{column}` of `{train.name}` has lists of shape {shape} in train and {second} in test"
        raise ValueError(printable(f"{came}. Pad or crop them to one shape."))
    whole, size = _joined(train.name, column, known, other), int(np.prod(shape))
    missing = whole.is_null().to_numpy(zero_copy_only=False).reshape(-1, size).any(1)
    _refuse_missing(column, train, test, missing)
    values = torch.from_numpy(_numbers(whole, len(train) * size)).view(-1, *shape)
    x = _standardised(column, train, test, values)
    return x[: len(train)], x[len(train) :]


def target(column: str, train: Rows, test: Rows) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return a column of numbers to be met, up to a constant.

    Returns:
        Those for training and testing, float64 (rows, 1), and the names of their classes, which are none.

    Raises:
        ValueError: if the column is of another type, or has missing or infinite numbers.
    """
    whole = _joined(train.name, column, *(rows.table.column(column) for rows in (train, test)))
    if not numeric(whole.type):
        came = f"The column `{column}` of `{train.name}` holds {whole.type}, and a target has to be a number"
        raise ValueError(printable(f"{came}. Choose another column, or convert it; names are labels."))
    _refuse_missing(column, train, test, whole.is_null().to_numpy(zero_copy_only=False))
    values = torch.from_numpy(_numbers(whole, len(train)))[:, None]
    _refuse_missing(column, train, test, ~values.isfinite().all(1).numpy())
    return values[: len(train)], values[len(train) :], ()


def numeric(kind: Any) -> bool:
    """Return whether a type can be a number: of numbers, truth values and times."""
    some = (kinds.is_boolean, kinds.is_integer, kinds.is_floating, kinds.is_decimal, kinds.is_temporal)
    return any(holds(kind) for holds in some) and not kinds.is_interval(kind)


def listed(kind: Any) -> bool:
    """Return whether a type is one of lists."""
    return any(holds(kind) for holds in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list))


def numbers_in_lists(kind: Any) -> bool:
    """Return whether a type is one of lists of numbers, or of such lists."""
    return listed(kind) and (numeric(kind.value_type) or numbers_in_lists(kind.value_type))


def _joined(name: str, column: str, *sides: Any) -> Any:
    """Return the values for training and behind them those for testing as one Arrow array, of a type that holds both."""
    forms = {side.type for side in sides}
    numbers = all(numeric(form) and not kinds.is_temporal(form) for form in forms)
    if len(forms) > 1 and numbers and any(kinds.is_floating(form) or kinds.is_boolean(form) for form in forms):
        sides = tuple(side.cast(pa.float64(), safe=False) for side in sides)
    try:
        tables = [pa.table({column: side}) for side in sides]
        whole = pa.concat_tables(tables, promote_options="permissive").column(0).combine_chunks()
    except pa.ArrowException:
        came = f"The column `{column}` of `{name}` is {sides[0].type} in train and {sides[1].type} in test"
        raise ValueError(printable(f"{came}. Convert one of them.")) from None
    return whole


def _refuse_missing(column: str, train: Rows, test: Rows, missing: np.ndarray) -> None:
    refuse_rows((train, test), missing, f"missing or infinite values in column `{column}`", "Fill or drop those rows.")


def _standardised(column: str, train: Rows, test: Rows, values: Tensor) -> Tensor:
    """Return values, (rows, ...), in float32 by the mean and deviation of those for training."""
    _refuse_missing(column, train, test, ~values.flatten(1).isfinite().all(1).numpy())
    scale = scaled(values[: len(train)])
    x = torch.cat([scale(part) for part in values.split(4096)])
    far = ~x.flatten(1).isfinite().all(1).numpy()
    came = f"a number in column `{column}` that is too far from those for training"
    refuse_rows((train, test), far, came, "Correct or drop this row.")
    return x


def _one_hot(name: str, column: str, whole: Any, known: int) -> Tensor:
    """Return a column of 0 and 1, float32, for each value of a category that a row for training has, in their sorted order."""
    values = pc.unique(whole[:known])
    if len(values) > VALUES:
        came = f"`{name}` has {len(values):,} different values in column `{column}`, more than the {VALUES} of a category"
        raise ValueError(printable(f"{came}. Drop this column, or group its values."))
    values = values.take(pc.array_sort_indices(values))
    codes = pc.index_in(whole, value_set=values).fill_null(-1).to_numpy(zero_copy_only=False)
    return torch.from_numpy(codes[:, None] == np.arange(len(values))).float()


def _numbers(whole: Any, known: int) -> np.ndarray:
    """Return values in float64; whole numbers, times and decimals less the smallest for training, so that no digit is lost."""
    if kinds.is_decimal(whole.type):
        values = whole.to_pylist()
        lowest = min(values[:known])
        return np.array([float(value - lowest) for value in values])
    if kinds.is_temporal(whole.type):
        whole = whole.cast(pa.int32() if whole.type.bit_width == 32 else pa.int64())
    found: np.ndarray = whole.to_numpy(zero_copy_only=False)
    return _above(found, found[:known].min()) if found.dtype.kind in "iu" else found.astype(np.float64)


def _above(values: np.ndarray, lowest: Any) -> np.ndarray:
    """Return how far whole numbers are above one of them: differences of 64 bits fit into unsigned ones, by their size."""
    whole, least = values.astype(np.uint64), np.array(lowest).astype(np.uint64)
    return np.where(values >= lowest, (whole - least).astype(np.float64), -(least - whole).astype(np.float64))


def _flat(column: str, rows: Rows) -> tuple[Any, tuple[int, ...]]:
    """Return the numbers of lists one behind the other, and the lists' shape."""
    array = rows.table.column(column).combine_chunks()
    shape: tuple[int, ...] = ()
    while listed(array.type):
        lengths = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False)
        bad = (lengths != lengths[0]) | (lengths < 1)
        if bad.any():
            row = int(bad.argmax()) // int(np.prod(shape))
            came = f"The column `{column}` of `{rows.name}` has an empty or missing list, or one of another length"
            raise ValueError(printable(f"{came} ({rows.where(row)}). Pad, crop or drop it: lists of numbers need one shape."))
        shape = (*shape, int(lengths[0]))
        array = array.flatten()
    return array, shape
