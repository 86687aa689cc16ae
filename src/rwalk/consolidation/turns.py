"""What is done every few steps and not at each: the pull of whole layers, and the average of weights that were just pulled."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rwalk._errors import warn
from rwalk.anchors.kronecker import KroneckerAnchor, PullSteps
from rwalk.consolidation import proximal
from rwalk.consolidation.merged import follow_merged
from rwalk.consolidation.protected import ProtectedParameters

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


def pull_steps(protected: ProtectedParameters, metrics: proximal.Metrics, lengths: Mapping[str, float]) -> PullSteps:
    """Return how long the steps of a pull are that makes up for several steps of an optimiser."""

    def mean(part: Tensor) -> Tensor | float:
        """Return the mean over the elements that the optimiser has moved, without those of tokens that never came."""
        if not protected.shard_group.groups:
            return part.sum() / part.count_nonzero().clamp_(min=1)
        total, moved = protected.shard_group.sums([float(part.sum()), int(part.count_nonzero())])
        return total / max(moved, 1)

    return proximal.DeferredSteps(metrics, list(protected.theta), lengths, mean)


def turning(memory: "Memory") -> list[str]:
    """Name the parameters that a turn pulls and averages: those that have moved since the last one, unless frozen meanwhile."""
    parameters = memory.protected.parameters
    return [name for name in memory.turns.lengths if name in parameters and parameters[name].requires_grad]


def take_turn(memory: "Memory", metrics: proximal.Metrics | None) -> None:
    """Pull the parameters that have moved since the last time, then take them into the average.

    Args:
        memory: holds anchor, average and what has been counted.
        metrics: reads the optimiser's metric; None for no pull.
    """
    if not memory.turned:
        follow_merged(memory)
        memory.turned = True
    lengths, anchor = memory.turns.lengths, memory.anchor
    moved = {name: memory.protected.theta[name].detach() for name in turning(memory)}
    if metrics is not None and isinstance(anchor, KroneckerAnchor) and any(lengths.values()):
        pulled = {name: p for name, p in moved.items() if lengths[name]}
        anchor.draw(pulled, pull_steps(memory.protected, metrics, lengths), memory.protected.parameters)
    if memory.averages:
        memory.tail.take(moved)
    memory.turns.reset()


def take_last_turn(memory: "Memory") -> None:
    """Take a turn when a task ends, if there were steps since the last one."""
    turns = memory.turns
    if not turns.lengths:
        return
    metrics = None
    last = memory.last_optimizer
    optimizer = memory.optimizer if memory.optimizer is not None or last is None else last()
    if optimizer is not None:
        metrics = proximal.Metrics(optimizer, memory.protected.parameters.values())
    elif any(turns.lengths.values()):
        warn(
            f"No optimiser is attached, so the pull of the last {turns.since} steps is left out, as its length is not known. "
            "Call `attach(optimizer)` before `consolidate()`."
        )
        turns.reset()
        return
    take_turn(memory, metrics)
