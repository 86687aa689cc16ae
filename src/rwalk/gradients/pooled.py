"""Squared per-example gradients of a batch that is spread over ranks, from what each rank has gathered of its own examples."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwalk.parallel import Ranks, sharded


class Gathered(NamedTuple):
    """What was gathered since the last step.

    Args:
        squares: for parameters by name, the mean over examples of the squared per-example gradient.
        shut: the parameters that are no longer gathered.
        total: the sum of all contributions to the gradient of one parameter, the witness; None if there is none.
        spoiled: whether several backward passes went through one graph, so that nothing is known of this step.
    """

    squares: dict[str, Tensor]
    shut: frozenset[str]
    total: Tensor | None
    spoiled: bool = False


def pooled(mine: Gathered, examples: int, parameters: Mapping[str, Tensor], witness: Tensor | None, ranks: Ranks) -> Gathered:
    """Join what the ranks have gathered, in one reduction; under `fully_shard` one of figures and one of each tensor.

    The gradient in use is the mean over ranks of their gradients, so each example's contribution to it is its contribution
    here over the number of ranks. With n examples in all, n * sum of squared contributions is what one process would have.

    Args:
        mine: what this rank has gathered.
        examples: how many examples that was.
        parameters: all that were ever to be gathered, by name: the same on all ranks.
        witness: the parameter that `total` is about, if there is one: the same on all ranks.
        ranks: those that train the model.
    """
    dtypes = [square.dtype for square in mine.squares.values()]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    known = [float(name in mine.squares) for name in parameters] + [float(name in mine.shut) for name in parameters]
    figures = [torch.tensor([examples, mine.spoiled, *known], dtype=dtype, device=device)]
    if witness is not None:
        none = torch.zeros(witness.shape, device=device)
        figures.append((none if mine.total is None else mine.total).to(dtype).flatten())
    each = {n: mine.squares[n] / examples if n in mine.squares else torch.zeros(p.shape) for n, p in parameters.items()}
    apart = any(map(sharded, parameters.values()))
    squares = [] if apart else [square.to(device, dtype).flatten() for square in each.values()]
    sizes = [1, 1, len(each), len(each), 0 if witness is None else witness.numel(), *(square.numel() for square in squares)]
    whole, spoiled, had, shut, total, *sums = ranks.sum_(torch.cat([*figures, *squares])).split(sizes)
    factor = float(whole) / ranks.size**2
    open_ = [h > 0 and not s for h, s in zip(had.tolist(), shut.tolist(), strict=True)]
    found: dict[str, Tensor] = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        if open_[i]:
            square = ranks.sum_part(each[name].to(device, dtype), parameter) if apart else sums[i].view(parameter.shape)
            found[name] = square.mul_(factor)
    closed = frozenset(name for name, s in zip(parameters, shut.tolist(), strict=True) if s)
    mean = None if witness is None else total.view(witness.shape) / ranks.size
    return Gathered(found, closed, mean, bool(spoiled > 0))
