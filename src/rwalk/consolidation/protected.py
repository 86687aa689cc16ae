"""Which parameters are protected, and how state follows a model that grows."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwalk import kernels
from rwalk._parameters import grow_tensor, grown, listed, named_parameters, refuse_uninitialised, zero
from rwalk.consolidation.scope import Scope
from rwalk.distributed.shards import ALONE, ShardGroup, layout, local, sharded


@dataclass(frozen=True, eq=False)
class ProtectedParameters:
    """What is protected: the parameters of a model that an optimiser moves, and those that it or another one moved before.

    Args:
        parameters: the protected parameters by name.
        theta: of each of them the part that this rank holds: the parameter itself, unless it is sharded.
        shard_group: the ranks that hold the other parts.
        in_optimizer: the names of those that the optimiser holds now.
        shapes: the shapes of `theta` when it was looked at.
        looked_at: the parameters that the optimiser held when it was looked at.
        fingerprint: what they were like.
        frozen: those that the optimiser holds and that did not require gradients then.
        beside: what the optimiser moves beside the protected parameters, by name.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    theta: dict[str, Tensor] = field(default_factory=dict)
    shard_group: ShardGroup = ALONE
    in_optimizer: frozenset[str] = frozenset()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    looked_at: list[Tensor] = field(default_factory=list)
    fingerprint: Any = None
    frozen: list[Tensor] = field(default_factory=list)
    beside: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def on_cpu(self) -> bool:
        """Whether all of them lie in the host's memory."""
        return all(t.is_cpu for t in self.theta.values())

    @cached_property
    def held(self) -> list[bool]:
        """Tell for each parameter whether the optimiser holds it."""
        return [name in self.in_optimizer for name in self.parameters]

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter], **more: Any) -> "ProtectedParameters":
        """Protect parameters by name."""
        refuse_uninitialised(parameters)
        theta = {name: local(p) for name, p in parameters.items()}
        shapes = {name: p.shape for name, p in theta.items()}
        return cls(parameters, theta, ShardGroup.of(parameters.values()), shapes=shapes, **more)

    def gradients(self) -> kernels.StepGradients:
        """Return the gradients of the parameters that the optimiser is about to move, or this rank's parts of them."""
        if all(self.held):
            found = [p.grad for p in self.parameters.values()]
        else:
            found = [p.grad if held else None for p, held in zip(self.parameters.values(), self.held, strict=True)]
        if self.shard_group.groups:
            found = [g if g is None else local(g) for g in found]
        return kernels.StepGradients(found)

    def gradients_beside(self) -> dict[str, Tensor]:
        """Return the gradients of what the optimiser moves beside the protected parameters; of sparse ones their values."""
        found = {name: local(p.grad) for name, p in self.beside.items() if p.grad is not None}
        return {name: g._values() if g.is_sparse else g for name, g in found.items()}

    def own_gradients(self) -> kernels.StepGradients:
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

    def stale(self, optimizer: Optimizer, in_place: bool) -> bool:
        """Return whether parameters joined the optimiser, were frozen, thawed, moved or grew since the look, or others grew.

        Args:
            optimizer: that holds them.
            in_place: whether all lie where they did, in the same precision.
        """
        held = optimizer_parameters(optimizer)
        if not _identical(held, self.looked_at):
            return True
        if in_place and not self.shard_group.groups:
            thawed = any(p.requires_grad for p in self.frozen)
            return thawed or bool(self.fingerprint[0] != [len(group["params"]) for group in optimizer.param_groups])
        return bool(_fingerprint(optimizer, held, self.parameters, self.in_optimizer) != self.fingerprint)

    def same(self, other: "ProtectedParameters") -> bool:
        """Return whether another look found the same parameters, of the same shapes."""
        return self.shapes == other.shapes and all(p is other.parameters[name] for name, p in self.parameters.items())

    def only_moved(self, other: "ProtectedParameters") -> bool:
        """Return whether another look found all as it was, but elsewhere in memory, as where `fully_shard` pads a part."""
        if self.fingerprint is None or other.fingerprint is None or not self.same(other):
            return False
        return _identical(self.looked_at, other.looked_at) and bool(self.fingerprint[:-1] == other.fingerprint[:-1])

    def blocks(self) -> list[Tensor | None]:
        """Return the parameters as they were then: the leading block of those that grew, None for those that shrank."""
        return [
            t if t.shape == old else t.detach()[tuple(slice(n) for n in old)] if grown(old, t.shape) else None
            for t, old in zip(self.theta.values(), self.shapes.values(), strict=True)
        ]

    def lost(self, other: "ProtectedParameters") -> list[str]:
        """List the names whose history cannot be carried over to `other`: gone, or no longer the leading block."""
        return [n for n, old in self.shapes.items() if n not in other.shapes or not grown(old, other.shapes[n])]

    def replaced(self, other: "ProtectedParameters") -> list[str]:
        """List the names under which another parameter has come, with other values."""
        both = [n for n, p in self.parameters.items() if n in other.parameters and p is not other.parameters[n]]
        kept = [n for n in both if grown(self.theta[n].shape, other.theta[n].shape)]
        return [n for n in kept if not _continues(self.theta[n], other.theta[n])]


def shares_memory(grad: kernels.StepGradients) -> bool:
    """Return whether one place in memory is an element of several gradients, or several elements of one, as after `expand`."""
    if not grad.contiguous and any(0 in t.stride() for t in grad.there if t.numel() and not t.is_contiguous()):
        return True
    if len(set(grad.addresses)) == len(grad):
        return False
    addresses = [t.data_ptr() for t in grad.there if t.numel()]
    return len(set(addresses)) < len(addresses)


def _identical(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Return whether two lists hold the same tensors, not just equal ones."""
    return len(a) == len(b) and all(map(is_, a, b))


def _continues(old: Tensor, new: Tensor) -> bool:
    """Return whether a tensor has the values of another in its leading block, in the precision of either."""
    old, new = old.detach(), new.detach()[tuple(slice(n) for n in old.shape)].to(old.device)
    return torch.equal(new.to(old.dtype), old) or torch.equal(old.to(new.dtype), new)


def _fingerprint(
    optimizer: Optimizer, held: list[nn.Parameter], parameters: Mapping[str, nn.Parameter], in_optimizer: Collection[str]
) -> Any:
    """Describe what an optimiser holds, and what is protected beside it."""
    others = [p for name, p in parameters.items() if name not in in_optimizer] if len(in_optimizer) < len(parameters) else []
    everything: list[nn.Parameter] = [*held, *others]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    form = [p.shape for p in everything], [p.dtype for p in everything], [p.device for p in everything]
    return sizes, *form, [p.requires_grad for p in everything], [_place(p) for p in everything if type(p) is not nn.Parameter]


def _place(parameter: Tensor) -> int | None:
    """Return where this rank's part of a DTensor lies; None for anything else."""
    return local(parameter).data_ptr() if sharded(parameter) else None


def optimizer_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """List the parameters of an optimiser in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def find_protected(model: nn.Module, optimizer: Optimizer, scope: Scope, known: Collection[str] = ()) -> ProtectedParameters:
    """Find the parameters to protect: those in scope that the optimiser trains, and those of names already `known`."""
    now = optimizer_parameters(optimizer)
    ids, trained = {id(p) for p in now}, {id(p) for p in now if p.requires_grad}
    found = named_parameters(model)
    parameters = {name: p for name, p in found.items() if name in known or (id(p) in trained and name in scope)}
    refuse_uninitialised(parameters)
    in_optimizer = frozenset(name for name, p in parameters.items() if id(p) in ids)
    return ProtectedParameters.of(
        parameters,
        in_optimizer=in_optimizer,
        looked_at=list(now),
        fingerprint=_fingerprint(optimizer, now, parameters, in_optimizer),
        frozen=[p for p in now if not p.requires_grad],
        beside=_beside(now, found, parameters),
    )


def _beside(held: Sequence[Tensor], model: Mapping[str, Tensor], protected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an optimiser's parameters that are not protected, by name or by their place in the optimiser."""
    names, mine = {id(p): name for name, p in model.items()}, {id(p) for p in protected.values()}
    return {names.get(id(p), f"parameter {i} of the optimiser"): p for i, p in enumerate(held) if id(p) not in mine}


def grow_state(
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
        return grow_tensor(kept, now, zero if start is None else lambda _: start)

    def column(old: Any, new: Any) -> Any:
        return [entry(old, new, name) for name in theta] if isinstance(old, list) else old

    return type(state)(*(column(old, new) for old, new in zip(state, fresh, strict=True)))


def refuse_nothing(protected: ProtectedParameters) -> None:
    """Raise a ValueError for an optimiser that moves no parameter of the model."""
    if not protected.in_optimizer:
        raise ValueError(
            "The optimiser holds none of the model's trainable parameters, or only those that `only` and `exclude` leave out. "
            "Build it from `model.parameters()` of the model that was given to the consolidator."
        )


def refuse_new_shards(old: ProtectedParameters, new: ProtectedParameters) -> None:
    """Raise a RuntimeError for parameters that were sharded, or sharded otherwise, while there is state beside them."""
    both = [(name, p, new.parameters[name]) for name, p in old.parameters.items() if name in new.parameters]
    changed = [name for name, p, q in both if (sharded(p) or sharded(q)) and layout(p) != layout(q)]
    if changed:
        raise RuntimeError(
            f"The parameters {listed(changed)} were sharded anew, or grew in shards, under a consolidator. Call `fully_shard` "
            "before `attach`. To continue with what was learned: `save` it before, `load` it into a new consolidator of the "
            "plain model as it was, let that grow, and `load` once more what that one saves."
        )


def refuse_sparse(grad: kernels.StepGradients, names: Iterable[str]) -> None:
    """Raise a RuntimeError for sparse gradients."""
    try:
        grad.addresses  # noqa: B018 - a sparse tensor has none
    except RuntimeError:
        sparse = [name for name, g in zip(names, grad, strict=True) if g is not None and g.layout is not torch.strided]
        raise RuntimeError(f"The gradients of {listed(sparse)} are sparse. Build the embedding with `sparse=False`.") from None
