"""Data sets as tensors in memory: the digits that come with the package, and any data set in the Hugging Face schema.

Nothing but PyTorch is needed for the digits; everything else is read by `rwalk.bench.parquet`.
"""

import gzip
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwalk._errors import printable

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
}
"""Short names of data sets on the Hugging Face hub; any other name is passed on unchanged."""
DIGITS = Path(__file__).with_name("digits.csv.gz")
"""A row for each image, 64 pixels from 0 to 16 and the label; `digits.txt` names source and licence."""


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
        train_domain, test_domain: the domain of each example as its place in `domains`, int64, if a column was chosen for that.
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
            for part in [] if tensor is None else _bytes(tensor):
                whole.update(part)
        return whole.hexdigest()[:16]


def load(name: str, root: str | Path | None = None, label: str | None = None, by: str | None = None) -> DataSet:
    """Load a data set by name or folder.

    If the only file of a folder is `stream.parquet`, every fifth of its rows, in the order of their times, is for testing.

    Args:
        name: "digits" (comes with the package), a folder with parquet files, or a name: a folder of that name below `root`,
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
            raise ValueError(printable(f"The digits have no column `{label or by}`; choose another data set."))
        return _digits()
    from rwalk.bench import parquet

    folder = find(name, root)
    return parquet.from_hub(name, label, by) if folder is None else parquet.from_folder(folder, label, by)


def find(name: str, root: str | Path | None = None) -> Path | None:
    """Return the folder of the data set `name`, or None if it has to be downloaded."""
    root = root or os.environ.get("RWALK_DATA")
    if root and not Path(root).is_dir():
        raise FileNotFoundError(printable(f"The data folder `{root}` does not exist. Correct `--data` or RWALK_DATA."))
    base = Path(root) if root else None
    places = [base / name] if base else []
    places += [base] if base and (base.resolve().name == name or any(base.glob("*.parquet"))) else []
    places += [Path(name).expanduser()]
    for place in places:
        if place.is_dir():
            return place.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(printable(f"The data folder `{name}` does not exist. Correct the path."))
    return None


def scaled(known: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that gives `known` mean 0 and standard deviation 1 at each place, in float32; a constant is shifted.

    It works in float64 on the distance from the smallest value, divided by the largest: so squares neither overflow nor vanish,
    and a small spread is not lost in large numbers.
    """
    known = known.double()
    lowest, highest = known.amin(0), known.amax(0)
    fixed = lowest == highest
    size = torch.where(fixed, 1.0, torch.maximum(-lowest, highest).abs())
    lowest = lowest / size
    deviation, mean = torch.std_mean(known / size - lowest, 0, correction=0)
    deviation = torch.where(fixed, 1.0, deviation)
    return lambda x: ((x.double() / size - lowest - mean) / deviation).float()


def _bytes(tensor: Tensor) -> Iterator[Any]:
    """Yield the bytes of a tensor: those in memory or, without NumPy, copies."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    try:
        yield flat.numpy().data
    except RuntimeError:
        yield from (bytes(part.tolist()) for part in flat.split(2**20))


def _digits() -> DataSet:
    """Return the 1,797 digits of 8 x 8 pixels; every fifth example of each class is for testing."""
    with gzip.open(DIGITS, "rt", encoding="ascii") as file:
        table = torch.tensor([[int(value) for value in line.split(",")] for line in file])
    x, y = table[:, :-1].float().div(16).reshape(-1, 1, 8, 8), table[:, -1].contiguous()
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[(y == label).nonzero().squeeze(1)[::5]] = True
    return DataSet("digits", x[~test], y[~test], x[test], y[test], tuple(map(str, range(10))))
