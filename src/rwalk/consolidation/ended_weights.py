"""The weights that a task would end with if it ended now: pulled for the last time, and averaged."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk.consolidation.batchnorm import renew_statistics, running_statistics
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.merged import follow_merged
from rwalk.consolidation.misuse import accept_changes
from rwalk.consolidation.turns import Turns, take_last_turn
from rwalk.distributed.wrappers import reshard_fsdp


@contextmanager
@torch.no_grad()
def averaged(memory: Memory, data: Iterable[Any] | None) -> Iterator[nn.Module]:
    """Lend the model as the task would end with it, then restore it; see `Consolidator.averaged`."""
    memory.theta()
    memory.follow_replaced()
    with ended(memory, always=True):
        if memory.tail.known:
            renew_statistics(memory.model, data, gradients.forward)
        memory.lent = True
        try:
            yield memory.model
        finally:
            memory.lent = False


@contextmanager
def ended(memory: Memory, always: bool = False) -> Iterator[dict[str, Tensor]]:
    """Give the parameters the values that the task ends with; yield where the last pull has left them.

    All is restored if an error comes, or always, the running statistics of BatchNorm too.
    """
    theta, tail, turned = memory.theta(), memory.tail, list(memory.turns.lengths)
    written = {name: p for name, p in theta.items() if tail.count.get(name) or name in turned}
    averages = [tail.average[name] for name in turned if name in tail.average]
    others = [*averages, *running_statistics(memory.model)]
    with restoring(memory, [*written.values(), *others], always) as before:
        accept_changes(memory)
        follow_merged(memory)
        take_last_turn(memory)
        raw = {**theta, **dict(zip(written, before, strict=False))}
        raw |= {name: theta[name].detach().clone() for name in turned if name in theta}
        tail.put_in({name: theta[name] for name in _trained(memory)})
        yield raw


def _trained(memory: Memory) -> list[str]:
    """Name the parameters that are trained; all of them where everything is frozen, as some do once training has ended."""
    learning = [name for name, p in memory.protected.parameters.items() if p.requires_grad]
    return learning or list(memory.protected.parameters)


@contextmanager
def restoring(memory: Memory, tensors: Iterable[Tensor], always: bool = False) -> Iterator[list[Tensor]]:
    """Restore tensors, and what the memory has counted, if an error comes, or always; yield copies of the tensors."""
    kept = [(t, t.detach().clone()) for t in tensors]
    lengths, since, count = dict(memory.turns.lengths), memory.turns.since, dict(memory.tail.count)
    anchor, turned, changed, restore = memory.anchor, memory.turned, memory.changed(), always
    try:
        yield [before for _, before in kept]
    except BaseException:
        restore = True
        raise
    finally:
        if restore:
            reshard_fsdp(memory.model)
            for now, before in kept:
                now.detach().copy_(before)
            memory.turns, memory.tail.count = Turns(lengths, since), count
            memory.anchor, memory.turned = anchor, turned
            memory.moves.note_all(memory.protected.theta)
            memory.moves.keep_changed(changed)
