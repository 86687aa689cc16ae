"""Examples of several tasks that do not all count alike, as scikit-learn's users pass them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwalk._errors import printable


class WeightedExamples(NamedTuple):
    """Inputs, targets, and how much each example counts; None if all count alike."""

    x: Tensor
    y: Tensor
    weight: Tensor | None = None

    def take(self, rows: Any) -> "WeightedExamples":
        """Return some of the examples."""
        return WeightedExamples(self.x[rows], self.y[rows], None if self.weight is None else self.weight[rows])

    def drawn(self) -> "WeightedExamples":
        """Draw as many examples, each as often as its share of the weight says, rounded up or down (systematic sampling)."""
        if self.weight is None:
            return self
        ends, count = self.weight.cumsum(0), len(self.x)
        places = (torch.arange(count) + torch.rand((), dtype=ends.dtype)) * (ends[-1] / count)
        return self.take(torch.searchsorted(ends, places).clamp(max=count - 1))

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and targets in batches."""
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def train(
    network: nn.Module,
    optimizer: Optimizer,
    examples: WeightedExamples,
    losses: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    batch_size: int,
) -> None:
    """Train a network on examples, shuffled again for each epoch, by the mean of what `losses` returns for each example.

    A last batch of a single example joins the one before: BatchNorm refuses it.
    """
    network.train()
    for _ in range(epochs):
        batches = torch.randperm(len(examples.x)).split(batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        for rows in batches:
            x, y, weight = examples.take(rows)
            optimizer.zero_grad()
            each = losses(network(x), y)
            loss = each.mean() if weight is None else each @ (weight / weight.sum()).to(each)
            loss.backward()
            optimizer.step()


def class_indices(labels: Any, classes: Any) -> Tensor:
    """Return the index of each label in `classes`, which are sorted.

    Raises:
        ValueError: if a label is not among them.
    """
    known = classes.tolist()
    if unknown := set(labels.tolist()).difference(known):
        came = printable(f"labels {sorted(unknown, key=str)} in a classifier that began with the classes {known}")
        raise ValueError(
            f"There are {came}. Begin anew with a first `partial_fit` that gets all classes, also those of later tasks, as "
            "`classes`."
        )
    return torch.from_numpy(np.searchsorted(classes, labels))


def checked_tasks(task: Any, count: int) -> Any:
    """Return the number of each example's task, in ascending order of their labels, as an array.

    Raises:
        ValueError: unless `task` has one entry for each example, none missing, that can be put in order.
    """
    if task is None:
        return np.zeros(count, dtype=int)
    task = np.asarray(task)
    if task.shape != (count,):
        raise ValueError(
            f"`task` has shape {task.shape}, and not one entry for each of the {count} examples. Pass the task of each "
            "example, or call `partial_fit` with one label for all."
        )
    try:
        labels, numbers = np.unique(task, return_inverse=True)
        missing = bool((labels != labels).any())
    except TypeError:
        missing = True
    if missing:
        raise ValueError("`task` has missing entries, or some that cannot be put in order. Pass numbers alone, or words alone.")
    return numbers


def refuse_many_labels(task: Any) -> None:
    """Raise a ValueError unless a task's label is one."""
    try:
        hash(task)
    except TypeError:
        raise ValueError(
            f"`task` is a `{type(task).__name__}`, and `partial_fit` takes one label for all examples of a call. Pass a number "
            "or a word, or give `fit` the task of each example."
        ) from None


def checked_weight(weight: Any, count: int) -> Any:
    """Return weights as an array whose largest is 1, None if there are none.

    Raises:
        ValueError: unless there is one for each example, all are finite, none is negative and one is positive.
    """
    if weight is None:
        return None
    weight = np.asarray(weight, dtype="float64")
    if weight.shape != (count,):
        raise ValueError(f"`sample_weight` has shape {weight.shape}, and not one weight for each of the {count} examples.")
    if not np.isfinite(weight).all() or weight.min() < 0 or not weight.any():
        raise ValueError("`sample_weight` must be finite, negative for no example, and not zero for all examples.")
    return weight / weight.max()
