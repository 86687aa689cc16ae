"""The consolidator binds a model, a rule and an anchor to any training loop that calls `optimizer.step()`."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rwalk._errors import explain
from rwalk.anchor import Anchor
from rwalk.importance.base import Finish, Importance, Step
from rwalk.parameters import Watch, look, named, regraft

FORMAT = 1
"""Version of the layout of `Consolidator.state_dict`."""


class Consolidator:
    """Hold a model to what earlier tasks need, in a training loop that stays as it is.

    Args:
        model: the network; parameters that the attached optimiser holds and that require gradients are protected.
        rule: how importance is measured, for example `RWalk()`.
        strength: factor of the penalty strength * sum of omega * (theta - point)^2, which has no half; at least 0.

    Attributes:
        anchor: what earlier tasks left behind: `anchor.point` and `anchor.omega` map parameter names to tensors.
        tasks: how many tasks have been consolidated.
    """

    def __init__(self, model: nn.Module, rule: Importance[Any], strength: float = 1.0) -> None:
        if not isinstance(rule, Importance):
            came = f"the class `{rule.__name__}`" if isinstance(rule, type) else f"a rule of type `{type(rule).__name__}`"
            raise TypeError(explain(came, "a rule such as `RWalk()`", "Pass an instance of a rule as second argument."))
        self.model = model
        self.rule = rule
        self.strength = strength
        self.anchor = Anchor()
        self.tasks = 0
        self._steps = 0
        self._watch = Watch()
        self._state: Any = rule.init([])
        self._optimizer: Optimizer | None = None
        self._handle: RemovableHandle | None = None

    def __repr__(self) -> str:
        """Show the configuration and how far the work has come."""
        return f"Consolidator({self.rule}, strength={self.strength}, tasks={self.tasks}, tensors={len(self._watch.theta)})"

    @property
    def strength(self) -> float:
        """Factor of the penalty; may be changed at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = check_strength(value)

    def attach(self, optimizer: Optimizer) -> "Consolidator":
        """Watch an optimiser from now on, and pull on its gradients once there is an anchor.

        Between tasks, attaching to another optimiser replaces the one before. Returns the consolidator itself.

        Raises:
            TypeError: if `optimizer` is not a `torch.optim.Optimizer`.
            RuntimeError: if a consolidator watches the optimiser already, or a task under another one is unfinished.
            ValueError: if the optimiser holds none of the model's trainable parameters.
        """
        self._refuse_optimizer(optimizer)
        watch = look(self.model, optimizer, self._watch.theta)
        _refuse_nothing(watch)
        self.detach()
        self._follow(watch)
        self._optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        return self

    def detach(self) -> None:
        """Stop watching; what was learned stays, and `attach` continues from there."""
        if self._handle is not None:
            self._handle.remove()
        self._optimizer = self._handle = None

    @torch.no_grad()
    def consolidate(self) -> None:
        """End a task: turn what was observed into importance, and hold to the weights as they are now.

        Raises:
            RuntimeError: if the consolidator was never attached to an optimiser.
        """
        if not self._watch.theta:
            raise RuntimeError(
                explain(
                    "`consolidate()` before `attach`",
                    "a consolidator that has watched an optimiser",
                    "Call `attach(optimizer)` before training.",
                )
            )
        self.anchor, self._state = self.rule.conclude(self._state, Finish(self._watch.theta, self.anchor))
        self.tasks += 1
        self._steps = 0

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Return the current penalty, strength * sum of omega * (theta - point)^2, as a scalar for logging."""
        return torch.as_tensor(self.strength * self.anchor.penalty(self._watch.theta))

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for rule and anchor."""
        columns = [*self._state, list(self.anchor.point.values()), list(self.anchor.omega.values())]
        tensors = [t for column in columns if isinstance(column, list) for t in column if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue, mid-task included, as plain tensors and numbers, copied."""
        return {
            "format": FORMAT,
            "rule": _description(self.rule),
            "strength": self.strength,
            "tasks": self.tasks,
            "steps": self._steps,
            "shapes": {name: list(shape) for name, shape in self._watch.shapes.items()},
            "state": {key: _copied(value) for key, value in self._state._asdict().items()},
            "anchor": {"point": _copied(self.anchor.point), "omega": _copied(self.anchor.omega)},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same model and rule; on an error nothing changes.

        Raises:
            ValueError: if the state is of another format, rule or model; the message names the difference.
        """
        parameters = named(self.model)
        _refuse_state(state_dict, self.rule, parameters)
        _refuse_tensors(state_dict, self._state._fields)
        theta = {name: parameters[name] for name in state_dict["shapes"]}
        shapes = {name: p.shape for name, p in theta.items()}
        state = type(self._state)(**{key: _copied(value) for key, value in state_dict["state"].items()})
        state = regraft(state, list(shapes), shapes, theta, self.rule.init)
        anchor = Anchor(**_copied(dict(state_dict["anchor"]))).align(theta)
        self.strength = state_dict["strength"]  # refuses what is out of range, so it comes first
        self.tasks, self._steps = state_dict["tasks"], state_dict["steps"]
        self._state, self.anchor, self._watch = state, anchor, Watch(theta, shapes=shapes)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Observe the step that the optimiser is about to take, then add the pull to its gradients."""
        _refuse_closure(args, kwargs)
        if self._watch.stale(optimizer):
            self._follow(look(self.model, optimizer, self._watch.theta))
        theta, inside = self._watch.theta, self._watch.inside
        grad = {name: p.grad for name, p in theta.items() if name in inside and p.grad is not None}
        _refuse_sparse(grad)
        if not grad:
            return
        self._state = self.rule.observe(self._state, Step(list(theta.values()), [grad.get(name) for name in theta]))
        self._steps += 1
        if self.strength and len(self.anchor):
            self.anchor.pull(theta, grad, self.strength)

    def _follow(self, watch: Watch) -> None:
        """Carry state and anchor over to the parameters of a new look."""
        lost = self._watch.lost(watch)
        if lost:
            warnings.warn(
                explain(
                    f"a model in which {_listed(lost)} went away or became smaller",
                    "parameters that stay or grow",
                    "Their history is dropped; give a new module a new name if it has nothing to do with the old one.",
                ),
                stacklevel=4,
            )
        known = {name: shape for name, shape in self._watch.shapes.items() if name not in lost}
        self._state = regraft(self._state, list(self._watch.shapes), known, watch.theta, self.rule.init)
        self.anchor = self.anchor.align({name: p for name, p in watch.theta.items() if name in known})
        self._watch = watch

    def _refuse_optimizer(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                explain(
                    f"a `{type(optimizer).__name__}`", "a `torch.optim.Optimizer`", "Pass the optimiser that trains the model."
                )
            )
        others = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
        if any(isinstance(o, Consolidator) and (o is self or o.model is self.model) for o in others):
            raise RuntimeError(
                explain(
                    "`attach` on an optimiser that is attached already",
                    "one consolidator for a model and optimiser, attached once",
                    "Call `detach()` on the consolidator that watches it first, or leave this call out.",
                )
            )
        if self._optimizer is not None and self._steps:
            raise RuntimeError(
                explain(
                    f"`attach` to another optimiser {self._steps} steps into a task",
                    "a finished task",
                    "Call `consolidate()` first, or `detach()` to go on with this task under the new optimiser.",
                )
            )


def check_strength(value: float) -> float:
    """Return a strength as a float, or raise a ValueError if it is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(explain(f"strength {value}", "a finite number, 0 or more", "Pass such a `strength`."))
    return float(value)


def _refuse_nothing(watch: Watch) -> None:
    if not watch.inside:
        raise ValueError(
            explain(
                "an optimiser that holds none of the model's trainable parameters",
                "at least one in common",
                "Build the optimiser from `model.parameters()` of the model that was given to the consolidator.",
            )
        )


def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("closure") is not None or any(arg is not None for arg in args[1:]):
        raise RuntimeError(
            explain(
                "`optimizer.step(closure)`",
                "gradients that are ready when `step` is called",
                "Call `loss.backward()` first and then `optimizer.step()` without arguments.",
            )
        )


def _refuse_sparse(grad: Mapping[str, Tensor]) -> None:
    sparse = [name for name, g in grad.items() if g.layout is not torch.strided]
    if sparse:
        raise RuntimeError(
            explain(f"sparse gradients for {_listed(sparse)}", "dense gradients", "Build the embedding with `sparse=False`.")
        )


def _refuse_state(state_dict: Mapping[str, Any], rule: Importance[Any], parameters: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first difference between a state and the rule and model it is to be loaded for."""
    came = state_dict.get("format") if isinstance(state_dict, Mapping) else None
    keys = {"rule", "strength", "tasks", "steps", "shapes", "state", "anchor"}
    if came != FORMAT or not keys <= set(state_dict):
        raise ValueError(
            explain(
                f"a state of format {came}",
                f"format {FORMAT}",
                "Pass what `Consolidator.state_dict()` of this version returned.",
            )
        )
    if state_dict["rule"] != _description(rule):
        raise ValueError(
            explain(
                f"a state of the rule {state_dict['rule']}",
                f"{_description(rule)}",
                "Build the consolidator with the same rule.",
            )
        )
    shapes = state_dict["shapes"]
    unlike = [n for n, shape in shapes.items() if n not in parameters or list(parameters[n].shape) != list(shape)]
    if unlike:
        raise ValueError(
            explain(
                f"a state of another model: {_listed(unlike)} is missing here or has another shape",
                "a model whose parameters have the same names and shapes",
                "Load into the model as it was when saved, and let it grow afterwards.",
            )
        )


def _refuse_tensors(state_dict: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    """Raise a ValueError unless every tensor of a state has a name, the shape of its parameter and a place in the rule."""
    shapes = {name: torch.Size(shape) for name, shape in state_dict["shapes"].items()}
    columns = {key: value for key, value in state_dict["state"].items() if isinstance(value, list)}
    unlike = [
        key
        for key, column in columns.items()
        if len(column) != len(shapes)
        or any(isinstance(t, Tensor) and t.shape != shape for t, shape in zip(column, shapes.values(), strict=True))
    ]
    point, omega = state_dict["anchor"]["point"], state_dict["anchor"]["omega"]
    unlike += [n for n, t in (*point.items(), *omega.items()) if n not in point or n not in omega or t.shape != shapes.get(n)]
    unlike += sorted(set(fields) ^ set(state_dict["state"]))
    if unlike:
        raise ValueError(
            explain(
                f"a damaged state: {_listed(unlike)} is missing, left over or of the wrong shape",
                "one tensor for each protected parameter",
                "Pass what `Consolidator.state_dict()` returned, unchanged.",
            )
        )


def _description(rule: Importance[Any]) -> dict[str, Any]:
    return {"name": type(rule).__name__, **asdict(rule)}


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _copied(value: Any) -> Any:
    """Copy the tensors in lists and dictionaries; pass plain values on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
