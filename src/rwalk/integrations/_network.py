"""A small network, the numbers of its classes and the loop that trains it, for hosts that bring none of these."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rwalk._errors import explain


def perceptron(features: int, classes: int, hidden: int | Sequence[int]) -> nn.Module:
    """Make a multi-layer perceptron with ReLU that returns logits."""
    widths = [features, *np.atleast_1d(hidden).tolist()]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def numbered(labels: Any, classes: Any) -> Tensor:
    """Return each label's place among `classes`, which are sorted.

    Raises:
        ValueError: if a label is not among them.
    """
    known = classes.tolist()
    if unknown := set(labels.tolist()).difference(known):
        came = f"labels {sorted(unknown, key=str)} in a classifier that began with the classes {known}"
        remedy = "Begin anew with a first `partial_fit` to which all are passed as `classes`."
        raise ValueError(explain(came, "all classes to be named at the beginning, those of later tasks too", remedy))
    return torch.from_numpy(np.searchsorted(classes, labels))


def train(network: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, epochs: int, batch_size: int) -> None:
    """Train a classifier in passes over inputs `x` and their classes' numbers `y`, shuffled anew for each.

    A last batch of a single example joins the one before: BatchNorm refuses it.
    """
    network.train()
    for _ in range(epochs):
        batches = torch.randperm(len(y)).split(batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()


@contextmanager
def seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """Draw PyTorch's random numbers from a seed, and go back to where they were."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield
