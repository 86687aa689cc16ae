"""Runs that torchrun has started on several ranks: all train one model, and the first one speaks and writes.

Each rank takes its part of every batch. DistributedDataParallel averages over ranks, so a rank's loss is the sum over its
examples, times the number of ranks, over the size of the whole batch: the average is the mean over the batch, even where ranks
have different numbers of examples.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


@contextmanager
def launched(device: str = "cpu") -> Iterator[None]:
    """Join the other ranks, if a launcher such as torchrun has started this process as one of several.

    Ranks that have a GPU each talk over NCCL; those that share one, which NCCL refuses, over gloo as CPUs do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    own = torch.device(device).type == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """Count the ranks, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Tell which rank this is, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def joined(model: nn.Module) -> nn.Module:
    """Return what a rank trains: the model, its gradients averaged over the ranks."""
    return nn.parallel.DistributedDataParallel(model) if size() > 1 else model


def share(rows: Tensor) -> Tensor:
    """Return this rank's part of some rows: every so many one, so that the first k of all are the first ones of each rank."""
    return rows[number() :: size()].contiguous()


def mean_loss(logits: Tensor, labels: Tensor, whole: int) -> Tensor:
    """Return this rank's loss on its part of a batch of `whole` examples: the mean over ranks is the batch's cross-entropy."""
    if size() == 1:
        return F.cross_entropy(logits, labels)
    each = 1 if labels.is_floating_point() else math.prod(labels.shape[1:])  # probabilities of classes, or several labels
    return F.cross_entropy(logits, labels, reduction="sum") * (size() / (whole * each))


def mean(value: Tensor) -> Tensor:
    """Return the mean of a scalar over the ranks."""
    return _summed(value.detach().clone()) / size() if size() > 1 else value


def every(holds: bool) -> bool:
    """Tell whether something holds on every rank."""
    return holds if size() == 1 else int(_summed(torch.tensor(int(holds)))) == size()


def agreed(holds: bool) -> bool:
    """Tell on every rank whether something holds on the first."""
    return holds if size() == 1 else bool(_summed(torch.tensor(int(holds and number() == 0))))


def _summed(value: Tensor) -> Tensor:
    distributed.all_reduce(value)
    return value
