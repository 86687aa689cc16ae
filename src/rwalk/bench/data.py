"""Data sets: scikit-learn's digits, or any parquet data set in the Hugging Face schema, as tensors in memory.

Inputs are the images, else the lists of numbers, else the texts, else all columns. Texts without labels are to be continued.
"""

import hashlib
import os
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwalk import files
from rwalk._errors import explain
from rwalk.bench import inputs, tables, texts
from rwalk.bench.inputs import schema_error
from rwalk.bench.labels import numbered, refuse_names, usual_column
from rwalk.bench.rows import Rows, is_text, plain

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
TIMES = ("timestamp", "date", "t", "time")
STREAM = "stream"
"""The one split of a data set whose rows come in order, which columns of `TIMES` give, and these are no inputs.

Rows are in the order of the first column with dates, else with numbers, and where it is equal in that of the others.
"""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification data set in memory.

    Args:
        name: short name.
        train_x, test_x: inputs. Images: float32 (examples, channels, height, width) in [0, 1], see `rwalk.bench.images`.
            Tables: float32 (examples, columns) with mean 0 and standard deviation 1 over the training examples, and for a
            category a column of 0 and 1 for each of its values there; lists keep their shape. Texts: int64 (examples, words),
            0 after a text's end, see `rwalk.bench.texts`. Texts without labels: int64 (windows, characters).
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
        ValueError: if a file is damaged, the columns are no classification data set, or a row cannot be read; the message names
            the column, and the row by its file and its number there, from 0.
        ConnectionError: if a download fails.
    """
    if name == "digits":
        if label or by:
            raise ValueError(explain(f"the column `{label or by}`", "digits without one", "Choose another data set."))
        return _digits()
    folder = find(name, root)
    if folder is None:
        found = download(HUB.get(name, name))
        splits = {split: Rows(plain(table), ((f"the {split} split", len(table)),)) for split, table in found.items()}
        return _assemble(name.split("/")[-1], splits, label, by)
    if _files(folder, STREAM) and not _files(folder, "train"):
        return _assemble(folder.name, _held_out(folder.name, _read(folder, (STREAM,)), {label, by}), label, by)
    return _assemble(folder.name, {split: _read(folder, names, by) for split, names in SPLITS.items()}, label, by)


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


def _held_out(name: str, rows: Rows, taken: Set[str | None]) -> dict[str, Rows]:
    """Bring rows into their order, unless its columns are taken for something else, and set every fifth aside for testing."""
    order, table = np.arange(len(rows)), rows.table
    if columns := [c for c in TIMES if c in table.column_names and c not in taken]:
        order = _order(name, rows, columns)
        table = table.take(order).drop_columns(columns)
    last = np.arange(len(rows)) % 5 == 4
    return {split: Rows(table.filter(some), rows.files, order[some]) for split, some in (("train", ~last), ("test", last))}


def _order(name: str, rows: Rows, columns: Sequence[str]) -> np.ndarray:
    """Return the rows' numbers in the order of their times: those with dates count first, times of day last."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    found = {column: _times(name, rows, column) for column in columns}
    ranks = {
        c: 0 if kinds.is_date(t.type) or kinds.is_timestamp(t.type) else 1 + kinds.is_time(t.type) for c, t in found.items()
    }
    first, *others = sorted(columns, key=ranks.__getitem__)
    if ranks[first] == 2:
        came = f"`{name}` whose column `{first}` holds times of day alone"
        raise ValueError(
            explain(came, "their dates too, in a column `date`", "Add the dates, or give the column another name.")
        )
    keys = [(column, "ascending") for column in (first, *others)]
    order: np.ndarray = pc.sort_indices(pa.table(found), sort_keys=keys).to_numpy()
    return order


def _times(name: str, rows: Rows, column: str) -> Any:
    """Return the times in a column, one in each row; texts are read as ISO 8601 has them."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    times = rows.table.column(column)
    times = times.cast(times.type.value_type) if kinds.is_dictionary(times.type) else times
    expected, remedy = "numbers, dates or times, one in each row", "Correct the column, or give it another name."
    read = _read_times(times) if is_text(times.type) else times
    if read is None or not tables.numeric(read.type) or kinds.is_boolean(read.type) or kinds.is_float16(read.type):
        came = f"`{name}` whose column `{column}` of {times.type} gives no order"
        raise ValueError(explain(came, expected, remedy))
    missing = pc.is_null(read, nan_is_null=True).to_numpy()
    if missing.any():
        came = f"`{name}` without a time in column `{column}` ({rows.where(int(missing.argmax()))})"
        raise ValueError(explain(came, expected, remedy))
    return read


def _read_times(texts: Any) -> Any:
    """Return the times that texts say, with dates or without, or None if one says something else."""
    import pyarrow as pa
    import pyarrow.compute as pc

    some_day = pc.binary_join_element_wise(pa.scalar("1970-01-01", texts.type), texts, pa.scalar("T", texts.type))
    for column, kind in ((texts, pa.timestamp("us")), (some_day, pa.time64("us"))):
        with suppress(pa.ArrowException):
            return column.cast(pa.timestamp("us")).cast(kind)
    return None


def _files(folder: Path, name: str) -> list[Path]:
    """Find the files of a split: train.parquet, train-00000-of-00001.parquet, train/part.parquet and the like."""
    found = sorted(folder.rglob("*.parquet"))
    return [f for f in found if f.stem.split("-")[0] == name or (f.parent != folder and f.parent.name == name)]


def _read(folder: Path, names: tuple[str, ...], by: str | None = None) -> Rows:
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


def _join(folder: Path, split: str, mine: list[Path], by: str | None) -> Rows:
    """Read the files of a split as one table, with a column of folders if they are the domains."""
    import pyarrow as pa

    places = sorted({str(f.parent.relative_to(folder)) for f in mine})
    if len(places) > 1 and by != "folder":
        raise ValueError(
            explain(
                f"the folder `{folder}` with {split} files in {', '.join(places[:5])}",
                "the files of one data set",
                "Point to one of these folders, or make each a task with a `domain-` stream by `folder`.",
            )
        )
    tables = [_table(f) for f in mine]
    columns = {tuple(table.column_names) for table in tables}
    if len(columns) > 1:
        came = " and ".join(", ".join(names) for names in sorted(columns)[:2])
        raise ValueError(
            explain(f"{split} files of `{folder}` with different columns: {came}", "the same columns", "Make the files alike.")
        )
    if by == "folder":
        if by in tables[0].column_names:
            came = f"{split} files of `{folder}` with a column `folder`, which would be that of the domains"
            raise ValueError(explain(came, "another name for it", "Rename or drop this column."))
        homes = [os.fsencode(f.relative_to(folder).parts[0]).decode(errors="backslashreplace") for f in mine]
        tables = [t.append_column(by, pa.array([home] * len(t))) for home, t in zip(homes, tables, strict=True)]
    refuse_names(f"{split} files of `{folder}`", tables, tables[0].column_names)
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        came = f"{split} files of `{folder}` with columns of different types ({str(error).splitlines()[0]})"
        raise ValueError(explain(came, "types that go together", "Make the files alike.")) from None
    return Rows(plain(whole), tuple((str(f.relative_to(folder)), len(t)) for f, t in zip(mine, tables, strict=True)))


def _table(file: Path) -> Any:
    """Read a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with files.opened(file) as source:
            names = pq.read_schema(source).names
            twice = sorted({name for name in names if names.count(name) > 1})
            table = None if twice else pq.read_table(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            explain(
                f"a file that cannot be read, `{file}` ({str(error).splitlines()[0]})",
                "a whole parquet file",
                "Copy or download the file again.",
            )
        ) from error
    if twice:
        came = f"`{file}` with more than one column `{twice[0]}`"
        raise ValueError(explain(came, "a name for each column", "Rename or drop the others."))
    return table


def _assemble(name: str, splits: dict[str, Rows], label: str | None = None, by: str | None = None) -> DataSet:
    """Turn the rows of a train and a test split into tensors."""
    for split, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(explain(f"an empty {split} split of `{name}`", "at least one example", "Check the files."))
    train, test = splits["train"], splits["test"]
    label = label or usual_column(train, by)
    named = [column for column in (label, by) if column]
    form, columns = inputs.choose(name, train, label, by)
    for split, rows in (("train", train), ("test", test)):
        lacking = [c for c in (*named, *columns) if c not in rows.table.column_names]
        if lacking:
            raise schema_error(name, rows, f"the column `{lacking[0]}` in the {split} split too")
    inputs.refuse_kinds(name, form, columns, test)
    refuse_names(f"`{name}`", [train.table, test.table], [*named, *columns])
    domains = numbered(name, train, test, by, "domains") if by else (None, None, ())
    if label is None:
        return _continued(name, train, test, columns[0], *domains)
    labels = numbered(name, train, test, label, "labels")
    x = inputs.tensors(name, form, columns, train, test)
    tokens = texts.BUCKETS + 1 if form == "text" else 0
    return DataSet(name, x[0], labels[0], x[1], labels[1], labels[2], tokens, *domains)


def _continued(
    name: str, train: Rows, test: Rows, column: str, at_train: Tensor | None, at_test: Tensor | None, domains: tuple[str, ...]
) -> DataSet:
    """Return texts as windows of characters, to each of which belongs the next one; domains are as in `DataSet`."""
    parts = []
    for split, rows, at in (("train", train, at_train), ("test", test, at_test)):
        whole = inputs.strings(name, rows, column)
        parts.append(texts.windows(whole, torch.zeros(len(whole), dtype=torch.long) if at is None else at))
        if not len(parts[-1][0]):
            came = f"`{name}` whose {split} texts are shorter than a window"
            raise ValueError(explain(came, f"more than {texts.WINDOW} bytes of text", "Add texts."))
    (train_x, train_y, train_at), (test_x, test_y, test_at) = parts
    known = tuple(map(chr, range(256)))
    where = (train_at, test_at, domains) if domains else ()
    return DataSet(name, train_x, train_y, test_x, test_y, known, len(known), *where)
