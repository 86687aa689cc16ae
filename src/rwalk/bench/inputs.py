"""Which columns are the inputs, and their tensors: the images, else the lists of numbers, else the texts, else a table.

Beside images and texts other columns are not read, such as names of files. Any other column that would be lost is refused.
"""

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import pyarrow.compute as pc
from torch import Tensor

from rwalk._errors import printable
from rwalk.bench import images, tables, texts
from rwalk.bench.rows import Rows, is_text

TEXTS = ("text", "sentence", "utterance", "content")
Form = Literal["images", "lists", "text", "table"]


def choose(rows: Rows, label: str | None, by: str | None) -> tuple[Form, list[str]]:
    """Return what the inputs are, and the columns that hold them.

    Args:
        rows: the training split.
        label: the column of labels, None for texts that are to be continued.
        by: the column of domains, if there is one.

    Raises:
        ValueError: if there are no inputs or labels, or more columns than one tensor can have.
    """
    others = [c for c in rows.table.column_names if c not in (label, by) and not c.startswith("__index_level_")]
    form, columns = _form(rows, others)
    if label is None and (form != "text" or any(tables.listed(rows.kind(c)) for c in others)):
        raise schema_error(rows, "a column of labels: `label`, one marked as ClassLabel, or one that you name (`--label`)")
    beside = {"images": columns, "lists": others}.get(form, [])
    if len(beside) > 1:
        names = ", ".join(f"`{c}`" for c in beside if c != columns[0])
        raise ValueError(
            printable(f"`{rows.name}` has {form} in column `{columns[0]}` beside {names}. Drop the other columns.")
        )
    return form, columns


def refuse_kinds(form: Form, columns: Sequence[str], test: Rows) -> None:
    """Raise a ValueError if a column of images or texts holds something else in the test split."""
    for column in columns:
        kind = test.kind(column)
        right = is_text(kind) if form == "text" else form != "images" or _pictures(test, column)
        if not right:
            came = (
                f"The column `{column}` of `{test.name}` holds {kind} in {test.files[0][0]}, and {form} in the training split"
            )
            raise ValueError(printable(f"{came}. Convert it, or drop these files."))


def _form(rows: Rows, others: Sequence[str]) -> tuple[Form, list[str]]:
    """Return the first form that some columns have, and these columns."""
    pictures = [c for c in others if _pictures(rows, c)]
    lists = [c for c in others if tables.numbers_in_lists(rows.kind(c))]
    words = [c for c in TEXTS if c in others and is_text(rows.kind(c))]
    if pictures:
        return "images", pictures
    if lists:
        return "lists", lists
    if words:
        return "text", words[:1]
    if all(is_text(rows.kind(c)) for c in others):
        expected = "images (a struct with `bytes`, or a column marked as Image), lists of numbers, a column `text`, or a table"
        raise schema_error(rows, f"{expected} with numbers or categories")
    return "table", list(others)


def schema_error(rows: Rows, needed: str) -> ValueError:
    """Return an error that names the columns."""
    columns = ", ".join(f"`{field.name}` ({field.type})" for field in rows.table.schema)
    return ValueError(printable(f"`{rows.name}` has the columns {columns}; it needs {needed}."))


def tensors(form: Form, columns: Sequence[str], train: Rows, test: Rows) -> tuple[Tensor, Tensor]:
    """Return the inputs that some columns hold, as in `rwalk.bench.dataset.DataSet`."""
    if form == "images":
        known, others = images.tensors(train.name, *(_encoded(rows, columns[0]) for rows in (train, test)))
        return known, others
    if form == "lists":
        return tables.lists(columns[0], train, test)
    if form == "text":
        x = texts.padded(strings(train, columns[0]))
        if not x.any():
            raise ValueError(printable(f"The training texts of `{train.name}` have no words. Name another column `text`."))
        return x, texts.padded(strings(test, columns[0]), x.shape[1])
    return tables.columns(columns, train, test)


def strings(rows: Rows, column: str) -> list[str]:
    """Return the texts of a column, or refuse the first that is missing."""
    found: list[str | None] = rows.values(column)
    for row, text in enumerate(found):
        if text is None:
            raise ValueError(printable(f"`{rows.name}` has missing texts ({rows.where(row)}). Fill or drop those rows."))
    return [text for text in found if text is not None]


def _pictures(rows: Rows, column: str) -> bool:
    """Return whether a column holds encoded images: one of the feature Image, or a struct with `bytes` without a feature."""
    feature = rows.features.get(column)
    content: Any = feature.get("bytes") if isinstance(feature, dict) else None
    bare = isinstance(content, datasets.Value) and content.dtype in ("binary", "large_binary")
    return bare or isinstance(feature, datasets.Image)


def _encoded(rows: Rows, column: str) -> images.Encoded:
    return images.Encoded(pc.struct_field(rows.table.column(column), "bytes").to_pylist(), rows.where)
