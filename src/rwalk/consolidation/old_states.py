"""States that earlier versions have saved, brought up to the layout of today."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def upgraded(content: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return a `Consolidator.state_dict` of format 3 as one of format 4; anything else as it is.

    In format 3 a rule that follows the path kept `previous`: where the last step ended, or its gradient where that step had not
    been seen to end (then `resting` was not set), and a window was ended at the start of the next one.

    Args:
        content: what was saved.
        parameters: those of the model, as they are now, by name.
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
