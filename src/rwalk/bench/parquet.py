"""Data sets in the Hugging Face schema, from parquet files in a folder or from the hub.

Inputs are the images, else the lists of numbers, else the texts, else all columns. Texts without labels are to be continued.
"""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import Tensor

from rwalk._errors import printable
from rwalk.bench import inputs, tables, texts, times
from rwalk.bench.dataset import HUB, DataSet
from rwalk.bench.labels import numbered, refuse_names, usual_column
from rwalk.bench.rows import Rows, features, plain, read

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
PATIENCE = 10
"""Seconds that the hub has to answer."""
STREAM = "stream"
"""The one split of a data set whose rows are ordered in time, see `rwalk.bench.times`."""


def from_folder(folder: Path, label: str | None = None, by: str | None = None, target: str | None = None) -> DataSet:
    """Load a data set from a folder; arguments and errors are those of `rwalk.bench.data.load`."""
    if is_ordered(folder):
        return _assemble(_held_out(_split(folder, (STREAM,)), {label, by, target}), label, by, target)
    return _assemble({split: _split(folder, names, by) for split, names in SPLITS.items()}, label, by, target)


def from_hub(name: str, label: str | None = None, by: str | None = None, target: str | None = None) -> DataSet:
    """Load a data set through Hugging Face `datasets`; arguments and errors are those of `rwalk.bench.data.load`."""
    found = download(HUB.get(name, name))
    short = name.split("/")[-1]
    splits = {split: Rows(short, plain(table), ((f"the {split} split", len(table)),)) for split, table in found.items()}
    return _assemble(splits, label, by, target)


def download(name: str) -> dict[str, Any]:
    """Download a data set through Hugging Face `datasets` and return its splits as Arrow tables.

    Where the hub cannot be reached, a copy of an earlier download is used if there is one.
    """
    away = _out_of_reach(name)
    try:
        with _offline() if away else nullcontext():
            found = datasets.load_dataset(name)
    except Exception as error:
        reason = _in_a_line(away or error)
        remedy = "Pass digits, a folder with parquet files, or put a folder of that name below `--data` or RWALK_DATA."
        raise ConnectionError(printable(f"The data set `{name}` cannot be downloaded ({reason}). {remedy}")) from error
    chosen = {split: next((s for s in names if s in found), None) for split, names in SPLITS.items()}
    if None in chosen.values():
        raise ValueError(printable(f"`{name}` has the splits {', '.join(found)}; it needs train and test."))
    return {split: found[source].with_format("arrow")[:] for split, source in chosen.items()}


def _out_of_reach(name: str) -> Exception | None:
    """Return why the hub does not answer at all, after one request; without this, `datasets` asks it for half a minute."""
    try:
        HfApi().dataset_info(name, timeout=PATIENCE)
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
        return None  # it answered, is not to be asked, or the name is none; `datasets` has the words for that
    except Exception as error:  # of the package for HTTP, which is not the same in all versions
        return error
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` use what was downloaded before, as under the environment variable HF_HUB_OFFLINE."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason'])[0]}"


def _held_out(rows: Rows, taken: Set[str | None]) -> dict[str, Rows]:
    """Put rows in the order of their times, except for columns that are taken otherwise, and hold out every fifth."""
    order, table = np.arange(len(rows)), rows.table
    if columns := [c for c in times.NAMES if c in table.column_names and c not in taken]:
        order = times.order(rows, columns)
        table = table.take(order).drop_columns(columns)
    last = np.arange(len(rows)) % 5 == 4
    return {
        split: replace(rows, table=table.filter(some), chosen=order[some]) for split, some in (("train", ~last), ("test", last))
    }


def _files(folder: Path, name: str) -> list[Path]:
    """Find the files of a split: train.parquet, train-00000-of-00001.parquet, train/part.parquet and the like."""
    found = sorted(folder.rglob("*.parquet"))
    return [f for f in found if f.stem.split("-")[0] == name or (f.parent != folder and f.parent.name == name)]


def is_ordered(folder: Path) -> bool:
    """Return whether a folder has rows in the order of their times, from which those for testing are yet to be taken."""
    return bool(_files(folder, STREAM)) and not _files(folder, "train")


def _split(folder: Path, names: tuple[str, ...], by: str | None = None) -> Rows:
    """Read the files of a split, which may have one of several names."""
    return _joined(folder, names[0], files_of(folder, names), by)


def files_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of a split, which may have one of several names."""
    for name in names:
        if mine := _files(folder, name):
            return mine
    every = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*.parquet"))]
    found = ", ".join([*every[:5], *[f"{len(every) - 5} more"] * (len(every) > 5)]) or "no parquet file"
    needed = f"it needs a parquet file of the {names[0]} split, such as {names[0]}.parquet"
    layouts = "A data set has train.parquet and test.parquet, or stream.parquet with rows in the order of time"
    remedy = "For other files there is `bench.stream`, which takes data frames"
    raise FileNotFoundError(printable(f"The folder `{folder}` has {found}; {needed}. {layouts}. {remedy}."))


def _joined(folder: Path, split: str, mine: list[Path], by: str | None) -> Rows:
    """Join the files of a split, with a column of folders if they are the domains."""
    what = f"The {split} files of `{folder}`"
    places = sorted({str(f.parent.relative_to(folder)) for f in mine})
    if len(places) > 1 and by != "folder":
        some = f"{what} lie in several folders, as those of several data sets do: {split} files in {', '.join(places[:5])}."
        raise ValueError(printable(f"{some} Name one of them, or make each a task with a `domain-` stream by `folder`."))
    tables = [read(f) for f in mine]
    columns = {tuple(table.column_names) for table in tables}
    if len(columns) > 1:
        some = " and ".join(", ".join(names) for names in sorted(columns)[:2])
        raise ValueError(printable(f"{what} have different columns: {some}. Make the files alike."))
    refuse_names(what, [features(table) for table in tables], tables[0].column_names)
    if by == "folder":
        if by in tables[0].column_names:
            raise ValueError(printable(f"{what} have a column `folder`, the name of the column of domains. Rename or drop it."))
        homes = [os.fsencode(f.relative_to(folder).parts[0]).decode(errors="backslashreplace") for f in mine]
        tables = [t.append_column(by, pa.array([home] * len(t))) for home, t in zip(homes, tables, strict=True)]
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        some = f"{what} have columns of different types ({str(error).splitlines()[0]})"
        raise ValueError(printable(f"{some}. Make the files alike.")) from None
    return Rows(folder.name, whole, tuple((str(f.relative_to(folder)), len(t)) for f, t in zip(mine, tables, strict=True)))


def _assemble(splits: dict[str, Rows], label: str | None, by: str | None, target: str | None = None) -> DataSet:
    """Turn the rows of a train and a test split into tensors."""
    for split, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(printable(f"`{rows.name}` has an empty {split} split. Check the files."))
    train, test = splits["train"], splits["test"]
    label = target or label or usual_column(train, by)
    named = [column for column in (label, by) if column]
    form, columns = inputs.choose(train, label, by)
    for split, rows in splits.items():
        lacking = [c for c in (*named, *columns) if c not in rows.table.column_names]
        if lacking:
            raise inputs.schema_error(rows, f"the column `{lacking[0]}` in the {split} split too")
    inputs.refuse_kinds(form, columns, test)
    refuse_names(f"The splits of `{train.name}`", [train.features, test.features], [*named, *columns])
    domains = numbered(train, test, by, "domains") if by else (None, None, ())
    if label is None:
        return _continued(train, test, columns[0], *domains)
    labels = tables.target(target, train, test) if target else numbered(train, test, label, "labels")
    x = inputs.tensors(form, columns, train, test)
    tokens = texts.BUCKETS + 1 if form == "text" else 0
    found = DataSet(train.name, x[0], labels[0], x[1], labels[1], labels[2], tokens, *domains)
    return replace(found, target=target or "")


def _continued(
    train: Rows, test: Rows, column: str, at_train: Tensor | None, at_test: Tensor | None, domains: tuple[str, ...]
) -> DataSet:
    """Return texts as windows of characters, each with the next character; domains are as in `DataSet`."""
    parts = []
    for split, rows, at in (("train", train, at_train), ("test", test, at_test)):
        whole = inputs.strings(rows, column)
        parts.append(texts.windows(whole, torch.zeros(len(whole), dtype=torch.long) if at is None else at))
        if not len(parts[-1][0]):
            some = f"The {split} texts of `{train.name}` are shorter than a window"
            raise ValueError(printable(f"{some}; it takes more than {texts.WINDOW} bytes of text."))
    (train_x, train_y, train_at), (test_x, test_y, test_at) = parts
    known = tuple(map(chr, range(256)))
    where = (train_at, test_at, domains) if domains else ()
    return DataSet(train.name, train_x, train_y, test_x, test_y, known, len(known), *where)
