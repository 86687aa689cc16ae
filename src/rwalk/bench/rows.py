"""The rows of a split as Arrow columns, and where each of them lies, for messages."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from rwalk._errors import printable
from rwalk._io import files


@dataclass(frozen=True)
class Rows:
    """The rows of a split.

    Args:
        name: of the data set, for messages.
        table: the columns, an Arrow table.
        files: what the rows come from, in order: the name of a file or a split, and its number of rows.
        chosen: the rows' numbers in those files together; None for all rows in their order.
    """

    name: str
    table: Any
    files: tuple[tuple[str, int], ...]
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    @cached_property
    def features(self) -> dict[str, Any]:
        """The Hugging Face feature of each column, as `datasets` has it."""
        return features(self.table)

    def where(self, row: int) -> str:
        """Return the place of a row in words, counted from 0."""
        place = row if self.chosen is None else int(self.chosen[row])
        for name, count in self.files:
            if place < count:
                return f"row {place} of {name}, counted from 0"
            place -= count
        raise IndexError(row)

    def kind(self, column: str) -> Any:
        """Return the Arrow type of a column."""
        return self.table.schema.field(column).type

    def values(self, column: str) -> list[Any]:
        """Return the values of a column as Python objects, None where one is missing.

        Raises:
            ValueError: if one cannot be read, such as text that is not UTF-8.
        """
        found = self.table.column(column)
        try:
            values: list[Any] = found.to_pylist()
        except (ValueError, OverflowError):
            row = next((row for row in range(len(found)) if not _readable(found[row])), 0)
            came = f"The column `{column}` of `{self.name}` cannot be read ({self.where(row)})"
            raise ValueError(printable(f"{came}: it needs UTF-8, or dates of a calendar.")) from None
        return values


def _readable(value: Any) -> bool:
    try:
        value.as_py()
    except (ValueError, OverflowError):
        return False
    return True


def features(table: Any) -> dict[str, Any]:
    """Return the Hugging Face feature of each column, except for those that `datasets` has none for."""
    found: dict[str, Any] = {}
    for field in table.schema:
        with suppress(Exception):  # metadata may hold anything
            found |= datasets.Features.from_arrow_schema(pa.schema([field], table.schema.metadata))
    return found


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of texts."""
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def plain(table: Any) -> Any:
    """Return a table of storage types, without extension types, views and dictionaries."""
    views = {"string_view": pa.string(), "binary_view": pa.binary()}
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        if kinds.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        column = column.cast(views.get(str(column.type), column.type))
        if column.type != field.type:
            table = table.set_column(place, field.name, column)
    return table


def opened(file: Path) -> Any:
    """Open a file as one of Arrow's, whose threads may hold it for longer than Python lives: a file of Python's aborts then."""
    files.opened(file).close()  # refuses what is no file
    return pa.OSFile(os.fsencode(file))


def read(file: Path) -> Any:
    """Read a parquet file as an Arrow table."""
    try:
        with opened(file) as source:
            parquet = pq.ParquetFile(source)
            names = parquet.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            table = None if twice else parquet.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        came = f"`{file}` cannot be read as a parquet file ({str(error).splitlines()[0]}). Copy or download it again."
        raise ValueError(printable(came)) from error
    if twice:
        raise ValueError(printable(f"`{file}` has more than one column `{twice[0]}`. Rename or drop the others."))
    return plain(table)


def refuse_rows(rows: Sequence[Rows], bad: np.ndarray, came: str, remedy: str) -> None:
    """Raise a ValueError that names the first of the rows that are bad, counted through train and test."""
    if bad.any():
        row, known = int(bad.argmax()), len(rows[0])
        place = rows[0].where(row) if row < known else rows[1].where(row - known)
        raise ValueError(printable(f"`{rows[0].name}` has {came} ({place}). {remedy}"))
