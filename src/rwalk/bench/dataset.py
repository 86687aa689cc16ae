"""Data sets in memory, as every loader returns them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
}
"""Short names of data sets on the Hugging Face hub; any other name is passed on unchanged."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory: of labels, or of a target that is to be met.

    Args:
        name: short name.
        train_x, test_x: inputs. Images: float32 (examples, channels, height, width) in [0, 1], see `rwalk.bench.images`.
            Tables: float32 (examples, columns) with mean 0 and standard deviation 1 over the training examples, and for a
            category a column of 0 and 1 for each of its values there; lists keep their shape. Texts: int64 (examples, words),
            0 after a text's end, see `rwalk.bench.texts`. Texts without labels: int64 (windows, characters).
        train_y, test_y: labels from 0 on, int64 (examples,); or the next characters, (windows, characters); or targets, float64
            (examples, 1), up to a constant.
        classes: names of the labels; none for a target.
        tokens: how many different numbers a text's inputs can be; 0 for other inputs.
        train_domain, test_domain: the domain of each example as its place in `domains`, int64, if a column was chosen for that.
        domains: names of the domains.
        target: name of the column of targets; empty for labels.
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
    target: str = ""

    def digest(self) -> str:
        """Return a short fingerprint of the content."""
        parts = (self.train_x, self.train_y, self.test_x, self.test_y, self.train_domain, self.test_domain)
        return fingerprint(tensor for tensor in parts if tensor is not None)


def fingerprint(tensors: Iterable[Tensor], about: str = "") -> str:
    """Return a short fingerprint of what tensors hold, and of a text about them."""
    whole = hashlib.sha256(about.encode())
    for tensor in tensors:
        for part in _bytes(tensor):
            whole.update(part)
    return whole.hexdigest()[:16]


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
