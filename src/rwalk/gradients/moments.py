"""Second moments of layers over data: of their inputs, and of the gradients of their outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwalk._parameters import bare, named_parameters, refuse_odd
from rwalk.anchors.factors import Moments
from rwalk.anchors.kronecker import HeldNames
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.shards import sharded
from rwalk.distributed.wrappers import full_parameters
from rwalk.gradients.batches import ExampleBatch, examples
from rwalk.gradients.costs import ManyClasses, warn_one_by_one
from rwalk.gradients.function_calls import Rows
from rwalk.gradients.isolation import ModelSnapshot, isolated
from rwalk.gradients.layer_moments import WeightGradient, probed, warn_of_odd_layers, warn_of_unseen_layers
from rwalk.gradients.layer_uses import NOTHING_HELD, LayerUses
from rwalk.gradients.objectives import Scores
from rwalk.gradients.outputs import given_inputs
from rwalk.gradients.over_data import check_totals
from rwalk.gradients.shared_weights import sums_of
from rwalk.gradients.texts import readable
from rwalk.rules.base import Objective

ONE_EXAMPLE = "a `loss` that names no distribution takes one example"

FASTER = 'Leave `loss` out, or use `labels="sample"`, which take whole batches; or measure fewer examples with `samples=`.'
"""What to do if examples are measured one at a time."""


def moments(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[..., Tensor] | None = None,
) -> Callable[..., dict[str, Moments]]:
    """Prepare passes over data that measure second moments: for each batch one forward pass and few backward passes.

    A layer is measured if it is linear, a convolution, an embedding, attention or a recurrent layer, and the data reach it. At
    the first examples, the gradient of its weight has to follow from its inputs and the gradients of its outputs; else the
    layer is left out, with a warning. If a layer is applied several times to an example, as along a sequence, A is the mean
    over all times and G the sum, averaged over the examples that count: different times are taken as independent (Eschenhagen
    et al. 2023, arXiv 2311.00636).

    Args:
        model: as for `per_example_over`.
        theta: as there.
        data: as there.
        loss: as there.
        logits: as there.

    Returns:
        A function `factors(objective, samples=None, rank=None, held=...)` that returns the moments in state precision, by the
        names of weights. The objectives are those of `per_example_over` except "norm", and so are the errors.
    """
    return partial(_factors, model, theta, data, loss, logits)


def _factors(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    logits: Callable[..., Tensor] | None,
    objective: Objective,
    samples: int | None = None,
    rank: int | None = None,
    held: HeldNames = NOTHING_HELD,
) -> dict[str, Moments]:
    """Go through the data once: see `moments`."""
    scores, ranks, root = Scores(objective, loss, logits), Ranks.of(model), bare(model)
    refuse_odd(theta)
    whole = not any(map(sharded, theta.values()))
    with full_parameters(model), isolated(model, loss, logits) as snapshot:
        names = {id(p): name for name, p in named_parameters(model).items() if name in theta}
        passes = _Passes(root, LayerUses(root, names, held, whole), rank, scores, snapshot)
        device = next((p.device for p in theta.values()), torch.device("cpu"))
        count, watch, read = 0, ManyClasses(root, data, ranks.share(samples)), (readable(root, raw) for raw in data)
        for raw in examples(read, ranks.share(samples), device, scores.is_likelihood):
            batch = scores.prepare(root, raw, snapshot)
            for part in watch.parts(batch, scores.passes):
                passes.add(part)
            count += batch.size
    for layer in passes.sums.values():
        layer.reduce(ranks)
    tensors = [t for layer in passes.sums.values() for t in layer.tensors()]
    count = check_totals(tensors, count, data, ranks, device, scores)
    odd = ranks.sums([float(weight in passes.odd) for weight in passes.sums], device)
    left_out = {weight for weight, n in zip(passes.sums, odd, strict=True) if n}
    warn_of_odd_layers(sorted(left_out))
    warn_of_unseen_layers([weight for weight, layer in passes.sums.items() if weight in passes.unseen and not layer.used])
    return {w: layer.moments(count) for w, layer in passes.sums.items() if layer.used and w not in left_out}


class _Passes:
    """Passes over batches, and what they have summed up.

    Attributes:
        sums: the sums of each layer, by the name of its weight.
        odd: the layers whose weights have another gradient than their inputs and outputs give.
        unseen: the layers that were not seen at work, though their weights have gradients.
    """

    def __init__(self, root: nn.Module, uses: LayerUses, rank: int | None, scores: Scores, snapshot: ModelSnapshot) -> None:
        self._root, self._uses, self._scores, self._snapshot = root, uses, scores, snapshot
        self.sums = {weight: sums_of(layer, rank) for weight, layer in uses.layers.items()}
        self.odd, self.unseen = set[str](), set[str]()
        self._compared: set[str] = set()
        self._noted: list[tuple[list[Tensor], Rows]] = []

    def _note(self, outputs: list[Tensor], rows: Rows) -> list[Tensor]:
        """Keep outputs for their gradients; later operations may write into copies."""
        for y in outputs:
            if not y.requires_grad:
                y.requires_grad_()
        self._noted.append((outputs, rows))
        return [y.clone() for y in outputs]

    def add(self, batch: ExampleBatch) -> None:
        """Add the examples of a batch, one by one if a loss of the user's takes one example."""
        size = batch.size if self._scores.takes_batches else 1
        for start in range(0, batch.size, size or 1):
            self._add(batch.cut(start, start + size))
            if size < batch.size:
                warn_one_by_one(self._root, ONE_EXAMPLE, FASTER)

    def _add(self, batch: ExampleBatch) -> None:
        self._noted.clear()
        self._uses.open(self._note)
        try:
            output = self._snapshot.call(self._root, *batch.args, **batch.kwargs)
            scores = self._scores(output, given_inputs(batch.args, batch.kwargs), batch.target, batch.size)  # may call layers
        finally:
            self._uses.close()
        outputs = [y for some, _ in self._noted for y in some]
        weights = {w: layer.parameter for w, layer in self._uses.layers.items() if layer.parameter.requires_grad}
        fresh = {w: p for w, p in weights.items() if w not in self._compared} if outputs else {}
        for number, score in enumerate(_sums(*scores) if outputs else ()):
            found = torch.autograd.grad(score, [*outputs, *fresh.values()], retain_graph=True, allow_unused=True)
            totals = self._add_rows(iter(found[: len(outputs)]), number == 0, fresh)
            for (weight, _), g in zip(fresh.items(), found[len(outputs) :], strict=True):
                given = None if g is None else probed(self._uses.layers[weight], g)
                if weight in totals and not totals[weight].fits(given):
                    self.odd.add(weight)
                elif weight not in totals and given is not None and bool(given.any()):
                    self.unseen.add(weight)
                self._compared |= {weight} & totals.keys()
            fresh = {} if number == 0 else fresh
        self._noted.clear()

    def _add_rows(
        self, gradients: Iterator[Tensor | None], with_inputs: bool, fresh: Mapping[str, Any]
    ) -> dict[str, WeightGradient]:
        """Add what one backward pass has told; return the gradients of weights that follow from it."""
        totals: dict[str, WeightGradient] = {}
        for outputs, rows in self._noted:
            for part in rows([next(gradients) for _ in outputs]):
                weight = part.layer.weight
                self.sums[weight].add(part, with_inputs)
                if weight in fresh and not part.dropped:
                    totals.setdefault(weight, WeightGradient(self._uses.layers[weight])).add(part)
        return totals


def _sums(score: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield sums over examples; the squares of their per-example gradients add up to the objective's."""
    for c in range(score.shape[1]):
        # a masked class must not add 0 * inf
        yield torch.where(weight[:, c] > 0, score[:, c] * weight[:, c].sqrt(), 0).sum()
