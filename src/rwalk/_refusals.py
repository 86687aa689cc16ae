"""What the consolidator refuses, and how it says so: always before anything is changed."""

from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from rwalk._errors import explain
from rwalk.anchor import Anchor, KroneckerAnchor, Match, damaged_layers
from rwalk.importance.base import Importance, no_data, number
from rwalk.parallel import layout, sharded
from rwalk.parameters import Watch, listed, refuse_uninitialised
from rwalk.repeats import Ended

FORMAT = 2
"""Version of the layout of `Consolidator.state_dict`."""
GROUPS = (("shapes",), ("state",), ("anchor", "point"), ("anchor", "omega"), ("tail", "average"), ("tail", "count"))
"""The dictionaries of that layout."""


STRONGEST = 1e30
"""The largest strength: beyond it products overflow in float32, and holds no harder."""


def check_strength(value: float) -> float:
    """Return a strength as a float, or raise a ValueError if it is not from 0 to `STRONGEST`."""
    plain = number(value)
    if plain is None or not 0 <= plain <= STRONGEST:
        raise ValueError(explain(f"strength {value!r}", f"a number from 0 to {STRONGEST:g}", "Pass such a `strength`."))
    return float(plain)


def refuse_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(explain(f"{name}={value!r}", f"one of {', '.join(allowed)}", f"Pass such a `{name}`."))


def refuse_rule(rule: Any) -> None:
    """Refuse what is neither a rule nor None."""
    if rule is not None and not isinstance(rule, Importance):
        came = f"the class `{rule.__name__}`" if isinstance(rule, type) else f"a rule of type `{type(rule).__name__}`"
        raise TypeError(explain(came, "a rule such as `RWalk()`", "Pass an instance of a rule."))


def refuse_model(model: Any) -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(explain(f"a `{type(model).__name__}` as model", "a `torch.nn.Module`", "Pass the model first."))


def refuse_gradient_pull(rule: Importance[Any] | None, pull: str) -> None:
    """Refuse the gradient pull for a rule that holds whole layers: it would take four matrix products a layer at every step."""
    if rule is not None and rule.layered and pull == "gradient":
        raise ValueError(
            explain(
                f'pull="gradient" under {type(rule).__name__}, which holds whole layers',
                "the proximal pull, which is made every few steps",
                "Leave `pull` out.",
            )
        )


def refuse_shards(rule: Importance[Any], watch: Watch) -> None:
    """Refuse shards under a rule that holds whole layers."""
    if rule.layered and watch.spread.groups:
        raise ValueError(
            explain(
                f"a sharded model under {type(rule).__name__}, which turns whole layers",
                "parameters that each rank holds whole",
                "Use DistributedDataParallel, or a rule that works on each weight alone, such as `EWC()`.",
            )
        )


def refuse_anchor(anchor: Anchor, rule: Importance[Any]) -> None:
    """Refuse an anchor with importances that are negative, not finite or not of their point's shape, or of another geometry."""
    if isinstance(anchor, KroneckerAnchor) and not rule.layered:
        raise ValueError(
            explain(
                f"a `KroneckerAnchor` for {type(rule).__name__}, which holds each weight alone",
                "an anchor of points and importances",
                "Build the consolidator with `Kronecker()`.",
            )
        )
    wrong = damaged_layers(anchor.content())
    if wrong:
        raise ValueError(
            explain(f"an anchor whose layers do not fit: {listed(wrong)}", "those it was saved with", "Correct it.")
        )
    for name, point in anchor.point.items():
        omega = anchor.omega.get(name)
        if omega is None or omega.shape != point.shape or not bool((torch.isfinite(omega) & (omega >= 0)).all()):
            raise ValueError(
                explain(
                    f"an anchor whose importance of `{name}` is missing, negative, not finite or of another shape",
                    "a weight of 0 or more for each element of its point",
                    "Correct `anchor.omega`.",
                )
            )


def refuse_data(data: Any) -> None:
    """Refuse what looks like data but yields no batches: a data set, or bare tensors."""
    tensors = isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    if tensors or isinstance(data, Tensor | Dataset):
        raise TypeError(
            explain(
                "a tuple of tensors as data" if tensors else f"a `{type(data).__name__}` as data",
                "something that yields batches `(inputs, labels)`",
                "Pass a DataLoader, or a list of batches such as `[(x, y)]`.",
            )
        )


def refuse_kind(optimizer: Any) -> None:
    """Refuse what is not an optimiser."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            explain(f"a `{type(optimizer).__name__}`", "a `torch.optim.Optimizer`", "Pass the optimiser that trains the model.")
        )


def refuse_attachment(twice: bool, steps: int) -> None:
    """Refuse a second consolidator on an optimiser, and another optimiser `steps` steps into a task."""
    if twice:
        raise RuntimeError(
            explain(
                "`attach` on an optimiser that is attached already",
                "one consolidator for a model and optimiser, attached once",
                "Call `detach()` on the consolidator that watches it first, or leave this call out.",
            )
        )
    if steps:
        raise RuntimeError(
            explain(
                f"`attach` to another optimiser {steps} steps into a task",
                "a finished task",
                "Call `consolidate()` first, or `detach()` to go on with this task under the new optimiser.",
            )
        )


def refuse_consolidation(rule: Importance[Any], data: Any, early: bool) -> None:
    """Refuse to end a task without the data that a rule measures on, or before `attach` under any other rule."""
    refuse_data(data)
    if rule.measures == "data" and data is None:
        no_data("true", torch.square)
    if early and rule.measures != "data":
        raise RuntimeError(
            explain(
                "`consolidate()` before `attach`",
                "a consolidator that has watched an optimiser",
                "Call `attach(optimizer)` before training; to protect a pretrained model use EWC() and `estimate(loader)`.",
            )
        )


def refuse_estimate(rule: Importance[Any], steps: int) -> None:
    """Refuse `estimate` for rules that measure during training, and in the middle of a task."""
    if rule.measures == "steps":
        raise RuntimeError(
            explain(
                f"`estimate` under {type(rule).__name__}, which measures during training",
                "a rule that measures on data",
                "Protect a pretrained model with EWC() or MAS() and a loader, or with L2().",
            )
        )
    if steps:
        raise RuntimeError(
            explain(f"`estimate` {steps} steps into a task", "a model before training", "Call `consolidate` to end the task.")
        )


def refuse_mismatch(match: Match) -> None:
    """Refuse an anchor of which nothing fits the model."""
    if not match.same and not match.grown:
        raise ValueError(
            explain(
                f"an anchor that fits nothing of the model: {match}",
                "parameters of the same names, as large or larger",
                "Pass `rename`, from the anchor's names to the model's.",
            )
        )


def refuse_nothing(watch: Watch) -> None:
    """Refuse an optimiser that moves no parameter of the model."""
    if not watch.inside:
        raise ValueError(
            explain(
                "an optimiser that holds none of the model's trainable parameters",
                "at least one in common",
                "Build the optimiser from `model.parameters()` of the model that was given to the consolidator.",
            )
        )


def refuse_change_of_spread(old: Watch, new: Watch) -> None:
    """Refuse parameters that were cut into shards, or cut otherwise, while there is state beside them; also grown shards."""
    both = [(name, p, new.parameters[name]) for name, p in old.parameters.items() if name in new.parameters]
    changed = [name for name, p, q in both if (sharded(p) or sharded(q)) and layout(p) != layout(q)]
    if changed:
        raise RuntimeError(
            explain(
                f"parameters {listed(changed)} that were sharded anew, or grew in shards, under a consolidator",
                "shards that stay as they are",
                "Call `fully_shard` before `attach`; to go on with what was learned, `save` it before, `load` it into a new "
                "consolidator of the plain model as it was, let that grow, and `load` once more what that one saves.",
            )
        )


def refuse_sparse(grad: Mapping[str, Tensor]) -> None:
    """Refuse sparse gradients."""
    sparse = [name for name, g in grad.items() if g.layout is not torch.strided]
    if sparse:
        raise RuntimeError(
            explain(f"sparse gradients for {listed(sparse)}", "dense gradients", "Build the embedding with `sparse=False`.")
        )


def refuse_state(
    state_dict: Mapping[str, Any], rule: Importance[Any], average: str, parameters: Mapping[str, Tensor], state: Any
) -> None:
    """Raise a ValueError that names the first difference between a state and the rule and model it is to be loaded for.

    Args:
        state_dict: the state that came.
        rule: the rule that it is to be loaded for.
        average: the averaging that it is to be loaded for.
        parameters: those of the model that it is to be loaded for.
        state: a state of the rule, whose fields show what the one to be loaded has to look like.
    """
    try:
        _refuse_origin(state_dict, rule, average)
        damaged = [key for key in ("shapes", "state", "anchor", "tail") if not isinstance(state_dict[key], Mapping)]
        if not damaged:
            _refuse_model(state_dict["shapes"], parameters)
            damaged = _damage(state_dict, rule, state)
            check_strength(state_dict["strength"])
    except (ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        damaged = [f"{type(error).__name__} {error}"]
    if damaged:
        raise ValueError(
            explain(
                f"a damaged state: {listed(damaged)} is missing, left over or of another kind or shape",
                "one tensor for each protected parameter, and whole numbers of tasks and steps",
                "Pass what `Consolidator.state_dict()` returned, unchanged.",
            )
        )


def _refuse_origin(state_dict: Mapping[str, Any], rule: Importance[Any], average: str) -> None:
    """Refuse a state of another format, averaging or rule."""
    came = state_dict.get("format") if isinstance(state_dict, Mapping) else f"of type {type(state_dict).__name__}"
    if came != FORMAT:
        raise ValueError(
            explain(
                f"a state of format {came}",
                f"format {FORMAT}",
                "Pass what `Consolidator.state_dict()` of this version returned.",
            )
        )
    for key, mine in (("rule", description(rule)), ("average", average)):
        if state_dict[key] != mine:
            raise ValueError(
                explain(
                    f"a state with {key} {state_dict[key]}", f"{key} {mine}", f"Build the consolidator with the same {key}."
                )
            )


def _refuse_model(shapes: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a state of another model."""
    refuse_uninitialised({name: parameters[name] for name in shapes if name in parameters})
    unlike = [n for n, shape in shapes.items() if n not in parameters or list(parameters[n].shape) != list(shape)]
    if unlike:
        raise ValueError(
            explain(
                f"a state of another model: {listed(unlike)} is missing here or has another shape",
                "a model whose parameters have the same names and shapes",
                "Load into the model as it was when saved, and let it grow afterwards.",
            )
        )


def _damage(state_dict: Mapping[str, Any], rule: Importance[Any], state: Any) -> list[str]:
    """List the parts of a state that are missing, left over, or of another kind or shape than they should be."""
    shapes = {name: torch.Size(shape) for name, shape in state_dict["shapes"].items()}
    kept, fresh, one = state_dict["state"], state._asdict(), rule.init([torch.zeros(1)])._asdict()
    wrong = sorted(map(str, set(fresh) ^ set(kept)))
    for key in set(fresh) & set(kept):
        empty = "None" in str(type(state).__annotations__.get(key))  # where an entry may be missing, its type says so
        fits = _fits(kept[key], shapes, one[key][0], empty) if isinstance(fresh[key], list) else _alike(kept[key], fresh[key])
        wrong += [] if fits else [key]
    point, omega = state_dict["anchor"]["point"], state_dict["anchor"]["omega"]
    wrong += [
        n for n, t in (*point.items(), *omega.items()) if n not in point or n not in omega or not _tensor(t, shapes.get(n))
    ]
    wrong += damaged_layers(state_dict["anchor"])
    wrong += ["layers"] if "layers" in state_dict["anchor"] and not rule.layered else []
    average, count = state_dict["tail"]["average"], state_dict["tail"]["count"]
    wrong += [key for key in ("average", "count") if not isinstance(state_dict["tail"][key], Mapping)]
    wrong += [n for n in {*average, *count} if not (_tensor(average.get(n), shapes.get(n)) and _whole(count.get(n)))]
    wrong += [key for key in ("tasks", "steps") if not _whole(state_dict[key])]
    wrong += [] if type(state_dict["written"]) is str else ["written"]
    wrong += [] if state_dict["ended"] == "" or Ended.readable(state_dict["ended"]) else ["ended"]
    return wrong


def _fits(column: Any, shapes: Mapping[str, torch.Size], fresh: Any, empty: bool) -> bool:
    """Tell whether a column has for each parameter a number, if a fresh one has, or else a tensor of its shape or nothing."""
    if not isinstance(column, list) or len(column) != len(shapes):
        return False
    if isinstance(fresh, Real):
        return all(isinstance(value, Real) for value in column)
    return all((empty and value is None) or _tensor(value, shape) for value, shape in zip(column, shapes.values(), strict=True))


def _alike(value: Any, fresh: Any) -> bool:
    """Tell whether a plain value of a state is of the kind that a fresh one has there."""
    if isinstance(value, tuple) and isinstance(fresh, tuple):
        return len(value) == len(fresh) and all(map(_alike, value, fresh))
    if isinstance(fresh, Tensor):
        return isinstance(value, Tensor) and value.shape == fresh.shape
    return isinstance(value, type(fresh))


def _tensor(value: Any, shape: torch.Size | None) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def description(rule: Importance[Any]) -> dict[str, Any]:
    """Return a rule as plain values: its name and fields."""
    fields = {key: value.item() if hasattr(value, "item") else value for key, value in asdict(rule).items()}  # NumPy's numbers
    return {"name": type(rule).__name__, **fields}
