"""Which parameters are protected, under which names, and how their tensors follow a model that grows."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rwalk._errors import explain
from rwalk.parallel import ALONE, Spread, inner, local, settle, sharded


def listed(names: Sequence[str]) -> str:
    """Write names for a message, the first five of them."""
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def bare(model: nn.Module) -> nn.Module:
    """Return the user's own module behind `torch.compile` and distributed wrappers."""
    while (within := inner(model)) is not None:
        model = within
    return model


def once_built(model: nn.Module, then: Callable[[], None]) -> None:
    """Call a function once a model that is being copied or unpickled is there: now, or when its last module takes its state."""
    waiting = _unbuilt(model)
    if waiting is None:
        then()
        return
    build: Callable[[Any], None] = waiting.__setstate__

    def built(state: Any) -> None:
        build(state)
        vars(waiting).pop("__setstate__", None)
        once_built(model, then)

    vars(waiting)["__setstate__"] = built  # which copies and pickles look for on the object itself


def _unbuilt(model: nn.Module) -> nn.Module | None:
    """Return a module of a model that has no state yet, as while something that it holds is copied; None if all have."""
    if "_modules" not in vars(model):
        return model
    return next((m for child in model._modules.values() if child is not None and (m := _unbuilt(child)) is not None), None)


def named(model: nn.Module, only: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """Map the names of a model's parameters, as they are without compilation, to the parameters; tied ones appear once."""
    settle(model)
    found = {name.replace("_orig_mod.", ""): p for name, p in bare(model).named_parameters()}
    return found if only is None else {name: p for name, p in found.items() if name in only}


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    """List the parameters of an optimiser in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_odd(theta: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for parameters that are complex, or were made in inference mode."""
    odd = [name for name, p in theta.items() if p.is_complex()]
    if odd:
        raise ValueError(explain(f"complex parameters {listed(odd)}", "real parameters", "Hold their parts as real tensors."))
    fixed = [name for name, p in theta.items() if p.is_inference()]
    if fixed:
        came = f"parameters {listed(fixed)} that were made in `torch.inference_mode()`"
        raise ValueError(explain(came, "parameters that can be trained", "Build the model outside of it."))


def refuse_uninitialised(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for parameters that have no shape yet."""
    lazy = [name for name, p in parameters.items() if is_lazy(p)]
    if lazy:
        came = f"parameters {listed(lazy)} of a lazy module that was not run yet"
        raise ValueError(explain(came, "parameters that have their shape", "Run the model once on a batch before."))


def state_dtype(theta: Tensor) -> torch.dtype:
    """Return the precision of state: that of the parameter, float32 at the least."""
    return torch.promote_types(theta.dtype, torch.float32)


def zero(theta: Tensor) -> Tensor:
    """Make zero state beside a parameter: its shape, device and memory order."""
    return torch.zeros_like(theta, dtype=state_dtype(theta), requires_grad=False)


def copy(theta: Tensor) -> Tensor:
    """Copy a parameter into state precision."""
    return theta.detach().to(state_dtype(theta), copy=True)


def zeros(theta: Sequence[Tensor]) -> list[Tensor]:
    """Make zero state beside parameters."""
    return [zero(t) for t in theta]


def copies(theta: Sequence[Tensor]) -> list[Tensor]:
    """Copy parameters into state precision."""
    return [copy(t) for t in theta]


def grown(old: torch.Size, new: torch.Size) -> bool:
    """Tell whether a tensor of shape `old` can be the leading block of one of shape `new`."""
    return len(old) == len(new) and all(a <= b for a, b in zip(old, new, strict=True))


def carry(old: Tensor | None, now: Tensor, fresh: Callable[[Tensor], Tensor]) -> Tensor:
    """Carry state over to a parameter as it is now: as it was, or as the leading block of fresh state where `now` is larger.

    Args:
        old: state of the parameter as it was, None if there is none to keep.
        now: the parameter, of the same shape or grown.
        fresh: makes state for all of a parameter.
    """
    if old is not None and old.shape == now.shape:
        return old.to(now.device, state_dtype(now))
    whole = fresh(now)
    if old is not None:
        whole[tuple(slice(n) for n in old.shape)] = old
    return whole


def trainable(model: nn.Module) -> list[str]:
    """List the names of the parameters that require gradients."""
    return [name for name, p in named(model).items() if p.requires_grad]


@dataclass(frozen=True, eq=False)
class Watch:
    """What is protected: the parameters of a model that an optimiser moves, and those that it or another one moved before.

    Args:
        parameters: the protected parameters by name.
        theta: of each of them the part that this rank holds: the parameter itself, unless it is sharded.
        spread: the ranks that hold the other parts.
        inside: the names of those that the optimiser holds now.
        shapes: the shapes of `theta` at the time of the look.
        fingerprint: what the optimiser held at the time of the look.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    theta: dict[str, Tensor] = field(default_factory=dict)
    spread: Spread = ALONE
    inside: frozenset[str] = frozenset()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    fingerprint: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter], **more: Any) -> "Watch":
        """Watch parameters by name."""
        refuse_uninitialised(parameters)
        theta = {name: local(p) for name, p in parameters.items()}
        shapes = {name: p.shape for name, p in theta.items()}
        return cls(parameters, theta, Spread.of(parameters.values()), shapes=shapes, **more)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the parameters that the optimiser is about to move, or this rank's parts of them."""
        found = {name: g for name, p in self.parameters.items() if name in self.inside and (g := p.grad) is not None}
        return {name: local(grad) for name, grad in found.items()} if self.spread.groups else found

    def own_gradients(self) -> dict[str, Tensor]:
        """Give each parameter a gradient of its own, and return them: the pull is different for each element."""
        for p in self.parameters.values():
            if p.grad is not None and not sharded(p):
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
        return self.gradients()

    def ascends(self, optimizer: Optimizer) -> list[bool] | None:
        """Tell for each parameter whether the optimiser maximises along its gradient; None if it does nowhere."""
        up = [group for group in optimizer.param_groups if group.get("maximize")]
        if not up:
            return None
        ids = {id(p) for group in up for p in group["params"]}
        return [id(p) in ids for p in self.parameters.values()]

    def stale(self, optimizer: Optimizer) -> bool:
        """Tell whether parameters joined the optimiser, were frozen, thawed, moved or grew since the look, or others grew."""
        return _fingerprint(held(optimizer), self.parameters, self.inside) != self.fingerprint

    def same(self, other: "Watch") -> bool:
        """Tell whether another look found the same parameters, of the same shapes."""
        return self.shapes == other.shapes and all(p is other.parameters[name] for name, p in self.parameters.items())

    def blocks(self) -> list[Tensor | None]:
        """Return the parameters as they were at the look: the leading block of those that grew, None for those that shrank."""
        return [
            t if t.shape == old else t.detach()[tuple(slice(n) for n in old)] if grown(old, t.shape) else None
            for t, old in zip(self.theta.values(), self.shapes.values(), strict=True)
        ]

    def lost(self, other: "Watch") -> list[str]:
        """List the names whose history cannot be carried over to `other`: gone, or no longer the leading block."""
        return [n for n, old in self.shapes.items() if n not in other.shapes or not grown(old, other.shapes[n])]

    def replaced(self, other: "Watch") -> list[str]:
        """List the names under which another parameter has come, with other values."""
        both = [n for n, p in self.parameters.items() if n in other.parameters and p is not other.parameters[n]]
        kept = [n for n in both if grown(self.theta[n].shape, other.theta[n].shape)]
        return [n for n in kept if not _continues(self.theta[n], other.theta[n])]


def shares_memory(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one place in memory is an element of several tensors, or several elements of one, as after `expand`."""
    tensors = [t for t in tensors if t.numel()]
    if any(not t.is_contiguous() and 0 in t.stride() for t in tensors):
        return True
    return len({t.data_ptr() for t in tensors}) < len(tensors)


def _continues(old: Tensor, new: Tensor) -> bool:
    """Tell whether a tensor holds the values of another one in its leading block, in its own precision or that of the other."""
    old, new = old.detach(), new.detach()[tuple(slice(n) for n in old.shape)].to(old.device)
    return torch.equal(new.to(old.dtype), old) or torch.equal(old.to(new.dtype), new)


def _fingerprint(held: list[nn.Parameter], parameters: Mapping[str, nn.Parameter], inside: Collection[str]) -> list[Any]:
    """Describe what an optimiser holds, and what is protected beside it."""
    everything = [*held, *[p for name, p in parameters.items() if name not in inside]]
    return [(id(p), p.shape, p.dtype, p.device, p.requires_grad, _place(p)) for p in everything]


def _place(parameter: Tensor) -> int | None:
    """Return where this rank's part of a DTensor lies; None for anything else."""
    return None if type(parameter) is nn.Parameter or not sharded(parameter) else local(parameter).data_ptr()


def look(model: nn.Module, optimizer: Optimizer, known: Collection[str] = ()) -> Watch:
    """Find the parameters to protect: those of the model that the optimiser trains, and those of names already `known`."""
    now = held(optimizer)
    ids, trained = {id(p) for p in now}, {id(p) for p in now if p.requires_grad}
    parameters = {name: p for name, p in named(model).items() if name in known or id(p) in trained}
    refuse_uninitialised(parameters)
    inside = frozenset(name for name, p in parameters.items() if id(p) in ids)
    return Watch.of(parameters, inside=inside, fingerprint=_fingerprint(now, parameters, inside))


def regraft(
    state: Any,
    names: Sequence[str],
    known: Mapping[str, torch.Size],
    theta: Mapping[str, Tensor],
    init: Callable[[list[Tensor]], Any],
) -> Any:
    """Carry a rule's state over to other parameters.

    Args:
        state: the rule's state, a named tuple whose list fields run parallel to `names`.
        names: the names that `state` is about.
        known: shapes of the entries whose history counts, by name.
        theta: the parameters to be about from now on, by name; a known one is as large as before or larger.
        init: the rule's `init`, called for those that are new or grew.

    Returns:
        The state with every known entry kept, leading blocks of grown tensors kept, and newcomers at their initial state.
    """
    fresh_names = [name for name, now in theta.items() if known.get(name) != now.shape]
    fresh = init([theta[name].detach() for name in fresh_names])
    old_place, new_place = ({name: i for i, name in enumerate(ns)} for ns in (names, fresh_names))

    def entry(old: list[Any], new: list[Any], name: str) -> Any:
        if name not in known:
            return new[new_place[name]]
        kept, now = old[old_place[name]], theta[name]
        if not isinstance(kept, Tensor):
            return kept

        start = new[new_place[name]] if name in new_place else None
        return carry(kept, now, zero if start is None else lambda _: start)

    def column(old: Any, new: Any) -> Any:
        return [entry(old, new, name) for name in theta] if isinstance(old, list) else old

    return type(state)(*(column(old, new) for old, new in zip(state, fresh, strict=True)))
