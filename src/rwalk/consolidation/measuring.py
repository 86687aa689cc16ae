"""Second moments of layers that are measured in training, as state files have them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rwalk import gradients
from rwalk.anchors.base import Anchor
from rwalk.anchors.kronecker import held_names
from rwalk.consolidation import state_checks
from rwalk.consolidation.protected import ProtectedParameters
from rwalk.distributed import shards
from rwalk.rules.base import Rule


def content_of(moments: gradients.TrainingMoments, protected: ProtectedParameters) -> dict[str, Any]:
    """Return what was measured, as tensors and plain values."""
    content = moments.content(whole=bool(protected.shard_group.groups))
    return {**content, "squares": shards.as_dtensors(content["squares"], protected.parameters)}


def moments_from(
    content: Mapping[str, Any], model: nn.Module, rule: Rule[Any], now: ProtectedParameters, anchor: Anchor
) -> gradients.TrainingMoments | None:
    """Return the collector that a content was made from, None where the rule measures nothing in training.

    Raises:
        ValueError: if the content is damaged.
    """
    if rule.moments_every is None:
        return None
    moments = gradients.TrainingMoments(model, now.parameters, rule.directions, held_names(anchor))
    try:
        squares = shards.local_parts(copied(content["squares"]), now.parameters)
        moments.read({**copied(content), "squares": squares}, now.shard_group.first, bool(now.shard_group.groups))
    except (ValueError, RuntimeError, AttributeError) as error:
        raise state_checks.damaged_state([f"moments ({error})"]) from None
    return moments


def copied(value: Any) -> Any:
    """Copy the tensors in lists and dictionaries; pass plain values on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [copied(v) for v in value]
    return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value
