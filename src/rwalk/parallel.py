"""Models that several processes train together: which tensors lie whole in each, which in shards, and what is summed over all.

Under DistributedDataParallel every rank holds everything and sees the same averaged gradients. Under `fully_shard` (FSDP2)
parameters and gradients are DTensors, of which each rank holds a part: all elementwise work is done on these parts, and what is
about whole tensors, such as their largest element, is reduced over the ranks.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

from rwalk import _metadata
from rwalk._errors import explain

Group = Any
"""A `torch.distributed.ProcessGroup`, a class that not every build of PyTorch has."""


def sharded(tensor: Any) -> TypeGuard[Any]:
    """Tell whether a tensor is a DTensor; its module, slow to load, is loaded where there are any."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; the tensor itself where it is no DTensor."""
    if not sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()  # type: ignore[no-any-return]


def window(like: Any) -> tuple[slice, ...]:
    """Say which part of a DTensor this rank holds; also in a tensor of fewer rows, of which it is the leading block."""
    at = [(0, size) for size in like.shape]
    mesh = like.device_mesh
    for place, ranks, mine in zip(like.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if place.is_shard():
            start, stop = at[place.dim]
            size = -(-(stop - start) // ranks)
            at[place.dim] = min(start + size * mine, stop), min(start + size * (mine + 1), stop)
    return tuple(slice(*pair) for pair in at)


def part(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor, whole or sharded, that belongs beside this rank's part of a parameter."""
    if sharded(value) and sharded(like) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements):
        return local(value)
    whole: Tensor = value.full_tensor() if sharded(value) else value
    return whole[window(like)] if sharded(like) else whole


def as_whole(value: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor placed as a parameter is, of which `value` is this rank's part; `value` where it is no DTensor."""
    if not sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    place = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(value, like.device_mesh, like.placements, **place)


def whole(tensor: Tensor | None) -> Tensor | None:
    """Gather a DTensor; return anything else as it is."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def parts(column: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Apply `part` to a column of a state: tensors by name, or a list of them parallel to the parameters."""
    return _beside(part, column, parameters)


def placed(column: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Apply `as_whole` to a column of a state: tensors by name, or a list of them parallel to the parameters."""
    return _beside(as_whole, column, parameters)


def _beside(change: Callable[[Tensor, Tensor], Tensor], column: Any, parameters: Mapping[str, Tensor]) -> Any:
    if isinstance(column, Mapping):
        return {name: change(value, parameters[name]) for name, value in column.items()}
    if isinstance(column, list):
        pairs = zip(column, parameters.values(), strict=True)
        return [change(value, like) if isinstance(value, Tensor) else value for value, like in pairs]
    return column


def layout(tensor: Any) -> tuple[Any, ...]:
    """Return what has to stay the same for a rank's part of a tensor to stay the same."""
    return (tensor.shape, tensor.device_mesh, tensor.placements) if sharded(tensor) else (tensor.shape,)


def full(tree: Any) -> Any:
    """Return nested dictionaries and lists with all DTensors gathered, on the CPU."""
    if sharded(tree):
        return tree.full_tensor().cpu()
    if isinstance(tree, list):
        return [full(value) for value in tree]
    return {key: full(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True, eq=False)
class Spread:
    """Over which ranks whole tensors are spread; none by default, and then nothing is ever reduced.

    Args:
        groups: for each dimension of the mesh that tensors are cut along, the ranks that hold the other parts.
        device: where numbers have to be for a reduction.
        first: whether of all ranks that hold different parts this is the first one.
    """

    groups: tuple[Group, ...] = ()
    device: torch.device | None = None
    first: bool = True

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "Spread":
        """Look how parameters are spread.

        Raises:
            ValueError: if they are spread in different ways.
        """
        parameters = list(parameters)
        cut = [p for p in parameters if sharded(p)]
        if not cut:
            return cls()
        ways = {(p.device_mesh, tuple(place.is_shard() for place in p.placements)) for p in cut}
        if len(ways) > 1 or len(cut) < len(parameters) or any(type(q).__name__ != "Shard" for q in _cuts(cut)):
            raise ValueError(
                explain(
                    "parameters that are spread over ranks in different ways",
                    "all protected parameters in plain shards on one mesh",
                    "Apply `fully_shard` to the whole model, and leave other parameters out of the optimiser that is attached.",
                )
            )
        mesh = cut[0].device_mesh
        dims = [i for i, place in enumerate(cut[0].placements) if place.is_shard()]
        first = all(mesh.get_coordinate()[i] == 0 for i in dims)
        return cls(tuple(mesh.get_group(i) for i in dims), local(cut[0]).device, first)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks; where there are any, on the device of their tensors and perhaps in place."""
        return all_reduce_(tensor.to(self.device), self.groups) if self.groups else tensor

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add up numbers about the parts of tensors, to those about whole tensors."""
        return self._reduced(values, "SUM")

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Return the largest of numbers about the parts of tensors."""
        return self._reduced(values, "MAX")

    def total(self, count: Any) -> Any:
        """Add up a count, a number or a tensor of one element, over the ranks."""
        if not self.groups:
            return count
        return self.sum_(count.to(self.device, copy=True)) if isinstance(count, Tensor) else int(self.sums([count])[0])

    def mine(self, count: Any) -> Any:
        """Return a rank's part of a count of which only the total is known: the first rank has all of it."""
        return count if self.first else count * 0

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if not self.groups or not values:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        return all_reduce_(numbers, self.groups, how).tolist()


def _cuts(parameters: Sequence[Any]) -> list[Any]:
    return [place for p in parameters for place in p.placements if place.is_shard()]


def blank(folder: Any, key: str, parameters: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> Any:
    """Return a state to load a distributed checkpoint into: its layout, with empty tensors placed as the parameters are.

    Args:
        folder: the checkpoint, as `torch.distributed.checkpoint.save` wrote it.
        key: where in what was saved the state is.
        parameters: the model's parameters by name.
        groups: where in the state there are dictionaries, also if nothing is in them: checkpoints drop empty ones.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if its metadata cannot be read, or hold no such state.
    """
    found = _metadata.read(folder)
    places = {path[1:]: stored for path, stored in found.items() if path[0] == key}
    if not places:
        keys = ", ".join({f"`{path[0]}`": None for path in found})
        came = f"`{folder}`, which holds nothing under `{key}`, but under {keys}"
        raise ValueError(explain(came, "the key that the state was saved under", "Pass that key."))
    try:
        return _blank(places, parameters, groups)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        came = f"`{folder}`, which holds no state of a consolidator under `{key}` ({type(error).__name__} {error})"
        raise ValueError(explain(came, "what `Consolidator.state_dict` returned", "Copy it again, or pass its key.")) from None


def _blank(
    places: Mapping[tuple[Any, ...], _metadata.Stored | None],
    parameters: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
) -> Any:
    names: list[Any] = list(dict.fromkeys(path[1] for path in places if path[0] == "shapes"))
    tree: Any = {}
    for group in groups:
        _plant(tree, group, {})
    for path, stored in places.items():
        leaf: Any = None
        if stored is not None:
            name = names[path[2]] if path[0] == "state" and len(path) == 3 else path[-1]
            leaf = _empty(stored, parameters.get(name))
        _plant(tree, path, leaf)
    return _listed(tree)


def _empty(stored: _metadata.Stored, like: Tensor | None) -> Tensor:
    """Make an empty tensor for one that is stored, in parts like those of a parameter."""
    if like is None or not sharded(like) or like.shape != stored.size:
        return torch.empty(stored.size, dtype=stored.dtype)
    return as_whole(torch.empty_like(local(like), dtype=stored.dtype), like)


def _plant(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = leaf


def _listed(tree: Any) -> Any:
    """Turn dictionaries whose keys count from 0 into lists."""
    if not isinstance(tree, dict):
        return tree
    inside = {key: _listed(value) for key, value in tree.items()}
    return [inside[i] for i in range(len(inside))] if inside and all(isinstance(key, int) for key in inside) else inside


def write(content: Any, spread: Spread, save: Callable[[Any], None]) -> None:
    """Have a state saved by one process, with whole tensors; returns once it has been."""
    if not spread.groups:
        return save(content)
    whole = full(content)
    try:
        if spread.first:
            save(whole)
    finally:
        spread.sums([0])  # nobody goes on to read what is not written yet
    return None


ALONE = Spread()
"""One process, or every rank holding everything."""


def all_reduce_(tensor: Tensor, groups: Sequence[Group], how: str = "SUM") -> Tensor:
    """Reduce a tensor over each of some groups, in place."""
    for group in groups:
        distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how), group=group)
    return tensor


def inner(model: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile`, Lightning's Fabric or DistributedDataParallel has wrapped, None for any other."""
    found = getattr(model, "_orig_mod", None)
    found = getattr(model, "_forward_module", None) if found is None else found
    return model.module if found is None and isinstance(model, nn.parallel.DistributedDataParallel) else found


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that train one model, each on its own data.

    Args:
        groups: process groups; a sum over each in turn is one over all ranks.
    """

    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, warn: bool = True) -> "Ranks":
        """Find the ranks: those of DistributedDataParallel, else those of the mesh that parameters are spread over.

        With neither, but several processes, each measures on its own data alone; a warning says so, unless it was said before.
        """
        outer: nn.Module | None = model
        while outer is not None:
            if isinstance(outer, nn.parallel.DistributedDataParallel):
                return cls((outer.process_group,))
            outer = inner(outer)
        settle(model)
        mesh = next((p.device_mesh for p in model.parameters() if sharded(p)), None)
        if mesh is None:
            if warn:
                _warn_of_plain_model()
            return cls()
        return cls(tuple(mesh.get_group(i) for i in range(mesh.ndim)))

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Add up numbers over all ranks."""
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=device)).tolist() if self.groups else list(values)

    @property
    def size(self) -> int:
        """Count the ranks."""
        return math.prod(distributed.get_world_size(group) for group in self.groups)

    @property
    def number(self) -> int:
        """Tell which of them this is, from 0."""
        number = 0
        for group in self.groups:
            number = number * distributed.get_world_size(group) + distributed.get_rank(group)
        return number

    def share(self, count: int | None) -> int | None:
        """Return this rank's share of a number of examples."""
        return None if count is None else count // self.size + (self.number < count % self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        return all_reduce_(tensor, self.groups)

    def sum_part(self, value: Tensor, like: Tensor) -> Tensor:
        """Add up a tensor of a parameter's whole shape over all ranks; return what belongs beside the parameter's own part."""
        if not sharded(like):
            return self.sum_(value)
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * like.device_mesh.ndim
        return local(DTensor.from_local(value, like.device_mesh, partial).redistribute(placements=like.placements))


def _warn_of_plain_model() -> None:
    """Warn where what is measured on a rank's own data would stay its own."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            explain(
                f"a plain model in one of {distributed.get_world_size()} processes of torch.distributed, measured on data",
                "the model as DistributedDataParallel or `fully_shard` returns it",
                "Pass that one to the consolidator, so that figures are averaged over the ranks; filter this warning if each "
                "process trains a model of its own.",
            ),
            stacklevel=5,
        )


def settle(model: nn.Module) -> None:
    """Let go of whole parameters that a forward pass under `fully_shard` has left behind: its shards are what counts."""
    if _fsdp() is not None:
        for module in model.modules():
            if isinstance(module, _fsdp()):
                module.reshard()


def kind(module: nn.Module) -> type[nn.Module]:
    """Return a module's class as it was before `fully_shard` put its own before it."""
    return type(module).__mro__[2] if _fsdp() is not None and isinstance(module, _fsdp()) else type(module)


def _fsdp() -> Any:
    """Return the class of modules under `fully_shard`, None before anything has loaded it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have whole parameters in the place of shards, so that each rank can go through its data at its own pace.

    They are copies; collective at entry, and without hooks of `fully_shard` inside.
    """
    settle(model)
    places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if sharded(p)]
    distinct = {id(p): p for _, _, p in places}
    whole = {key: nn.Parameter(p.detach().full_tensor(), p.requires_grad) for key, p in distinct.items()}
    tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)] if places else []
    hooks = [(table, dict(table)) for table in tables]
    try:
        for table, _ in hooks:
            for key in [key for key, hook in table.items() if _belongs(hook)]:
                del table[key]
        for module, name, p in places:
            module._parameters[name] = whole[id(p)]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
        for table, before in hooks:
            table.clear()
            table.update(before)


def _belongs(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
