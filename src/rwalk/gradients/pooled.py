"""Squared per-example gradients of a batch that is spread over ranks, from what each rank has gathered of its own examples."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwalk.parallel import Ranks, sharded


class Gathered(NamedTuple):
    """What was gathered since the last step.

    Args:
        squares: for parameters by name, the mean over examples of the squared per-example gradient.
        shut: the parameters that are no longer gathered.
        totals: for some of the parameters, the sum of all contributions to their gradient.
        bounds: for these, the sum of `squares` over all elements.
        spoiled: whether several backward passes went through one graph, so that nothing is known of this step.
    """

    squares: dict[str, Tensor]
    shut: frozenset[str]
    totals: dict[str, Tensor]
    bounds: dict[str, Tensor]
    spoiled: bool = False


def pooled(
    mine: Gathered, examples: int, parameters: Mapping[str, Tensor], compared: Collection[str], ranks: Ranks
) -> Gathered:
    """Join what the ranks have gathered, in one reduction; under `fully_shard` one of figures and one of each tensor.

    The gradient in use is the mean over ranks of their gradients, so each example's contribution to it is its contribution
    here over the number of ranks. With n examples in all, n * sum of squared contributions is what one process would have.

    Args:
        mine: what this rank has gathered.
        examples: how many examples that was.
        parameters: all that were ever to be gathered, by name: the same on all ranks.
        compared: those of them whose totals are joined: the same on all ranks.
        ranks: those that train the model.
    """
    dtypes = [square.dtype for square in mine.squares.values()]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    shapes = {name: p.shape for name, p in parameters.items() if name in compared}
    each = {n: mine.squares[n] / examples if n in mine.squares else torch.zeros(p.shape) for n, p in parameters.items()}
    figures = torch.tensor([examples, mine.spoiled, *_known(mine, parameters, shapes)], dtype=dtype, device=device)
    tensors = [mine.totals.get(name, torch.zeros(shape)) for name, shape in shapes.items()]
    tensors += [each[name].sum() for name in shapes]
    apart = any(map(sharded, parameters.values()))
    tensors += [] if apart else each.values()
    flat = [figures, *(tensor.to(device, dtype).flatten() for tensor in tensors)]
    sizes = [1, 1, len(each), len(each), len(shapes), *(tensor.numel() for tensor in tensors)]
    whole, spoiled, had, shut, lacks, *sums = ranks.sum_(torch.cat(flat)).split(sizes)
    factor = float(whole) / ranks.size**2
    open_ = {n for n, h, s in zip(parameters, had.tolist(), shut.tolist(), strict=True) if h > 0 and not s}
    found: dict[str, Tensor] = {}
    for i, (name, parameter) in enumerate(parameters.items(), 2 * len(shapes)):
        if name in open_:
            square = ranks.sum_part(each[name].to(device, dtype), parameter) if apart else sums[i].view(parameter.shape)
            found[name] = square.mul_(factor)
    totals, bounds = {}, {}
    for i, (name, lack) in enumerate(zip(shapes, lacks.tolist(), strict=True)):
        if name in open_ and not lack:
            totals[name], bounds[name] = sums[i].view(shapes[name]) / ranks.size, sums[len(shapes) + i].squeeze() * factor
    closed = frozenset(name for name, s in zip(parameters, shut.tolist(), strict=True) if s)
    return Gathered(found, closed, totals, bounds, bool(spoiled > 0))


def _known(mine: Gathered, parameters: Iterable[str], compared: Iterable[str]) -> list[float]:
    """Say of each parameter whether it was gathered, whether it is shut, and of those compared whether a total is lacking."""
    return [
        *(float(name in mine.squares) for name in parameters),
        *(float(name in mine.shut) for name in parameters),
        *(float(name in mine.squares and name not in mine.totals) for name in compared),
    ]
