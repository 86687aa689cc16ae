"""What is done every few steps and not at each: the pull of whole layers, and the average of weights that were just pulled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rwalk.anchors.kronecker import KroneckerAnchor, PullSteps

if TYPE_CHECKING:
    from rwalk.consolidation.memory import Memory


class Turns:
    """How far the weights have gone since they were last pulled.

    Attributes:
        lengths: for each parameter that has moved since, the sum over steps of 2 * strength * learning rate.
        since: how many steps there were since.
    """

    def __init__(self, lengths: Mapping[str, float] | None = None, since: int = 0) -> None:
        self.lengths, self.since = dict(lengths or {}), since

    def add(self, names: Sequence[str], moved: Sequence[bool], lengths: Sequence[float]) -> None:
        """Count a step for those parameters that have moved."""
        for name, has, length in zip(names, moved, lengths, strict=True):
            if has:
                self.lengths[name] = self.lengths.get(name, 0.0) + length
        self.since += 1

    def take_back(self, names: Iterable[str], lengths: Iterable[float]) -> None:
        """Uncount a step that turned out not to count."""
        for name, length in zip(names, lengths, strict=True):
            self.lengths[name] -= length
        self.since -= 1

    def reset(self) -> None:
        """Begin anew."""
        self.lengths, self.since = {}, 0


def take_turn(
    memory: "Memory", theta: Mapping[str, Tensor], steps: Callable[[Mapping[str, float]], PullSteps] | None
) -> None:
    """Pull the parameters that have moved since the last time, then take them into the average.

    Args:
        memory: holds anchor, average and what has been counted.
        theta: the parameters that may be written to, by name.
        steps: takes the sums of steps' lengths, and returns how long the steps of a pull are; None for no pull.
    """
    turns = memory.turns
    moved = {name: theta[name] for name in turns.lengths if name in theta}
    if steps is not None and isinstance(memory.anchor, KroneckerAnchor) and any(turns.lengths.values()):
        memory.anchor.draw(moved, steps(turns.lengths), memory.protected.parameters)
    if memory.averages:
        memory.tail.take(moved)
    turns.reset()


def take_last_turn(
    memory: "Memory", theta: Mapping[str, Tensor], steps: Callable[[Mapping[str, float]], PullSteps] | None
) -> Callable[[], None]:
    """Take a turn when a task ends, if there were steps since the last one; return a function that undoes it."""
    turns, tail = memory.turns, memory.tail
    if not turns.lengths:
        return lambda: None
    lengths, since = dict(turns.lengths), turns.since
    parameters = memory.protected.parameters  # those that were frozen meanwhile stay as they are
    writable = {name: p for name, p in theta.items() if name in lengths and parameters[name].requires_grad}
    before = {name: p.detach().clone() for name, p in writable.items()}
    average = {name: tail.average[name].clone() for name in writable if name in tail.average}
    count = dict(tail.count)

    def undo() -> None:
        for name, value in before.items():
            theta[name].detach().copy_(value)
        for name, value in average.items():
            tail.average[name].copy_(value)
        tail.count = count
        memory.turns = Turns(lengths, since)

    try:
        take_turn(memory, {name: p.detach() for name, p in writable.items()}, steps)
    except BaseException:
        undo()
        raise
    return undo
