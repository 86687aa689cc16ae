"""Data sets as tensors in memory: the digits that come with the package, and any data set in the Hugging Face schema.

Nothing but PyTorch is needed for the digits; everything else is read by `rwalk.bench.parquet`.
"""

import gzip
import os
from pathlib import Path

import torch

from rwalk._errors import printable, suggestion
from rwalk.bench.dataset import HUB, DataSet

DIGITS = Path(__file__).with_name("digits.csv.gz")
"""A row for each image, 64 pixels from 0 to 16 and the label; `digits.txt` names source and licence."""


def load(
    name: str,
    root: str | Path | None = None,
    label: str | None = None,
    by: str | None = None,
    target: str | None = None,
) -> DataSet:
    """Load a data set by name or folder.

    If the only file of a folder is `stream.parquet`, every fifth of its rows, in the order of their times, is for testing.

    Args:
        name: "digits" (comes with the package), a folder with parquet files, or a name: a folder of that name below `root`,
            else a download through Hugging Face `datasets`.
        root: where folders of data sets lie, or such a folder itself; the environment variable `RWALK_DATA` when not given.
        label: the column of labels; a usual name, or one that is marked as such, when not given.
        by: a column that divides the examples into domains, or "folder", if each domain is a folder in the data set's.
        target: a column of numbers that are to be met in place of labels: a regression.

    Raises:
        FileNotFoundError: if a folder is missing or has no parquet file of a needed split.
        ValueError: if a file is damaged, the columns have no labels and no target, or a row cannot be read; the message names
            the column, and the row by its file and its number there, from 0.
        ConnectionError: if a download fails.
    """
    if label and target:
        raise ValueError(printable(f"There are labels, `{label}`, and a target, `{target}`; choose one of them."))
    if name == "digits":
        if label or by or target:
            raise ValueError(printable(f"The digits have no column `{label or by or target}`; choose another data set."))
        return _digits()
    from rwalk.bench import parquet

    folder = find(name, root)
    columns = label, by, target
    return parquet.from_hub(name, *columns) if folder is None else parquet.from_folder(folder, *columns)


def find(name: str, root: str | Path | None = None) -> Path | None:
    """Return the folder of the data set `name`, or None if it has to be downloaded.

    Raises:
        FileNotFoundError: if a folder is missing, or `name` is none that is known and resembles one.
    """
    base = folder(root)
    places = [base / name] if base else []
    places += [base] if base and (base.resolve().name == name or any(base.glob("*.parquet"))) else []
    places += [Path(name).expanduser()]
    for place in places:
        if place.is_dir():
            return place.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(printable(f"The data folder `{name}` does not exist. Correct the path."))
    meant = "" if name in HUB or "/" in name else suggestion(name, known(base))
    if meant:
        where = "there" if base is None else f"in `{base}`"
        remedy = "If it is on the Hugging Face hub, name it with its owner, as OWNER/NAME."
        raise FileNotFoundError(printable(f"No data set `{name}` is {where}.{meant} {remedy}"))
    return None


def folder(root: str | Path | None = None) -> Path | None:
    """Return the folder in which data sets lie: the given one, else that of the environment variable `RWALK_DATA`.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    root = root or os.environ.get("RWALK_DATA")
    if root and not Path(root).is_dir():
        raise FileNotFoundError(printable(f"The data folder `{root}` does not exist. Correct `--data` or RWALK_DATA."))
    return Path(root) if root else None


def known(base: Path | None) -> list[str]:
    """Return the names of the data sets that are known: the digits, folders in the data folder, and short names of the hub."""
    here = [] if base is None else sorted(place.name for place in base.iterdir() if place.is_dir())
    return ["digits", *here, *(name for name in HUB if name not in here)]


def _digits() -> DataSet:
    """Return the 1,797 digits of 8 x 8 pixels; every fifth example of each class is for testing."""
    with gzip.open(DIGITS, "rt", encoding="ascii") as file:
        table = torch.tensor([[int(value) for value in line.split(",")] for line in file])
    x, y = table[:, :-1].float().div(16).reshape(-1, 1, 8, 8), table[:, -1].contiguous()
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[(y == label).nonzero().squeeze(1)[::5]] = True
    return DataSet("digits", x[~test], y[~test], x[test], y[test], tuple(map(str, range(10))))
