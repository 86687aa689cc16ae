"""The ranks that train one model, each on its own data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from rwalk._errors import warn
from rwalk.distributed.shards import Group, all_reduce_, local, sharded
from rwalk.distributed.wrappers import reshard_fsdp, wrapped_module


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that train one model, each on its own data.

    Args:
        groups: process groups; a sum over each in turn is one over all ranks.
    """

    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, warn: bool = True) -> "Ranks":
        """Find the ranks: those of DistributedDataParallel, else those of the mesh that parameters are sharded over.

        With neither of them in several processes, each process measures on its own data alone, and a warning says so if `warn`.
        """
        outer: nn.Module | None = model
        while outer is not None:
            if isinstance(outer, nn.parallel.DistributedDataParallel):
                return cls((outer.process_group,))
            outer = wrapped_module(outer)
        reshard_fsdp(model)
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
        """How many ranks there are."""
        return math.prod(distributed.get_world_size(group) for group in self.groups)

    @property
    def number(self) -> int:
        """The number of this rank, from 0."""
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

    def sum_local_part(self, value: Tensor, like: Tensor) -> Tensor:
        """Add up a tensor of a parameter's full shape over all ranks; return the part that belongs to this rank."""
        if not sharded(like):
            return self.sum_(value)
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * like.device_mesh.ndim
        return local(DTensor.from_local(value, like.device_mesh, partial).redistribute(placements=like.placements))


def _warn_of_plain_model() -> None:
    """Warn if what is measured on a rank's own data would not be averaged over the ranks."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warn(
            f"A plain model is measured on data in one of {distributed.get_world_size()} processes of torch.distributed, and "
            "nothing is averaged over them. Pass the model as DistributedDataParallel or `fully_shard` returns it to the "
            "consolidator; if each process trains a model of its own, filter this warning."
        )
