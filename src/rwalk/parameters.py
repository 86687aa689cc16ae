"""Which parameters are protected, under which names, and how their tensors follow a model that grows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwalk._errors import explain
from rwalk.parallel import ALONE, Spread, inner, local, settle, sharded


def bare(model: nn.Module) -> nn.Module:
    """Return the user's own module behind `torch.compile` and distributed wrappers."""
    while (within := inner(model)) is not None:
        model = within
    return model


def named(model: nn.Module, only: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """Map the names of a model's parameters, as they are without compilation, to the parameters; tied ones appear once."""
    settle(model)
    found = {name.replace("_orig_mod.", ""): p for name, p in bare(model).named_parameters()}
    return found if only is None else {name: p for name, p in found.items() if name in only}


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    """List the parameters of an optimiser in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_complex(theta: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for complex parameters: squares of their gradients are no importance."""
    odd = [f"`{name}`" for name, p in theta.items() if p.is_complex()]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        came = f"complex parameters {', '.join(odd[:5])}{more}"
        raise ValueError(explain(came, "real parameters", "Hold their parts as real tensors."))


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
        theta = {name: local(p) for name, p in parameters.items()}
        shapes = {name: p.shape for name, p in theta.items()}
        return cls(parameters, theta, Spread.of(parameters.values()), shapes=shapes, **more)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the parameters that the optimiser is about to move, or this rank's parts of them."""
        found = {name: g for name, p in self.parameters.items() if name in self.inside and (g := p.grad) is not None}
        return {name: local(grad) for name, grad in found.items()} if self.spread.groups else found

    def stale(self, optimizer: Optimizer) -> bool:
        """Tell whether parameters joined the optimiser, were frozen, thawed, moved or grew since the look, or others grew."""
        return _fingerprint(held(optimizer), self.parameters, self.inside) != self.fingerprint

    def same(self, other: "Watch") -> bool:
        """Tell whether another look found the same parameters, of the same shapes."""
        return self.shapes == other.shapes and all(p is other.parameters[name] for name, p in self.parameters.items())

    def lost(self, other: "Watch") -> list[str]:
        """List the names whose history cannot be carried over to `other`: gone, or no longer the leading block."""
        return [n for n, old in self.shapes.items() if n not in other.shapes or not grown(old, other.shapes[n])]


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
