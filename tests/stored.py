"""Small data sets as parquet files, for tests of what is read from them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image, form="PNG", **options):
    """An image, or an array of one, as a row of an image column."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return row(buffer.getvalue())


def row(content):
    return {"bytes": content, "path": None}


def features(**columns):
    """The metadata of the Hugging Face hub."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def write(folder, name, columns, metadata=None):
    folder.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, folder / name)


def splits(folder, train, test=None, metadata=None):
    """Write train and test, the same if only one is given, and return the folder's name."""
    write(folder, "train.parquet", train, metadata)
    write(folder, "test.parquet", train if test is None else test, metadata)
    return str(folder)
