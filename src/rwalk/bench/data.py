"""Data sets: scikit-learn's digits, or any parquet data set in the Hugging Face schema, as tensors in memory."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwalk._errors import explain

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
}
"""Short names of data sets on the Hugging Face hub; any other name is passed on as it is."""

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
LABELS = ("label", "labels", "fine_label", "target", "class", "y")


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification data set in memory.

    Args:
        name: short name.
        train_x, test_x: inputs, float32: images as (examples, channels, height, width) in [0, 1], tables as (examples, columns)
            with mean 0 and standard deviation 1 over the training examples.
        train_y, test_y: labels from 0 on, int64.
        classes: names of the labels.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    def digest(self) -> str:
        """Return a short fingerprint of the content."""
        whole = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            whole.update(tensor.contiguous().numpy().data)
        return whole.hexdigest()[:16]


def load(name: str, root: str | Path | None = None) -> DataSet:
    """Load a data set by name or folder.

    Args:
        name: "digits" (comes with scikit-learn), a folder with parquet files, or a name: a folder of that name below `root`,
            else a download through Hugging Face `datasets`.
        root: where folders of data sets lie, or such a folder itself; the environment variable `RWALK_DATA` when not given.

    Raises:
        FileNotFoundError: if a folder is missing or has no parquet file of a needed split.
        ValueError: if a file is damaged or the columns are not a classification data set of images or numbers.
        ConnectionError: if a download fails.
    """
    if name == "digits":
        return _digits()
    folder = find(name, root)
    if folder is None:
        return _assemble(name.split("/")[-1], download(HUB.get(name, name)))
    return _assemble(folder.name, {split: _read(folder, split) for split in SPLITS})


def find(name: str, root: str | Path | None = None) -> Path | None:
    """Return the folder that `name` stands for, or None when the name is to be downloaded."""
    root = root or os.environ.get("RWALK_DATA")
    if root and not Path(root).is_dir():
        raise FileNotFoundError(
            explain(f"the data folder `{root}`, which does not exist", "a folder", "Correct `--data` or RWALK_DATA.")
        )
    base = Path(root) if root else None
    places = [base / name] if base else []
    places += [base] if base and (base.resolve().name == name or any(base.glob("*.parquet"))) else []
    places += [Path(name).expanduser()]
    for place in places:
        if place.is_dir():
            return place.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            explain(f"the data folder `{name}`, which does not exist", "a folder with parquet files", "Correct the path.")
        )
    return None


def download(name: str) -> dict[str, Any]:
    """Fetch a data set through Hugging Face `datasets` and return its splits as Arrow tables."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:
        raise ConnectionError(
            explain(
                f"no data set `{name}` ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'})",
                "digits, a folder with parquet files, or a name that Hugging Face `datasets` can load",
                "Pass a folder, or put one of that name below `--data` or RWALK_DATA.",
            )
        ) from error
    chosen = {split: next((s for s in names if s in found), None) for split, names in SPLITS.items()}
    if None in chosen.values():
        raise ValueError(
            explain(f"`{name}` with splits {', '.join(found)}", "train and test splits", "Choose another data set.")
        )
    return {split: found[source].with_format("arrow")[:] for split, source in chosen.items()}


def _digits() -> DataSet:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels; every fifth example of each class is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[(y == label).nonzero().squeeze(1)[::5]] = True
    return DataSet("digits", x[~test], y[~test], x[test], y[test], tuple(map(str, range(10))))


def _read(folder: Path, split: str) -> Any:
    """Read the parquet files of a split: train.parquet, train-00000-of-00001.parquet, train/part.parquet and the like."""
    files = sorted(folder.rglob("*.parquet"))
    for name in SPLITS[split]:
        mine = [f for f in files if f.stem.split("-")[0] == name or (f.parent != folder and f.parent.name == name)]
        if mine:
            return _join(folder, split, mine)
    found = ", ".join(f.name for f in files[:5]) or "no parquet file"
    raise FileNotFoundError(
        explain(
            f"the folder `{folder}` with {found}",
            f"a parquet file of the {split} split, such as {split}.parquet",
            "Point to a folder with train and test files.",
        )
    )


def _join(folder: Path, split: str, files: list[Path]) -> Any:
    """Read the files of a split as one table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = sorted({str(f.parent.relative_to(folder)) for f in files})
    if len(places) > 1:
        raise ValueError(
            explain(
                f"the folder `{folder}` with {split} files in {', '.join(places[:5])}",
                "the files of one data set",
                "Point to one of these folders.",
            )
        )
    try:
        tables = [pq.read_table(f) for f in files]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            explain(
                f"a file of `{folder}` that cannot be read ({str(error).splitlines()[0]})",
                f"whole parquet files for the {split} split",
                "Copy or download the file again.",
            )
        ) from error
    columns = {tuple(table.column_names) for table in tables}
    if len(columns) > 1:
        came = " and ".join(", ".join(names) for names in sorted(columns)[:2])
        raise ValueError(
            explain(f"{split} files of `{folder}` with different columns: {came}", "the same columns", "Make the files alike.")
        )
    return pa.concat_tables(tables, promote_options="permissive")


def _assemble(name: str, tables: dict[str, Any]) -> DataSet:
    """Turn the Arrow tables of a train and a test split into tensors."""
    for split, table in tables.items():
        if len(table) == 0:
            raise ValueError(explain(f"an empty {split} split of `{name}`", "at least one example", "Check the files."))
    label = _label_column(name, tables["train"])
    columns = _input_columns(name, tables["train"], label)
    for split, table in tables.items():
        lacking = [c for c in (label, *columns) if c not in table.column_names]
        if lacking:
            raise ValueError(_schema_error(name, table, f"the column `{lacking[0]}` in the {split} split too"))
    train_x, test_x = _same_form(name, *(_inputs(name, tables[split], columns) for split in ("train", "test")))
    train_y, test_y, classes = _labels(name, tables, label)
    return DataSet(name, train_x, train_y, test_x, test_y, classes)


def _features(table: Any) -> dict[str, Any]:
    """Return the Hugging Face description of a table's columns, empty when it has none."""
    try:
        found = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _label_column(name: str, table: Any) -> str:
    marked = [c for c, f in _features(table).items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    usual = [c for c in LABELS if c in table.column_names]
    both = [c for c in usual if c in marked]
    for candidates in (both, marked, usual):
        if candidates and candidates[0] in table.column_names:
            return candidates[0]
    raise ValueError(_schema_error(name, table, "a column of labels, named `label` or marked as ClassLabel"))


def _schema_error(name: str, table: Any, expected: str) -> str:
    columns = ", ".join(f"`{f.name}` ({f.type})" for f in table.schema)
    return explain(f"`{name}` with columns {columns}", expected, "Convert the data set, or choose another one.")


def _labels(name: str, tables: dict[str, Any], column: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Number the labels from 0 on, in their sorted order."""
    raw = {split: [_whole(v) for v in table.column(column).to_pylist()] for split, table in tables.items()}
    known = sorted(set(raw["train"]) - {None}, key=lambda v: (isinstance(v, str), v))
    strange = sorted({repr(v) for v in raw["test"] if v not in set(known)})
    if None in raw["train"] or -1 in known:
        came = "labels that are missing or -1"
    elif any(isinstance(v, float) for v in known):
        came = "labels that are no whole numbers"
    else:
        came = f"test labels {', '.join(strange[:5])} that train lacks" if strange else ""
    if came:
        raise ValueError(
            explain(f"`{name}` with {came}", "whole numbers or names, the same in train and test", "Check the label column.")
        )
    numbers = {label: i for i, label in enumerate(known)}
    train, test = (torch.tensor([numbers[v] for v in raw[split]]) for split in ("train", "test"))
    names = _features(tables["train"]).get(column, {}).get("names") or []
    return train, test, tuple(names[v] if isinstance(v, int) and v < len(names) else str(v) for v in known)


def _whole(value: Any) -> Any:
    """Turn 1.0 into 1, and what no label can be into text."""
    if isinstance(value, dict | list):
        return repr(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _input_columns(name: str, table: Any, label: str) -> list[str]:
    """Choose the inputs: the images, else the lists of numbers, else all numeric columns but a stored row index."""
    import pyarrow.types as kinds

    others = [f for f in table.schema if f.name != label and not f.name.startswith("__index_level_")]
    lists = [f.name for f in others if kinds.is_list(f.type) or kinds.is_fixed_size_list(f.type) or kinds.is_large_list(f.type)]
    numeric = [f.name for f in others if any(k(f.type) for k in (kinds.is_integer, kinds.is_floating, kinds.is_boolean))]
    texts = any(kinds.is_string(f.type) or kinds.is_large_string(f.type) for f in others)
    for candidates in ([f.name for f in others if _pictures(table, f.name)], lists):
        if candidates:
            return candidates[:1]
    if texts or not numeric:
        expected = "images (a struct with `bytes`, or a column marked as Image), lists of numbers, or numeric columns"
        raise ValueError(_schema_error(name, table, expected))
    return numeric


def _pictures(table: Any, column: str) -> bool:
    """Tell whether a column holds encoded images."""
    import pyarrow.types as kinds

    kind, mark = table.schema.field(column).type, _features(table).get(column)
    struct = kinds.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return struct or (kinds.is_binary(kind) and isinstance(mark, dict) and mark.get("_type") == "Image")


def _inputs(name: str, table: Any, columns: list[str]) -> np.ndarray:
    """Return the inputs that some columns hold."""
    first = table.column(columns[0])
    if _pictures(table, columns[0]):
        return _images(name, first)
    if hasattr(first.type, "value_type"):
        return _arrays(name, columns[0], first)
    return _finite(name, np.stack([table.column(c).to_numpy().astype(np.float32) for c in columns], axis=1))


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(explain(f"`{name}` with missing or infinite numbers", "finite numbers", "Fill or drop those rows."))
    return values


def _arrays(name: str, column: str, values: Any) -> np.ndarray:
    try:
        return _finite(name, np.asarray(values.to_pylist(), dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise ValueError(
            explain(f"`{name}` whose column `{column}` {error}", "lists of numbers of one shape", "Pad or crop them.")
        ) from error


def _images(name: str, column: Any) -> np.ndarray:
    """Decode images to uint8 (examples, height, width, channels): one channel if all are grey, else three."""
    from PIL import Image, UnidentifiedImageError

    raw = [value["bytes"] if isinstance(value, dict) else value for value in column.to_pylist()]
    opened = []
    for row, encoded in enumerate(raw):
        try:
            opened.append(Image.open(io.BytesIO(encoded)))
            opened[-1].load()
        except (UnidentifiedImageError, OSError, TypeError, SyntaxError):
            came = f"`{name}` with an image in row {row} that cannot be read"
            raise ValueError(explain(came, "encoded images (PNG, JPEG) in the file itself", "Check this row.")) from None
    grey = all(image.mode in ("1", "L", "LA") or image.mode.startswith("I") for image in opened)
    arrays = [_pixels(image, grey) for image in opened]
    sizes = {a.shape[:2] for a in arrays}
    if len(sizes) > 1:
        some = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        raise ValueError(explain(f"`{name}` with images of sizes {some}", "images of one size", "Resize them beforehand."))
    whole = np.stack(arrays)
    return whole[..., None] if grey else whole


def _pixels(image: Any, grey: bool) -> np.ndarray:
    """Return an image's pixels as uint8: grey or colour, 16-bit ones scaled down."""
    if image.mode.startswith("I"):
        eight = (np.asarray(image) // 257).clip(0, 255).astype(np.uint8)
        return eight if grey else np.repeat(eight[..., None], 3, axis=-1)
    return np.asarray(image.convert("L" if grey else "RGB"))


def _same_form(name: str, train: np.ndarray, test: np.ndarray) -> tuple[Tensor, Tensor]:
    """Bring both splits to one form: images to channels first in [0, 1], numbers to mean 0 and standard deviation 1."""
    pictures = train.dtype == np.uint8 and test.dtype == np.uint8
    if pictures:
        channels = max(train.shape[-1], test.shape[-1])
        train, test = (np.repeat(a, channels // a.shape[-1], axis=-1).transpose(0, 3, 1, 2) for a in (train, test))
    if train.shape[1:] != test.shape[1:]:
        shapes = f"{train.shape[1:]} and {test.shape[1:]}"
        raise ValueError(
            explain(f"`{name}` with train and test inputs of shapes {shapes}", "one shape", "Make both splits alike.")
        )
    if pictures:
        train_x, test_x = (torch.from_numpy(np.ascontiguousarray(a)).float().div_(255) for a in (train, test))
        return train_x, test_x
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1
    return torch.from_numpy((train - mean) / deviation).float(), torch.from_numpy((test - mean) / deviation).float()
