"""The order of rows in time: that of the first column with dates, else with numbers, and among equals that of the others."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from rwalk._errors import printable
from rwalk.bench import tables
from rwalk.bench.rows import Rows, is_text

NAMES = ("timestamp", "date", "t", "time")
"""Columns that give the order of a stream, and are no inputs."""


def order(rows: Rows, columns: Sequence[str]) -> np.ndarray:
    """Return the rows' numbers in the order of their times: columns with dates count first, those with times of day last.

    Raises:
        ValueError: if a column gives no order, lacks a time, or if there are times of day alone.
    """
    found = {column: _times(rows, column) for column in columns}
    ranks = {
        c: 0 if kinds.is_date(t.type) or kinds.is_timestamp(t.type) else 1 + kinds.is_time(t.type) for c, t in found.items()
    }
    first, *others = sorted(columns, key=ranks.__getitem__)
    if ranks[first] == 2:
        came = f"The column `{first}` of `{rows.name}` holds times of day alone"
        raise ValueError(printable(f"{came}. Add their dates in a column `date`, or give the column another name."))
    keys = [(column, "ascending") for column in (first, *others)]
    places: np.ndarray = pc.sort_indices(pa.table(found), sort_keys=keys).to_numpy()
    return places


def _times(rows: Rows, column: str) -> Any:
    """Return the times in a column, one in each row; texts are read as ISO 8601."""
    times = rows.table.column(column)
    read = _read(times) if is_text(times.type) else times
    if read is None or not tables.numeric(read.type) or kinds.is_boolean(read.type) or kinds.is_float16(read.type):
        came = f"The column `{column}` of `{rows.name}`, of {times.type}, gives no order"
        raise ValueError(printable(f"{came}. It needs numbers, dates or times, or another name."))
    missing = pc.is_null(read, nan_is_null=True).to_numpy()
    if missing.any():
        came = f"`{rows.name}` has a row without a time in column `{column}` ({rows.where(int(missing.argmax()))})"
        raise ValueError(printable(f"{came}. Fill or drop it, or give the column another name."))
    return read


def _read(texts: Any) -> Any:
    """Return the times that texts name, with dates or without, or None if one names something else."""
    some_day = pc.binary_join_element_wise(pa.scalar("1970-01-01", texts.type), texts, pa.scalar("T", texts.type))
    for column, kind in ((texts, pa.timestamp("us")), (some_day, pa.time64("us"))):
        with suppress(pa.ArrowException):
            return column.cast(pa.timestamp("us")).cast(kind)
    return None
