"""Warnings before a long wait: examples that are taken one at a time, and a backward pass for each of many classes."""

import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rwalk._errors import printable, warn
from rwalk.gradients.batches import ExampleBatch

MANY_PASSES = 100
"""Up to how many backward passes for one batch are no matter."""

LONG = 60.0
"""Up to how many seconds of measuring are no matter."""

TIMED = 8
"""How many examples are timed."""

clock = time.perf_counter

_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Which warnings there were about each model."""


def warn_once(root: nn.Module, kind: str, message: str) -> None:
    """Warn, unless there was a warning of this kind about this model."""
    kinds = _warned.setdefault(root, set())
    if kind not in kinds:
        kinds.add(kind)
        warn(message)


def warn_one_by_one(root: nn.Module, reason: str, remedy: str) -> None:
    """Warn that examples are measured one at a time."""
    first = reason.strip().partition("\n")[0]
    shown = printable(first if len(first) <= 200 else f"{first[:200]} ...").rstrip(".")
    warn_once(root, "one by one", f"The examples are measured one at a time, which is slow: {shown}. {remedy}")


class ManyClasses:
    """Times the first examples where each class takes a backward pass, and warns of what will take long.

    Args:
        root: the model.
        data: the batches.
        samples: how many examples are read at most.
    """

    def __init__(self, root: nn.Module, data: Iterable[Any], samples: int | None) -> None:
        self._root, self._batches, self._samples = root, length_hint(data, 0), samples
        self._timed = False

    def parts(self, batch: ExampleBatch, passes: int) -> Iterator[ExampleBatch]:
        """Yield the examples of a batch, where each takes `passes` backward passes; a few first if they are to be timed."""
        if self._timed or passes <= MANY_PASSES or not batch.size:
            yield batch
            return
        self._timed, start = True, _now(batch)
        yield batch.cut(0, TIMED)
        seconds = (_now(batch) - start) / min(TIMED, batch.size)
        total = min(self._batches * batch.size, self._samples or self._batches * batch.size)
        if not self._batches or total * seconds > LONG:
            self._warn(passes, seconds, total)
        if batch.size > TIMED:
            yield batch.cut(TIMED, batch.size)

    def _warn(self, passes: int, seconds: float, total: int) -> None:
        whole = f", about {_duration(total * seconds)} for {total} examples" if total else ""
        warn_once(
            self._root,
            "many classes",
            f'The labels "exact" take a backward pass for each of {passes} classes or outputs: {seconds:.2g} seconds an '
            f'example{whole}. Use `labels="sample"`, which takes one backward pass and is unbiased, or fewer examples with '
            "`samples=`.",
        )


def _now(batch: ExampleBatch) -> float:
    """Return the time when everything that was begun on the batch's devices is done."""
    for device in {t.device for t in batch.inputs if t.is_cuda}:
        torch.cuda.synchronize(device)
    return clock()


def _duration(seconds: float) -> str:
    """Write a time."""
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
