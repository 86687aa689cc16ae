"""Labels and domains: which column holds them, and their values as whole numbers from 0 on."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any

import pyarrow.types as kinds
import torch
from datasets import ClassLabel
from torch import Tensor

from rwalk._errors import printable
from rwalk.bench.rows import Rows

LABELS = ("label", "labels", "fine_label", "target", "class", "y")


def usual_column(rows: Rows, by: str | None) -> str | None:
    """Return the column of labels, if there is one beside that of the domains."""
    names = [column for column in rows.table.column_names if column != by]
    marked = [column for column in names if isinstance(rows.features.get(column), ClassLabel)]
    usual = [column for column in LABELS if column in names]
    both = [column for column in usual if column in marked]
    return next(iter(both + marked + usual), None)


def numbered(train: Rows, test: Rows, column: str, what: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Number the values of a column from 0 on, in their sorted order.

    Args:
        train: the rows for training.
        test: the rows for testing.
        column: the column.
        what: "labels" or "domains".

    Returns:
        The numbers for train and test, int64 (rows,), and the names of the values.

    Raises:
        ValueError: if a value is missing, neither a whole number nor a name, or in test alone.
    """
    found = [_values(rows, column, what) for rows in (train, test)]
    known = sorted(set(found[0]))
    numbers = {value: number for number, value in enumerate(known)}
    for row, value in enumerate(found[1]):
        if value not in numbers:
            raise _refusal(test, row, column, f"test {what} {value!r} that train lacks")
    names = _names(train.features, column)
    return (
        torch.tensor([numbers[value] for value in found[0]]),
        torch.tensor([numbers[value] for value in found[1]]),
        tuple(_name(names, value) for value in known),
    )


def _values(rows: Rows, column: str, what: str) -> list[Any]:
    """Return the values of a column that can be labels, or refuse the first that cannot."""
    if kinds.is_nested(rows.kind(column)):
        came = f"The column `{column}` of `{rows.name}` holds {what} of type {rows.kind(column)}"
        raise ValueError(printable(f"{came}; each row needs a whole number or a name."))
    values = [_whole(value) for value in rows.values(column)]
    for row, value in enumerate(values):
        if value is None or (what == "labels" and value == -1):  # -1 is the hub's sign for no label
            missing = "labels that are missing or -1" if what == "labels" else f"missing {what}"
            raise _refusal(rows, row, column, missing)
        if isinstance(value, float | Decimal):
            raise _refusal(rows, row, column, f"{what} that are no whole numbers")
    return values


def _refusal(rows: Rows, row: int, column: str, came: str) -> ValueError:
    return ValueError(printable(f"`{rows.name}` has {came} ({rows.where(row)}). Check the column `{column}`."))


def _whole(value: Any) -> Any:
    """Turn 1.0 into 1, and bytes into text."""
    if isinstance(value, float | Decimal) and value == value and abs(value) != float("inf") and value == int(value):
        return int(value)
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def refuse_names(came: str, described: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Raise a ValueError if tables that belong together give one number of a column different names.

    Args:
        came: what they are, for the message.
        described: the features of each table.
        columns: those to look at.
    """
    for column in columns:
        for number, names in enumerate(zip_longest(*(_names(about, column) for about in described))):
            different = list(dict.fromkeys(name for name in names if name is not None))
            if len(different) > 1:
                both = f"both {different[0]!r} and {different[1]!r}"
                raise ValueError(printable(f"{came} name {number} in the column `{column}` {both}. Write them with one name."))


def _names(described: dict[str, Any], column: str) -> Sequence[str]:
    found = described.get(column)
    return found.names or () if isinstance(found, ClassLabel) else ()


def _name(names: Sequence[str], value: Any) -> str:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)
