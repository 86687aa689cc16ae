"""Checks of a state before it is loaded: its format, rule and model, and that nothing is missing."""

from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rwalk._errors import printable
from rwalk._parameters import listed, refuse_uninitialised
from rwalk.anchors.base import anchor_kind
from rwalk.consolidation.old_states import upgraded
from rwalk.consolidation.repeats import LastEnd
from rwalk.consolidation.settings import check_strength
from rwalk.rules.base import Rule

FORMAT = 5
"""Version of the layout of `Consolidator.state_dict`; `old_states` brings states of formats 3 and 4 up to it."""
GROUPS = (
    ("shapes",), ("state",), ("anchor", "point"), ("anchor", "omega"), ("tail", "average"), ("tail", "count"),
    ("turns", "lengths"), ("moments", "layers"), ("moments", "squares"), ("moments", "seen"),
)  # fmt: skip
"""The dictionaries of that layout."""


def current_format(content: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Return a state in the layout of today.

    Raises:
        ValueError: if it is of an earlier one, and damaged.
    """
    try:
        return upgraded(content, parameters)
    except (ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise damaged_state([f"{type(error).__name__} {error}"]) from None


def damaged_state(parts: list[str]) -> ValueError:
    """Return the error that names the damaged parts of a state."""
    return ValueError(
        f"The state is damaged: {listed(parts)} is missing, left over, or of another kind or shape than expected. Pass "
        "what `Consolidator.state_dict()` returned, unchanged."
    )


def refuse_state(
    state_dict: Mapping[str, Any], rule: Rule[Any], average: str, parameters: Mapping[str, Tensor], state: Any
) -> None:
    """Raise a ValueError that names the first difference between a state and the rule and model it is to be loaded for.

    Args:
        state_dict: the state.
        rule: the rule that it is to be loaded for.
        average: the averaging that it is to be loaded for.
        parameters: those of the model that it is to be loaded for.
        state: a state of the rule, whose fields show what the one to be loaded has to look like.
    """
    try:
        _refuse_origin(state_dict, rule, average)
        damaged = [
            key for key in ("shapes", "state", "anchor", "tail", "turns", "moments") if not isinstance(state_dict[key], Mapping)
        ]
        if not damaged:
            _refuse_model(state_dict["shapes"], parameters)
            damaged = _damage(state_dict, rule, state)
            check_strength(state_dict["strength"])
    except (ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        damaged = [f"{type(error).__name__} {error}"]
    if damaged:
        raise damaged_state(damaged)


def _refuse_origin(state_dict: Mapping[str, Any], rule: Rule[Any], average: str) -> None:
    """Refuse a state of another format, averaging or rule."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"A state must be a dictionary, but is a `{type(state_dict).__name__}`.")
    if "format" not in state_dict:
        raise ValueError("This is no state of a consolidator, but perhaps a model's. Pass what `memory.state_dict()` returned.")
    came = state_dict["format"]
    if came != FORMAT:
        older = type(came) is int and came < FORMAT
        remedy = (
            "States of earlier versions cannot be loaded: train anew" if older else "Load it with the version that saved it"
        )
        raise ValueError(printable(f"The state has format {came}, but this version reads format {FORMAT}. {remedy}."))
    for key, mine in (("rule", description(rule)), ("average", average)):
        if state_dict[key] != mine:
            saved = printable(str(state_dict[key]))
            raise ValueError(
                f"The state was saved with {key} {saved}, but the consolidator has {mine}. Build it with the same {key}."
            )


def _refuse_model(shapes: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a state of another model."""
    refuse_uninitialised({name: parameters[name] for name in shapes if name in parameters})
    unlike = [n for n, shape in shapes.items() if n not in parameters or list(parameters[n].shape) != list(shape)]
    if unlike:
        raise ValueError(
            f"The state is of another model: {listed(unlike)} is missing here or has another shape. Load it into the model as "
            "it was when saved, and let it grow afterwards."
        )


def _damage(state_dict: Mapping[str, Any], rule: Rule[Any], state: Any) -> list[str]:
    """List the parts of a state that are missing, left over, or of another kind or shape than they should be."""
    shapes = {name: torch.Size(shape) for name, shape in state_dict["shapes"].items()}
    wrong = _damaged_columns(state_dict["state"], rule, state, shapes) + _damaged_anchor(state_dict["anchor"], rule, shapes)
    average, count = state_dict["tail"]["average"], state_dict["tail"]["count"]
    wrong += [key for key in ("average", "count") if not isinstance(state_dict["tail"][key], Mapping)]
    wrong += [n for n in {*average, *count} if not (_tensor(average.get(n), shapes.get(n)) and _whole(count.get(n)))]
    wrong += _damaged_turns(state_dict["turns"], shapes) + _damaged_moments(state_dict["moments"], shapes)
    wrong += [key for key in ("tasks", "steps") if not _whole(state_dict[key])]
    wrong += [key for key in ("changed", "written") if type(state_dict[key]) is not str]
    wrong += [] if state_dict["last_end"] == "" or LastEnd.readable(state_dict["last_end"]) else ["last_end"]
    return wrong


def _damaged_columns(kept: Mapping[str, Any], rule: Rule[Any], state: Any, shapes: Mapping[str, torch.Size]) -> list[str]:
    """List the fields of a rule's state that do not fit."""
    fresh, one = state._asdict(), rule.init([torch.zeros(1)])._asdict()
    wrong = sorted(map(str, set(fresh) ^ set(kept)))
    for key in set(fresh) & set(kept):
        empty = "None" in str(type(state).__annotations__.get(key))  # where an entry may be missing, its type says so
        fits = _fits(kept[key], shapes, one[key][0], empty) if isinstance(fresh[key], list) else _alike(kept[key], fresh[key])
        wrong += [] if fits else [key]
    return wrong


def _damaged_anchor(content: Mapping[str, Any], rule: Rule[Any], shapes: Mapping[str, torch.Size]) -> list[str]:
    """List the parts of an anchor's content that do not fit the parameters, or the rule."""
    point, omega, kind = content["point"], content["omega"], anchor_kind(content)
    both = (*point.items(), *omega.items())
    wrong = [n for n, t in both if n not in point or not _tensor(t, shapes.get(n))]
    if kind is None:
        return [*wrong, "anchor"]
    allowed = not kind.parts or kind is rule.anchor_kind
    return wrong + kind.damaged_parts(content) + ([] if allowed else list(kind.parts))


def _damaged_turns(turns: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> list[str]:
    """List what is wrong with how far the weights have gone since they were pulled."""
    wrong = [n for n, length in turns["lengths"].items() if n not in shapes or type(length) is not float or not length >= 0]
    return wrong + ([] if _whole(turns["since"]) else ["since"])


def _damaged_moments(moments: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> list[str]:
    """List what is wrong with second moments, as far as can be seen without their layers."""
    layers, squares, seen = moments["layers"], moments["squares"], moments["seen"]
    wrong = [n for n in {*squares, *seen} if not (_tensor(squares.get(n), shapes.get(n)) and _whole(seen.get(n)))]
    wrong += [w for w, entry in layers.items() if w not in shapes or not all(map(_sums, (entry, entry.get("head", entry))))]
    return wrong + ([] if _count(moments["examples"]) else ["examples"])


def _sums(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry has the sums of a layer: two matrices and their traces, and a number of rows."""
    return _count(entry["rows"]) and len(entry["sums"]) == 4


def _fits(column: Any, shapes: Mapping[str, torch.Size], fresh: Any, empty: bool) -> bool:
    """Return whether a column has for each parameter a number, if a fresh one has, or else a tensor of its shape or nothing."""
    if not isinstance(column, list) or len(column) != len(shapes):
        return False
    if isinstance(fresh, Real):
        return all(isinstance(value, Real) for value in column)
    return all((empty and value is None) or _tensor(value, shape) for value, shape in zip(column, shapes.values(), strict=True))


def _alike(value: Any, fresh: Any) -> bool:
    """Return whether a plain value of a state is of the kind that a fresh one has there."""
    if isinstance(value, tuple) and isinstance(fresh, tuple):
        return len(value) == len(fresh) and all(map(_alike, value, fresh))
    if isinstance(fresh, Tensor):
        return isinstance(value, Tensor) and value.shape == fresh.shape
    return isinstance(value, type(fresh))


def _tensor(value: Any, shape: torch.Size | None) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()


def _count(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def description(rule: Rule[Any]) -> dict[str, Any]:
    """Return a rule as plain values: its name and fields."""
    fields = {key: value.item() if hasattr(value, "item") else value for key, value in asdict(rule).items()}  # NumPy's numbers
    return {"name": type(rule).__name__, **fields}
