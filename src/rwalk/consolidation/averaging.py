"""Averaging of each task's later iterates, which become both model and anchor when the task ends."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from rwalk._parameters import copy, grow_tensor

ETA = 3
"""Order of the polynomial average: larger forgets the start of a task sooner (Shamir and Zhang 2013, arXiv 1212.1824)."""


class Tail:
    """A running average of parameters, restarted with each task; needs no knowledge of the task's length.

    After n steps avg <- avg + (eta + 1) / (n + eta) * (theta - avg), so that later iterates weigh more.

    Attributes:
        average: the average of each parameter, by name, in state precision.
        count: how many steps went into it.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    @classmethod
    def read(cls, average: dict[str, Tensor], count: Mapping[str, int]) -> "Tail":
        """Return a tail that continues from an average and its count of steps."""
        tail = cls()
        tail.average, tail.count = average, dict(count)
        return tail

    def followed(self, theta: Mapping[str, Tensor], lost: Collection[str] = ()) -> "Tail":
        """Return what is known of these parameters, by leading block where they grew, without that of those in `lost`."""
        known = {name: average for name, average in self.average.items() if name not in lost}
        tail = Tail()
        tail.average = {name: grow_tensor(known.get(name), now, copy) for name, now in theta.items()}
        tail.count = {name: self.count[name] if name in known else 0 for name in theta}
        return tail

    def shares(self, names: Sequence[str], moved: Sequence[bool]) -> list[float]:
        """Count an optimiser step for those parameters that have moved; return the share of each in its average."""
        count = self.count
        for name, has in zip(names, moved, strict=True):
            count[name] += has
        return [(ETA + 1) / (count[name] + ETA) for name in names]

    def take(self, theta: Mapping[str, Tensor]) -> None:
        """Take parameters into their averages."""
        for name, share in zip(theta, self.shares(list(theta), [True] * len(theta)), strict=True):
            average = self.average[name]
            average.lerp_(theta[name].detach().to(average.dtype), share)

    def take_back(self, names: Iterable[str]) -> None:
        """Uncount a step that turned out not to count; it wrote nothing."""
        for name in names:
            self.count[name] -= 1

    @property
    def known(self) -> bool:
        """Whether any step went into it."""
        return any(self.count.values())

    def put_in(self, theta: Mapping[str, Tensor]) -> None:
        """Replace parameters by their averages, where there are any."""
        for name in theta:
            if self.count.get(name):
                theta[name].detach().copy_(self.average[name])

    def restart(self) -> None:
        """Begin a new task."""
        self.count = dict.fromkeys(self.count, 0)
