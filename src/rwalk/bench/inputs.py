"""Which columns are the inputs, and their tensors: the images, else the lists of numbers, else the texts, else a table.

Beside images and texts other columns are not read, such as names of files. Whatever else would be lost is refused.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from rwalk._errors import explain
from rwalk.bench import images, tables, texts
from rwalk.bench.labels import mark
from rwalk.bench.rows import Rows, is_text

TEXTS = ("text", "sentence", "utterance", "content")
Form = Literal["images", "lists", "text", "table"]


def choose(name: str, rows: Rows, label: str | None, by: str | None) -> tuple[Form, list[str]]:
    """Return what the inputs are, and the columns that hold them.

    Args:
        name: of the data set, for messages.
        rows: the training split.
        label: the column of labels, None for texts that are to be continued.
        by: the column of domains, if there is one.

    Raises:
        ValueError: if there are no inputs or labels, or more columns than one tensor can have.
    """
    others = [c for c in rows.table.column_names if c not in (label, by) and not c.startswith("__index_level_")]
    form, columns = _form(name, rows, others)
    if label is None and (form != "text" or any(tables.listed(rows.kind(c)) for c in others)):
        raise schema_error(name, rows, "a column of labels, named `label` or marked as ClassLabel")
    beside = {"images": columns, "lists": others}.get(form, [])
    if len(beside) > 1:
        names = ", ".join(f"`{c}`" for c in beside if c != columns[0])
        came = f"`{name}` with {form} in column `{columns[0]}` beside {names}"
        raise ValueError(explain(came, f"one column of {form}", "Drop the other columns."))
    return form, columns


def refuse_kinds(name: str, form: Form, columns: Sequence[str], test: Rows) -> None:
    """Raise a ValueError if a column of images or texts holds something else in the test split."""
    for column in columns:
        kind = test.kind(column)
        right = _words(kind) if form == "text" else form != "images" or _binary(_content(kind))
        if not right:
            came = f"`{name}` whose column `{column}` holds {kind} in {test.files[0][0]}"
            raise ValueError(explain(came, f"{form} there, as in the training split", "Convert it, or drop these files."))


def _form(name: str, rows: Rows, others: Sequence[str]) -> tuple[Form, list[str]]:
    """Return the first form that some columns have, and these columns."""
    pictures = [c for c in others if _pictures(rows, c)]
    lists = [c for c in others if tables.numbers_in_lists(rows.kind(c))]
    words = [c for c in TEXTS if c in others and _words(rows.kind(c))]
    if pictures:
        return "images", pictures
    if lists:
        return "lists", lists
    if words:
        return "text", words[:1]
    if all(is_text(rows.kind(c)) for c in others):
        expected = "images (a struct with `bytes`, or a column marked as Image), lists of numbers, a column `text`, or a table"
        raise schema_error(name, rows, f"{expected} with numbers or categories")
    return "table", list(others)


def schema_error(name: str, rows: Rows, expected: str) -> ValueError:
    """Return an error that names the columns there are."""
    columns = ", ".join(f"`{field.name}` ({field.type})" for field in rows.table.schema)
    return ValueError(explain(f"`{name}` with columns {columns}", expected, "Convert the data set, or choose another one."))


def tensors(name: str, form: Form, columns: Sequence[str], train: Rows, test: Rows) -> tuple[Tensor, Tensor]:
    """Return the inputs that some columns hold, as in `rwalk.bench.data.DataSet`."""
    if form == "images":
        known, others = images.tensors(name, *(_encoded(rows, columns[0]) for rows in (train, test)))
        return known, others
    if form == "lists":
        return tables.lists(name, columns[0], train, test)
    if form == "text":
        x = texts.padded(strings(name, train, columns[0]))
        if not x.any():
            came = f"`{name}` with training texts that have no words"
            raise ValueError(explain(came, "letters or digits in the texts", "Choose another column, and call it `text`."))
        return x, texts.padded(strings(name, test, columns[0]), x.shape[1])
    return tables.columns(name, columns, train, test)


def strings(name: str, rows: Rows, column: str) -> list[str]:
    """Return the texts of a column, or refuse the first that is missing."""
    found: list[str | None] = rows.values(name, column)
    for row, text in enumerate(found):
        if text is None:
            came = f"`{name}` with missing texts ({rows.where(row)})"
            raise ValueError(explain(came, "a text in each row", "Fill or drop those rows."))
    return [text for text in found if text is not None]


def _words(kind: Any) -> bool:
    import pyarrow.types as kinds

    return is_text(kind.value_type if kinds.is_dictionary(kind) else kind)


def _pictures(rows: Rows, column: str) -> bool:
    """Tell whether a column holds encoded images."""
    kind, feature = rows.kind(column), mark(rows, column)
    content = _content(kind)
    return feature in (None, "Image") and _binary(content) and (content != kind or bool(feature))


def _content(kind: Any) -> Any:
    """Return the type of the images in a column: that of the field `bytes` of a struct, else the column's own."""
    import pyarrow.types as kinds

    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if kinds.is_struct(kind) else {}
    return fields.get("bytes", kind)


def _binary(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kind is not None and (kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _encoded(rows: Rows, column: str) -> images.Encoded:
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    found = rows.table.column(column)
    found = pc.struct_field(found, "bytes") if kinds.is_struct(found.type) else found
    return images.Encoded(found.to_pylist(), rows.where)
