"""Data sets: scikit-learn's digits, or any parquet data set in the Hugging Face schema, as tensors in memory.

Inputs are the images, else the lists of numbers, else the texts, else all numbers. Texts without labels are to be continued.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwalk._errors import explain
from rwalk.bench import texts

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
}
"""Short names of data sets on the Hugging Face hub; any other name is passed on as it is."""

DIGITS = "sklearn/datasets/data/digits.csv.gz"
"""Where scikit-learn keeps them: a row for each image, 64 pixels from 0 to 16 and the label."""

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
LABELS = ("label", "labels", "fine_label", "target", "class", "y")
TEXTS = ("text", "sentence", "utterance", "content")
TIMES = ("t", "time", "timestamp", "date")
STREAM = "stream"
"""The one split of a data set whose rows come in order; a column of `TIMES` gives the order, and is no input."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification data set in memory.

    Args:
        name: short name.
        train_x, test_x: inputs. Images: float32 (examples, channels, height, width) in [0, 1]. Tables: float32 (examples,
            columns) with mean 0 and standard deviation 1 over the training examples. Texts: int64 (examples, words), 0 after a
            text's end. Texts without labels: int64 (windows, characters).
        train_y, test_y: labels from 0 on, int64 (examples,); or the next characters, (windows, characters).
        classes: names of the labels.
        tokens: how many different numbers a text's inputs can be; 0 for other inputs.
        train_domain, test_domain: to which of the `domains` each example belongs, int64, where a column was chosen for that.
        domains: names of the domains.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    tokens: int = 0
    train_domain: Tensor | None = None
    test_domain: Tensor | None = None
    domains: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return a short fingerprint of the content."""
        whole = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y, self.train_domain, self.test_domain):
            whole.update(b"" if tensor is None else tensor.contiguous().numpy().data)
        return whole.hexdigest()[:16]


def load(name: str, root: str | Path | None = None, label: str | None = None, by: str | None = None) -> DataSet:
    """Load a data set by name or folder.

    Of a folder whose only file is `stream.parquet`, every fifth row in its order is for testing.

    Args:
        name: "digits" (comes with scikit-learn), a folder with parquet files, or a name: a folder of that name below `root`,
            else a download through Hugging Face `datasets`.
        root: where folders of data sets lie, or such a folder itself; the environment variable `RWALK_DATA` when not given.
        label: the column of labels; a usual name, or one that is marked as such, when not given.
        by: a column that divides the examples into domains, or "folder", if each domain is a folder in the data set's.

    Raises:
        FileNotFoundError: if a folder is missing or has no parquet file of a needed split.
        ValueError: if a file is damaged or the columns are not a classification data set of images or numbers.
        ConnectionError: if a download fails.
    """
    if name == "digits":
        if label or by:
            raise ValueError(explain(f"the column `{label or by}`", "digits without one", "Choose another data set."))
        return _digits()
    folder = find(name, root)
    if folder is None:
        return _assemble(name.split("/")[-1], download(HUB.get(name, name)), label, by)
    ordered = _files(folder, STREAM) and not _files(folder, "train")
    tables = _held_out(_read(folder, (STREAM,))) if ordered else {s: _read(folder, names, by) for s, names in SPLITS.items()}
    return _assemble(folder.name, tables, label, by)


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
    # Read from the installed package: importing scikit-learn would take as long as importing torch.
    table = torch.from_numpy(np.loadtxt(str(distribution("scikit-learn").locate_file(DIGITS)), delimiter=","))
    x, y = table[:, :-1].float().div(16).reshape(-1, 1, 8, 8), table[:, -1].long()
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[(y == label).nonzero().squeeze(1)[::5]] = True
    return DataSet("digits", x[~test], y[~test], x[test], y[test], tuple(map(str, range(10))))


def _held_out(table: Any) -> dict[str, Any]:
    """Bring rows into their order, and set every fifth aside for testing."""
    times = [c for c in TIMES if c in table.column_names][:1]
    if times:
        table = table.sort_by(times[0]).drop_columns(times)
    last = np.arange(len(table)) % 5 == 4
    return {"train": table.filter(~last), "test": table.filter(last)}


def _files(folder: Path, name: str) -> list[Path]:
    """Find the files of a split: train.parquet, train-00000-of-00001.parquet, train/part.parquet and the like."""
    files = sorted(folder.rglob("*.parquet"))
    return [f for f in files if f.stem.split("-")[0] == name or (f.parent != folder and f.parent.name == name)]


def _read(folder: Path, names: tuple[str, ...], by: str | None = None) -> Any:
    """Read the parquet files of a split, which may have one of several names."""
    for name in names:
        if mine := _files(folder, name):
            return _join(folder, names[0], mine, by)
    found = ", ".join(f.name for f in sorted(folder.rglob("*.parquet"))[:5]) or "no parquet file"
    raise FileNotFoundError(
        explain(
            f"the folder `{folder}` with {found}",
            f"a parquet file of the {names[0]} split, such as {names[0]}.parquet",
            "Point to a folder with train and test files.",
        )
    )


def _join(folder: Path, split: str, files: list[Path], by: str | None) -> Any:
    """Read the files of a split as one table, with a column of folders if they are the domains."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = sorted({str(f.parent.relative_to(folder)) for f in files})
    if len(places) > 1 and by != "folder":
        raise ValueError(
            explain(
                f"the folder `{folder}` with {split} files in {', '.join(places[:5])}",
                "the files of one data set",
                "Point to one of these folders, or make each a task with a `domain-` stream by `folder`.",
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
    if by == "folder":
        homes = [f.relative_to(folder).parts[0] for f in files]
        tables = [t.append_column(by, pa.array([home] * len(t))) for home, t in zip(homes, tables, strict=True)]
    return pa.concat_tables(tables, promote_options="permissive")


def _assemble(name: str, tables: dict[str, Any], label: str | None = None, by: str | None = None) -> DataSet:
    """Turn the Arrow tables of a train and a test split into tensors."""
    for split, table in tables.items():
        if len(table) == 0:
            raise ValueError(explain(f"an empty {split} split of `{name}`", "at least one example", "Check the files."))
    label = label or _label_column(tables["train"], by)
    named = [column for column in (label, by) if column]
    columns = _input_columns(name, tables["train"], named)
    text = _text(tables["train"], columns[0])
    if label is None and not text:
        expected = "a column of labels, named `label` or marked as ClassLabel"
        raise ValueError(_schema_error(name, tables["train"], expected))
    for split, table in tables.items():
        lacking = [c for c in (*named, *columns) if c not in table.column_names]
        if lacking:
            raise ValueError(_schema_error(name, table, f"the column `{lacking[0]}` in the {split} split too"))
    domains = _labels(name, tables, by) if by else (None, None, ())
    if label is None:
        return _continued(name, tables, columns[0], *domains)
    labels = _labels(name, tables, label)
    if text:
        train, test = (_strings(name, tables[split], columns[0]) for split in ("train", "test"))
        train_x = texts.padded(train)
        inputs, tokens = (train_x, texts.padded(test, train_x.shape[1])), texts.BUCKETS + 1
    else:
        inputs, tokens = _same_form(name, *(_inputs(name, tables[split], columns) for split in ("train", "test"))), 0
    return DataSet(name, inputs[0], labels[0], inputs[1], labels[1], labels[2], tokens, *domains)


def _continued(
    name: str, tables: dict[str, Any], column: str, train: Tensor | None, test: Tensor | None, domains: tuple[str, ...]
) -> DataSet:
    """Return texts as windows of characters, to each of which belongs the next one; domains are as in `DataSet`."""
    parts = []
    for split, domain in (("train", train), ("test", test)):
        whole = _strings(name, tables[split], column)
        parts.append(texts.windows(whole, torch.zeros(len(whole), dtype=torch.long) if domain is None else domain))
    (train_x, train_y, train_at), (test_x, test_y, test_at) = parts
    known = tuple(map(chr, range(256)))
    where = (train_at, test_at, domains) if domains else ()
    return DataSet(name, train_x, train_y, test_x, test_y, known, len(known), *where)


def _text(table: Any, column: str) -> bool:
    """Tell whether a column holds texts."""
    import pyarrow.types as kinds

    return any(kind(table.schema.field(column).type) for kind in (kinds.is_string, kinds.is_large_string))


def _strings(name: str, table: Any, column: str) -> list[str]:
    found: list[str] = table.column(column).to_pylist()
    if None in found:
        raise ValueError(explain(f"`{name}` with missing texts", "a text in each row", "Fill or drop those rows."))
    return found


def _features(table: Any) -> dict[str, Any]:
    """Return the Hugging Face description of a table's columns, empty when it has none."""
    try:
        found = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _label_column(table: Any, by: str | None) -> str | None:
    """Return the column of labels, if there is one."""
    marked = [c for c, f in _features(table).items() if isinstance(f, dict) and f.get("_type") == "ClassLabel" and c != by]
    usual = [c for c in LABELS if c in table.column_names and c != by]
    both = [c for c in usual if c in marked]
    for candidates in (both, marked, usual):
        if candidates and candidates[0] in table.column_names:
            return candidates[0]
    return None


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
            explain(
                f"`{name}` with {came}", "whole numbers or names, the same in train and test", f"Check the column `{column}`."
            )
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


def _input_columns(name: str, table: Any, named: list[str]) -> list[str]:
    """Choose the inputs: the images, else the lists, else the texts, else all numeric columns but a stored row index."""
    import pyarrow.types as kinds

    others = [f for f in table.schema if f.name not in named and not f.name.startswith("__index_level_")]
    pictures = [f.name for f in others if _pictures(table, f.name)]
    lists = [f.name for f in others if kinds.is_list(f.type) or kinds.is_fixed_size_list(f.type) or kinds.is_large_list(f.type)]
    numeric = [f.name for f in others if any(k(f.type) for k in (kinds.is_integer, kinds.is_floating, kinds.is_boolean))]
    strings = [f.name for f in others if _text(table, f.name)]
    usual = [c for c in TEXTS if c in strings]
    for candidates in (pictures, lists, usual):
        if candidates:
            return candidates[:1]
    if strings or not numeric:
        expected = (
            "images (a struct with `bytes`, or a column marked as Image), lists of numbers, a column `text`, or numeric columns"
        )
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
