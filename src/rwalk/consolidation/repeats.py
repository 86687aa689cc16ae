"""Whether a task's end is asked for twice: no training in between, and the same data.

Rules that measure during training need none of this: without a step there is nothing to count.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rwalk._io import files
from rwalk.distributed.shards import ShardGroup

Sums = list[float]


@dataclass
class LastEnd:
    """What identifies the last task's end.

    Args:
        theta: of each parameter, the sum of its elements and of their squares.
        data: the same of the data measured on, over all ranks, and the number of elements; empty if it was not looked at.
        observed: whether steps of that task had been observed.
    """

    theta: dict[str, Sums] = field(default_factory=dict)
    data: Sums = field(default_factory=list)
    observed: bool = False

    @classmethod
    def of(cls, theta: Mapping[str, Tensor], shard_group: ShardGroup, data: Sums, observed: bool) -> "LastEnd":
        """Sum up parameters."""
        return cls(_weights(theta, shard_group), data, observed)

    def text(self) -> str:
        """Return it as text for state files."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "LastEnd":
        """Return what `text` was made from."""
        return cls(**files.parse(text))

    @classmethod
    def readable(cls, text: Any) -> bool:
        """Return whether a text is one that `text` returns."""
        try:
            found = cls.read(text)
            numbers = [number for sums in (*found.theta.values(), found.data) for number in sums]
            lengths = {len(sums) for sums in found.theta.values()} <= {2} and len(found.data) in (0, 3)
        except (ValueError, TypeError, AttributeError):
            return False
        return lengths and all(isinstance(n, float) for n in numbers) and isinstance(found.observed, bool)

    def unmoved(self, theta: Mapping[str, Tensor], shard_group: ShardGroup) -> bool:
        """Return whether the parameters are unchanged, as far as both are known."""
        now = _weights(theta, shard_group)
        both = self.theta.keys() & now.keys()
        return bool(both) and all(_close(self.theta[name], now[name]) for name in both)

    def same_data(self, data: Sums) -> bool:
        """Return whether these are the sums of the same data, in any order."""
        return bool(self.data) and len(self.data) == len(data) and _close(self.data, data)


class SummedData:
    """Data that is summed up while it is read for the first time."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._held = False  # whether any batch has come
        self.sums: Sums = []

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; raise a ValueError where they can be read only once."""
        sums, held, batch = [0.0, 0.0, 0.0], self._held, None
        for batch in self._data:
            self._held = True
            for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
                count = leaf.numel() if isinstance(leaf, Tensor) else 1
                sums = [a + b for a, b in zip(sums, [*_sums(leaf), count], strict=True)]
            yield batch
        if held and batch is None:
            raise ValueError(
                f"The data (`{type(self._data).__name__}`) is used up after it was read once, but is needed again. Let it "
                "begin anew with each `iter`, or pass a list of batches."
            )
        self.sums = self.sums or sums

    def __length_hint__(self) -> int:
        """Return how many batches there are, 0 if that is unknown."""
        return length_hint(self._data, 0)


def _weights(theta: Mapping[str, Tensor], shard_group: ShardGroup) -> dict[str, Sums]:
    sums = shard_group.sums([number for t in theta.values() for number in _sums(t)])
    return {name: sums[2 * i : 2 * i + 2] for i, name in enumerate(theta)}


def _sums(value: Any) -> Sums:
    """Return the sum of a tensor's elements and of their squares; of anything else, a number that its text gives."""
    if not isinstance(value, Tensor):
        number = float(zlib.crc32(repr(value).encode()))
        return [number, number * number]
    wide = value.detach().to(torch.float64)
    return [float(wide.sum()), float(wide.square().sum())]


def _close(a: Sums, b: Sums) -> bool:
    """Return whether sums agree up to rounding."""
    return abs(a[0] - b[0]) <= 1e-12 * math.sqrt(1 + b[1]) and all(
        math.isclose(x, y, rel_tol=1e-12) for x, y in zip(a[1:], b[1:], strict=True)
    )
