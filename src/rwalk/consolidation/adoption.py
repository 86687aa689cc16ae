"""Holding to an anchor that was made elsewhere."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rwalk import rules
from rwalk._errors import warn
from rwalk._parameters import named_parameters
from rwalk.anchors.base import Anchor
from rwalk.anchors.kronecker import held_names
from rwalk.anchors.match import Match
from rwalk.consolidation.memory import Memory
from rwalk.distributed import shards
from rwalk.distributed.shards import ALONE
from rwalk.rules.base import Rule
from rwalk.rules.kronecker import ESTIMATE


def adopt(memory: Memory, anchor: Anchor, rename: Mapping[str, str] | Callable[[str], str] | None) -> Match:
    """Hold to another anchor from now on; see `Consolidator.adopt`."""
    rule = memory.rule
    if anchor.parts and not isinstance(anchor, rule.anchor_kind):
        kind, name = type(anchor).__name__, type(rule).__name__
        raise ValueError(f"A `{kind}` cannot be held under {name}, which holds each weight alone. Use the rule `Kronecker()`.")
    anchor.refuse_damage()
    match = anchor.match(memory.scope.of(named_parameters(memory.model)), rename)
    if not match.names:
        raise ValueError(
            f"The anchor fits nothing of the model: {match}. Pass `rename`, which leads from the anchor's names to the model's."
        )
    if not rule.accumulates:
        warn(
            f"{type(rule).__name__} replaces an adopted anchor at the next `consolidate`, by what it measured itself. Use EWC, "
            "OnlineEWC, SI, MAS or L2 to keep it longer."
        )
    memory.widen([*match.names.values(), *memory.scope.trainable(memory.model)])
    mine, note = _in_unit_of(rule, memory.of_my_kind(anchor, memory.protected).renamed(match.names))
    memory.anchor = memory.offload.keep_anchor(_local(memory, mine).align(memory.protected.theta))
    if memory.moments is not None:
        memory.moments = memory.moments.followed(memory.protected.parameters, [], held_names(memory.anchor))
        memory.watch_next()
    return match._replace(note=note)


def _in_unit_of(rule: Rule[Any], anchor: Anchor) -> tuple[Anchor, str]:
    """Return an anchor in the unit of a rule, and what was done to it; warn where nothing can be."""
    made = getattr(rules, anchor.origin, None) if anchor.origin else None
    theirs, ours = getattr(made, "unit", None), rule.unit
    name = type(rule).__name__
    if theirs == "own" and ours == "task":
        total, elements = sum(anchor.totals(ALONE).values()), sum(p.numel() for p in anchor.point.values())
        if not total:
            return anchor, ""
        factor = elements / total / math.sqrt(ESTIMATE)
        return anchor.scaled(factor), f"importance of {anchor.origin} times {factor:.3g}, which is one task of {name}"
    if theirs == "task" and ours == "own":
        warn(
            f"The anchor was made by {anchor.origin}, in the unit of one task, and {name} has a unit of its own, so that the "
            f"strength of neither fits. Tune it; with {anchor.origin}'s default the anchor is held as it was there."
        )
    return anchor, ""


def _local(memory: Memory, anchor: Anchor) -> Anchor:
    """Return this rank's parts of an anchor of whole tensors."""
    if not memory.protected.shard_group.groups:
        return anchor
    point, omega = (shards.local_parts(c, memory.protected.parameters) for c in (anchor.point, anchor.omega))
    return replace(anchor, point=point, omega=omega)
