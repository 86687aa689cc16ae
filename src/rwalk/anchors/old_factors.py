"""Anchors of layers as earlier versions have saved them: two matrices, each in its whole basis, in another unit."""

from collections.abc import Mapping
from typing import Any

UNIT = 0.015
"""What a quadratic is multiplied by that was in the unit of the first task's mean: its default strength was 0.0015, not 0.1."""


def current_anchor(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of an anchor of layers in the layout and unit of today."""
    if "every" not in content or not isinstance(content["layers"], Mapping):
        return content
    layers = {weight: _current_layer(entry) for weight, entry in content["layers"].items()}
    inside = [*layers, *(entry.get("bias") for entry in layers.values() if isinstance(entry, Mapping))]
    # it had the diagonals of layers, too
    omega = {name: o * UNIT for name, o in content["omega"].items() if name not in inside}
    return {"point": content["point"], "omega": omega, "layers": layers}


def _current_layer(entry: Any) -> Any:
    try:
        inputs, outputs = (_whole(*entry[key]) for key in ("inputs", "outputs"))
        outputs[1] = outputs[1] * UNIT
        return {"bias": entry["bias"], "groups": 1, "transposed": False, "inputs": inputs, "outputs": outputs,
                "tasks": entry["tasks"]}  # fmt: skip
    except (LookupError, TypeError, AttributeError, RuntimeError):
        return entry  # damaged, as its reader will find


def _whole(basis: Any, values: Any) -> list[Any]:
    none = values.new_zeros(1, 1)
    return [basis.T.contiguous().unsqueeze(0), values.unsqueeze(0), none, none.clone()]
