"""What lies in a folder of data sets, as far as the metadata of their files shows; no row is read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rwalk.bench import inputs, parquet
from rwalk.bench.labels import usual_column
from rwalk.bench.rows import Rows, opened, plain

STREAMS = {
    "images": ("split", "permuted", "rotated"),
    "lists": ("split", "permuted"),
    "table": ("split", "permuted"),
    "text": ("split",),
}
"""The streams that can be made of inputs of each form, with labels."""


def about(root: Path | None) -> dict[str, str]:
    """Return for each data set in a folder how many examples of what it has, and which streams can be made of it."""
    if root is None:
        return {}
    itself = [root.resolve()] if any(root.glob("*.parquet")) else []
    below = sorted(place for place in root.iterdir() if place.is_dir() and any(place.rglob("*.parquet")))
    return {place.name: _about(place) for place in itself + below}


def _about(folder: Path) -> str:
    try:
        in_time = parquet.is_ordered(folder)
        splits = [parquet.files_of(folder, names) for names in ([(parquet.STREAM,)] if in_time else parquet.SPLITS.values())]
        sizes = " + ".join(f"{sum(_metadata(file).num_rows for file in split):,}" for split in splits)
        kinds, what = _streams(folder, splits[0], in_time)
    except (OSError, ValueError) as error:
        return f"cannot be used: {error}"
    return f"{sizes} {what}: {', '.join(kinds)}"


def _streams(folder: Path, train: list[Path], in_time: bool) -> tuple[list[str], str]:
    """Return the kinds of streams that can be made of some files, and what their inputs are."""
    schema = _metadata(train[0]).schema.to_arrow_schema()
    rows = Rows(folder.name, plain(schema.empty_table()), ())
    by = "domain" if "domain" in rows.table.column_names else None
    label = usual_column(rows, by)
    form, _ = inputs.choose(rows, label, by)
    apart = len({file.parent for file in train}) > 1
    kinds = [*(() if label is None or apart else STREAMS[form]), *["drift"] * in_time]
    kinds += ["domain"] if by else ["domain --by folder"] if apart else []
    whats = {"lists": "rows of numbers", "table": "rows of a table", "text": "texts"}
    return kinds, "texts to continue" if label is None else whats.get(form, form)


def _metadata(file: Path) -> Any:
    try:
        with opened(file) as source:
            return pq.read_metadata(source)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"`{file.name}` is no parquet file ({str(error).splitlines()[0]})") from None
