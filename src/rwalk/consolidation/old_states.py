"""States that earlier versions have saved, brought up to the layout of today."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwalk.anchors.old_factors import UNIT
from rwalk.rules.kronecker import ESTIMATE

NOTHING_MEASURED: dict[str, Any] = {"layers": {}, "squares": {}, "seen": {}, "examples": 0}
"""What second moments of layers are before any was measured."""


def upgraded(content: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return a `Consolidator.state_dict` of format 3 or 4 as one of format 5; anything else as it is.

    Args:
        content: what was saved.
        parameters: those of the model, as they are now, by name.
    """
    return _with_digests(_with_turns(_without_resting(content, parameters)))


def _with_digests(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a state of format 5 that was saved before there were digests of the weights an empty entry for them."""
    return {"written": "", **content} if isinstance(content, Mapping) and content.get("format") == 5 else content


def _with_turns(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of format 4 as one of format 5, which has what `Kronecker` measures in training, and a pull in turns."""
    if not isinstance(content, Mapping) or content.get("format") != 4:
        return content
    more: dict[str, Any] = {"format": 5, "turns": {"lengths": {}, "since": 0}, "moments": NOTHING_MEASURED}
    if content["rule"].get("name") == "Kronecker":
        more |= _whole_layers(content)
    return {**content, **more}


def _whole_layers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes for a rule that measured on data, kept all directions and had another unit."""
    rule, tasks = content["rule"], content["tasks"]
    whole = {"measure": "data", "m": 10, "every": rule["every"], "share": 1.0, "rank": None}
    lengths: dict[str, float] = {}
    for weight, layer in content["anchor"].get("layers", {}).items():
        if layer["deferred"][1]:
            lengths |= dict.fromkeys([weight, *([layer["bias"]] if layer["bias"] else [])], layer["deferred"][0] / UNIT)
    since = max((layer["deferred"][1] for layer in content["anchor"].get("layers", {}).values()), default=0)
    return {
        "rule": {"name": "Kronecker", **whole, "labels": rule["labels"], "samples": rule["samples"]},
        "strength": content["strength"] / UNIT,
        "state": {"now": content["steps"], "tasks": tasks, "steps": tasks * ESTIMATE},
        "turns": {"lengths": lengths, "since": since},
    }


def _without_resting(content: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return a state of format 3 as one of format 4.

    In format 3 a rule that follows the path kept `previous`: where the last step ended, or its gradient where that step had not
    been seen to end (then `resting` was not set), and a window was ended at the start of the next one.
    """
    if not isinstance(content, Mapping) or content.get("format") != 3:
        return content
    state = content["state"]
    if not isinstance(state, Mapping) or not {"path", "mark", "previous", "resting", "steps"} <= state.keys():
        return {**content, "format": 4}
    theta = [parameters[name].detach() for name in content["shapes"]]
    state = _rested({key: _copied(value) for key, value in state.items()}, theta)
    rule = content["rule"]
    if "delta_t" in rule and state["steps"] and state["steps"] % rule["delta_t"] == 0:
        _end_window(state, rule["eps"])
    if "score" not in state:  # synaptic intelligence marked each step's start
        del state["mark"]
    return {**content, "format": 4, "state": state}


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _rested(state: dict[str, Any], theta: list[Tensor]) -> dict[str, Any]:
    """Return a state whose path holds the last move, and that says where it ended."""
    previous, resting = state.pop("previous"), state.pop("resting")
    if not state["steps"]:
        state["last"] = [mark.clone() for mark in state["mark"]]
    elif resting:
        state["last"] = previous
    else:
        state["last"] = [now.to(mark.dtype, copy=True) for now, mark in zip(theta, state["mark"], strict=True)]
        for path, g, now, mark in zip(state["path"], previous, theta, state["mark"], strict=True):
            path.addcmul_(g, now - mark, value=-1)
    return state


def _end_window(state: dict[str, Any], eps: float) -> None:
    """End the window that is open, as its last step has ended."""
    for last, mark, path, score, fisher in zip(
        *(state[key] for key in ("last", "mark", "path", "score", "fisher")), strict=True
    ):
        distance = (last - mark) ** 2 * fisher / 2
        score.add_(path / (distance + eps))
        state["beyond_eps"] += torch.sum(distance > eps).to(state["beyond_eps"].device)
        state["windows"] += last.numel()
        path.zero_()
        mark.copy_(last)
