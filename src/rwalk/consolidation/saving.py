"""A consolidator's memory as a dictionary of tensors and plain values, and back."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rwalk._parameters import named_parameters
from rwalk.anchors.base import anchor_kind
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.consolidation import state_checks
from rwalk.consolidation.averaging import Tail
from rwalk.consolidation.measuring import copied, moments_from
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.moves import Moves, Writes, digests
from rwalk.consolidation.protected import ProtectedParameters, grow_state
from rwalk.consolidation.repeats import LastEnd
from rwalk.consolidation.turns import Turns
from rwalk.distributed import shards


def content(memory: Memory) -> dict[str, Any]:
    """Return the layout of `Consolidator.state_dict`, its tensors copied."""
    protected = memory.protected
    parameters = protected.parameters
    state = {key: shards.as_dtensors(copied(value), parameters) for key, value in memory.state._asdict().items()}
    state |= {key: protected.shard_group.total(state[key]) for key in memory.rule.counters}
    return {
        "format": state_checks.FORMAT,
        "rule": state_checks.description(memory.rule),
        "strength": memory.strength,
        "average": memory.average,
        "tasks": memory.tasks,
        "steps": memory.steps,
        "changed": "\n".join(memory.changed()),
        "written": "" if protected.shard_group.groups else digests(protected.theta),
        "last_end": "" if memory.last_end is None else memory.last_end.text(),
        "shapes": {name: list(p.shape) for name, p in parameters.items()},
        "state": state,
        "anchor": copied(memory.whole_anchor().content()),
        "turns": {"lengths": dict(memory.turns.lengths), "since": memory.turns.since},
        "moments": copied(memory.measured()),
        "tail": {"average": shards.as_dtensors(copied(memory.tail.average), parameters), "count": dict(memory.tail.count)},
    }


def restore(memory: Memory, saved: Mapping[str, Any]) -> None:
    """Continue from a `content` of the same model and rule; on an error nothing changes."""
    parameters = named_parameters(memory.model)
    saved = state_checks.current_format(saved, parameters)
    state_checks.refuse_state(saved, memory.rule, memory.average, parameters, memory.state)
    memory.scope.refuse_others(list(saved["shapes"]))
    now = ProtectedParameters.of({name: parameters[name] for name in saved["shapes"]})
    mine = partial(shards.local_parts, parameters=now.parameters)
    state = type(memory.state)(**{key: copied(mine(value)) for key, value in saved["state"].items()})
    state = state._replace(**{key: now.shard_group.mine(getattr(state, key)) for key in memory.rule.counters})
    state = grow_state(state, list(now.shapes), now.shapes, now.theta, memory.rule.init)
    kind = anchor_kind(saved["anchor"]) or ElementwiseAnchor
    anchor = memory.of_my_kind(kind.read(copied(saved["anchor"])), now)
    point, omega, origin = mine(anchor.point), mine(anchor.omega), type(memory.rule).__name__
    anchor = replace(anchor, point=point, omega=omega, origin=origin).align(now.theta)
    moments = moments_from(saved["moments"], memory.model, memory.rule, now, anchor)
    memory.tail = Tail.read(copied(mine(saved["tail"]["average"])), saved["tail"]["count"])
    memory.strength, memory.tasks, memory.steps = (saved[key] for key in ("strength", "tasks", "steps"))
    written = "" if now.shard_group.groups else saved["written"]  # each rank of sharded parameters has other elements
    noted = memory.averages or memory.rule.walks or not memory.by_element  # to others it makes no difference
    moves = Moves(saved["changed"].splitlines(), written if noted else "")
    memory.moves, memory.renewed, memory.protected = moves, True, now
    memory.last_end = LastEnd.read(saved["last_end"]) if saved["last_end"] else None
    memory.anchor, memory.state = memory.offload.keep_anchor(anchor), memory.offload.keep(memory.rule, state)
    memory.begun = Writes({}, "" if memory.steps else written)
    memory.marked = bool(anchor.point) and not memory.tasks and not any(anchor.totals(now.shard_group).values())
    memory.turns = Turns(saved["turns"]["lengths"], saved["turns"]["since"])
    memory.stop_collecting()
    memory.moments = moments
    if memory.optimizer is not None:
        memory.follow_optimizer(memory.optimizer)
