"""The rows of a split as Arrow columns, and where each of them lies, for messages."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rwalk._errors import explain


@dataclass(frozen=True)
class Rows:
    """The rows of a split.

    Args:
        table: the columns, an Arrow table.
        files: what the rows come from, in order: the name of a file or a split, and its number of rows.
        chosen: the rows' numbers in those files together; None for all rows in their order.
    """

    table: Any
    files: tuple[tuple[str, int], ...]
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.table)

    def where(self, row: int) -> str:
        """Name the place of a row; rows are counted from 0."""
        place = row if self.chosen is None else int(self.chosen[row])
        for name, count in self.files:
            if place < count:
                return f"row {place} of {name}, counted from 0"
            place -= count
        raise IndexError(row)

    def kind(self, column: str) -> Any:
        """Return the Arrow type of a column."""
        return self.table.schema.field(column).type

    def values(self, name: str, column: str) -> list[Any]:
        """Return the values of a column as Python has them, None where one is missing.

        Raises:
            ValueError: if one cannot be read, such as text that is not UTF-8.
        """
        found = self.table.column(column)
        try:
            values: list[Any] = found.to_pylist()
        except (ValueError, OverflowError):
            row = next((row for row in range(len(found)) if not _readable(found[row])), 0)
            came = f"`{name}` whose column `{column}` cannot be read ({self.where(row)})"
            raise ValueError(explain(came, "text in UTF-8, or dates of a calendar", "Correct this row.")) from None
        return values


def _readable(value: Any) -> bool:
    try:
        value.as_py()
    except (ValueError, OverflowError):
        return False
    return True


def is_text(kind: Any) -> bool:
    """Tell whether an Arrow type is one of texts."""
    import pyarrow.types as kinds

    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def plain(table: Any) -> Any:
    """Return a table in types that others are stored as: no extension types, and no views."""
    import pyarrow as pa

    views = {"string_view": pa.string(), "binary_view": pa.binary()}
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        column = column.cast(views.get(str(column.type), column.type))
        if column.type != field.type:
            table = table.set_column(place, field.name, column)
    return table


def refuse_rows(name: str, train: Rows, test: Rows, bad: np.ndarray, came: str, expected: str, remedy: str) -> None:
    """Raise a ValueError that names the first of the rows that are bad, those for testing behind those for training."""
    if bad.any():
        row, known = int(bad.argmax()), len(train)
        place = train.where(row) if row < known else test.where(row - known)
        raise ValueError(explain(f"`{name}` with {came} ({place})", expected, remedy))
