"""Squared per-example gradients of a batch that several ranks share, from what each rank has collected of its own examples."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwalk.distributed.ranks import Ranks
from rwalk.distributed.shards import sharded


class StepSquares(NamedTuple):
    """What was collected since the last step.

    Args:
        squares: for each parameter by name, the mean over examples of the squared per-example gradient.
        closed: the parameters that are no longer collected.
        totals: for some of the parameters, the sum of all contributions to their gradient.
        bounds: for these parameters, the sum of `squares` over all elements.
        spoiled: whether nothing is known of this step, for example as several backward passes went through one graph.
    """

    squares: dict[str, Tensor]
    closed: frozenset[str]
    totals: dict[str, Tensor]
    bounds: dict[str, Tensor]
    spoiled: bool = False


def sum_across_ranks(
    mine: StepSquares, examples: int, parameters: Mapping[str, Tensor], compared: Collection[str], ranks: Ranks
) -> StepSquares:
    """Join what the ranks have collected, in one reduction; under `fully_shard` one more for each tensor.

    The gradient in use is the mean over ranks of their gradients, so each example's contribution to it is its contribution
    here over the number of ranks. With n examples in all, one process would have n * sum of squared contributions.

    Args:
        mine: what this rank has collected.
        examples: the number of this rank's examples.
        parameters: all parameters that were collected at first, by name: the same on all ranks.
        compared: the parameters whose totals are joined: the same on all ranks.
        ranks: the ranks that train the model.
    """
    names = [name for name in parameters if name in compared]
    means = {n: mine.squares[n] / examples if n in mine.squares else torch.zeros(p.shape) for n, p in parameters.items()}
    apart = any(map(sharded, parameters.values()))
    dtype = torch.float64 if any(square.dtype == torch.float64 for square in mine.squares.values()) else torch.float32
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    tensors = [
        torch.tensor([examples, mine.spoiled]),
        torch.tensor([[name in mine.squares, name in mine.closed] for name in parameters]),
        torch.tensor([name in mine.squares and name not in mine.totals for name in names]),
        *(mine.totals.get(name, torch.zeros(parameters[name].shape)) for name in names),
        *(means[name].sum() for name in names),
        *(() if apart else means.values()),
    ]
    sums = iter(_sum_packed([t.to(device, dtype) for t in tensors], ranks))
    (count, spoiled), flags, lacking = (next(sums).tolist() for _ in range(3))
    totals, bounds, squares = (dict(zip(keys, sums, strict=False)) for keys in (names, names, parameters))
    collected = {name for name, (has, closed) in zip(parameters, flags, strict=True) if has and not closed}
    if apart:
        squares = {n: ranks.sum_local_part(means[n].to(device, dtype), p) for n, p in parameters.items() if n in collected}
    factor = count / ranks.size**2
    known = {name for name, lacks in zip(names, lacking, strict=True) if name in collected and not lacks}
    return StepSquares(
        {name: square.mul_(factor) for name, square in squares.items() if name in collected},
        frozenset(name for name, (_, closed) in zip(parameters, flags, strict=True) if closed),
        {name: total / ranks.size for name, total in totals.items() if name in known},
        {name: bound * factor for name, bound in bounds.items() if name in known},
        spoiled > 0,
    )


def _sum_packed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Add up tensors over ranks in one reduction."""
    packed = ranks.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
