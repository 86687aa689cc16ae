"""Sharded tensors: this rank's part of each, the full tensors, and sums over the ranks that hold the other parts."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed

Group = Any
"""A `torch.distributed.ProcessGroup`, a class that not every build of PyTorch has."""


def sharded(tensor: Any) -> TypeGuard[Any]:
    """Return whether a tensor is a DTensor, without importing its module: that takes long, and no DTensor exists without it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, in the same memory; any other tensor as it is."""
    if not sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()  # type: ignore[no-any-return]


def local_slices(like: Any) -> tuple[slice, ...]:
    """Return which part of a DTensor this rank holds, also of a smaller tensor that is its leading block."""
    bounds = [(0, size) for size in like.shape]
    mesh = like.device_mesh
    for placement, ranks, coordinate in zip(like.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if placement.is_shard():
            start, stop = bounds[placement.dim]
            size = -(-(stop - start) // ranks)
            bounds[placement.dim] = min(start + size * coordinate, stop), min(start + size * (coordinate + 1), stop)
    return tuple(slice(*pair) for pair in bounds)


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor, full or sharded, that belongs beside this rank's part of a parameter."""
    if sharded(value) and sharded(like) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements):
        return local(value)
    full: Tensor = value.full_tensor() if sharded(value) else value
    return full[local_slices(like)] if sharded(like) else full


def as_dtensor(value: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor placed like a parameter, with `value` as this rank's part; `value` itself if `like` is no DTensor."""
    if not sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(value, like.device_mesh, like.placements, **options)


def full_tensor(tensor: Tensor | None) -> Tensor | None:
    """Gather a DTensor; return anything else as it is."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def local_parts(column: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Apply `local_part` to a column of a state: tensors by name, or a list of them parallel to the parameters."""
    return _map_column(local_part, column, parameters)


def as_dtensors(column: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Apply `as_dtensor` to a column of a state: tensors by name, or a list of them parallel to the parameters."""
    return _map_column(as_dtensor, column, parameters)


def _map_column(change: Callable[[Tensor, Tensor], Tensor], column: Any, parameters: Mapping[str, Tensor]) -> Any:
    if isinstance(column, Mapping):
        return {name: change(value, parameters[name]) for name, value in column.items()}
    if isinstance(column, list):
        pairs = zip(column, parameters.values(), strict=True)
        return [change(value, like) if isinstance(value, Tensor) else value for value, like in pairs]
    return column


def layout(tensor: Any) -> tuple[Any, ...]:
    """Return shape, mesh and placements: this rank's part of a tensor is the same as long as they are."""
    return (tensor.shape, tensor.device_mesh, tensor.placements) if sharded(tensor) else (tensor.shape,)


def full_tensors(tree: Any) -> Any:
    """Return nested dictionaries and lists with all DTensors gathered on the CPU."""
    if sharded(tree):
        return tree.full_tensor().cpu()
    if isinstance(tree, list):
        return [full_tensors(value) for value in tree]
    return {key: full_tensors(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True, eq=False)
class ShardGroup:
    """The ranks that hold the parts of sharded tensors; by default one process, and then nothing is ever reduced.

    Args:
        groups: for each dimension of the mesh along which tensors are sharded, the ranks that hold the other parts.
        device: the device for reductions.
        first: whether this is the first of the ranks that hold different parts.
    """

    groups: tuple[Group, ...] = ()
    device: torch.device | None = None
    first: bool = True

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "ShardGroup":
        """Find the ranks over which parameters are sharded.

        Raises:
            ValueError: if parameters are sharded in different ways, or only some of them.
        """
        every = list(parameters)
        cut: list[Any] = [p for p in every if sharded(p)]
        if not cut:
            return cls()
        layouts = {(p.device_mesh, tuple(place.is_shard() for place in p.placements)) for p in cut}
        shards = [place for p in cut for place in p.placements if place.is_shard()]
        if len(layouts) > 1 or len(cut) < len(every) or any(type(shard).__name__ != "Shard" for shard in shards):
            raise ValueError(
                "The protected parameters are spread over ranks in different ways; all have to be plain shards on one mesh. "
                "Apply `fully_shard` to the whole model, and leave other parameters out of the optimiser that is attached."
            )
        mesh = cut[0].device_mesh
        dims = [i for i, place in enumerate(cut[0].placements) if place.is_shard()]
        first = all(mesh.get_coordinate()[i] == 0 for i in dims)
        return cls(tuple(mesh.get_group(i) for i in dims), local(cut[0]).device, first)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks, on the device for reductions and perhaps in place."""
        return all_reduce_(tensor.to(self.device), self.groups) if self.groups else tensor

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add up numbers about local parts to numbers about full tensors."""
        return self._reduced(values, "SUM")

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Return, for each number about a local part, the largest over the ranks."""
        return self._reduced(values, "MAX")

    def total(self, count: Any) -> Any:
        """Add up a count over the ranks: a number, or a tensor with one element."""
        if not self.groups:
            return count
        return self.sum_(count.to(self.device, copy=True)) if isinstance(count, Tensor) else int(self.sums([count])[0])

    def mine(self, count: Any) -> Any:
        """Return this rank's share of a count whose total is known: the first rank has all of it, the others zero."""
        return count if self.first else count * 0

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if not self.groups or not values:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        return all_reduce_(numbers, self.groups, how).tolist()


ALONE = ShardGroup()
"""One process, or ranks that each hold all parameters in full."""


def all_reduce_(tensor: Tensor, groups: Sequence[Group], how: str = "SUM") -> Tensor:
    """Reduce a tensor over each of the groups in turn, in place."""
    for group in groups:
        distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how), group=group)
    return tensor
