"""What is easily forgotten when training consists of several parts: to pass the memory on, and to attach it."""

import math
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from rwalk._errors import warn
from rwalk._parameters import bare, listed
from rwalk.consolidation.batchnorm import note_modes
from rwalk.consolidation.moves import Writes

if TYPE_CHECKING:
    from rwalk.consolidation.memory import Memory


class Learned(NamedTuple):
    """How a memory has left its model after a task.

    Args:
        memory: which one.
        writes: what the parameters were like.
    """

    memory: "weakref.ref[Memory]"
    writes: Writes


_LEARNED: weakref.WeakKeyDictionary[nn.Module, Learned] = weakref.WeakKeyDictionary()


def note_learned(memory: "Memory") -> None:
    """Note that a memory has learned a task of its model."""
    _LEARNED[bare(memory.model)] = Learned(weakref.ref(memory), memory.begun)


def warn_of_second_memory(memory: "Memory", theta: Mapping[str, Tensor]) -> None:
    """Warn where a memory without a task is attached to a model that is as another one has left it after a task."""
    found = _LEARNED.get(bare(memory.model))
    if found is None or found.memory() is memory or memory.tasks or memory.anchor.point:
        return
    if not found.writes.found(theta):
        warn(
            "Another memory has learned tasks of this model, and the new one knows nothing of them, so they are not protected. "
            "Use one consolidator, or one callback, for all tasks; or give the new one what the other has saved."
        )


def warn_of_second_optimizer(memory: "Memory", now: Collection[str]) -> None:
    """Warn where an optimiser that has made no step is about to be replaced by one that lacks some of its parameters."""
    if memory.optimizer is None or memory.stepped:
        return
    held = memory.protected.in_optimizer
    left = [name for name in memory.protected.parameters if name in held and name not in now]
    if left:
        warn(
            f"`attach` replaces an optimiser that has made no step since it was attached to, and the new one does not hold "
            f"{listed(left)}: they are neither measured nor pulled. One memory watches one optimiser: put all parameters into "
            "groups of one, or build a consolidator for each optimiser, with `only=` for its part of the model."
        )


FAR = 0.5
"""How far weights lie from an anchor, over the anchor's own size, that are hardly those of its model."""


def note_first_step(memory: "Memory") -> None:
    """At a task's first step note which norms rest; at the first after a memory was loaded, warn if the weights were not."""
    loaded, memory.loaded = memory.loaded, False
    if not memory.steps:
        note_modes(memory.model)
    if not loaded:
        return
    theta, point = memory.protected.theta, {**memory.anchor.point, **memory.tail.average}
    pairs = [(theta[name].detach(), p) for name, p in point.items() if name in theta and theta[name].shape == p.shape]
    moved = sum(float((now.float() - p.to(now.device).float()).square().sum()) for now, p in pairs)
    size = sum(float(p.float().square().sum()) for _, p in pairs)
    if moved > FAR**2 * size:
        warn(
            f"The memory was loaded, and the model's weights lie {math.sqrt(moved / size) if size else math.inf:.2g} times its "
            "weights' size away from those, as new ones do. Load the weights that were saved with the memory, too."
        )


def refuse_lent(memory: "Memory") -> None:
    """Raise a RuntimeError for what may not happen while the model has weights for a while."""
    if memory.lent:
        raise RuntimeError(
            "Inside `with memory.averaged():` and in the `evaluate` of `path` the model has other weights for a while, so that "
            "no step is made there, and the memory is not changed, saved or copied. Leave the block first, or the function."
        )


def refuse_unwatched(memory: "Memory") -> None:
    """Raise a RuntimeError if a task is to end in which no step was seen, although the weights have changed."""
    if memory.rule.measures != "steps" or memory.steps:
        return
    changed = memory.begun.found(memory.protected.theta)
    if changed:
        raise RuntimeError(
            f"No optimiser step was seen since the last task or `attach`, and yet the weights {listed(changed)} have changed. "
            "If another optimiser trained them, call `attach(optimizer)` on it before training."
        )


def accept_changes(memory: "Memory") -> None:
    """Drop the average and deferred pulls where something has changed the weights after the last step."""
    changed = memory.changed()
    memory.moves.keep_changed(changed)
    if not changed:
        return
    waiting = memory.turns.lengths
    memory.turns.reset()
    if memory.averages and any(memory.tail.count.get(name) or name in waiting for name in changed):
        memory.tail.restart()
        warn(
            f"The weights {listed(changed)} were changed after the last step of the task. They are kept as they are, "
            "and the average is left out. To have the average, call `consolidate()` right after the last step, before anything "
            'else moves, restores or averages weights; to have no average, pass `average="none"`.'
        )
