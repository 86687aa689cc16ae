"""Second moments of linear layers over data: of their inputs, and of the gradients of their outputs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._parameters import bare, listed, named_parameters, refuse_odd, state_dtype
from rwalk.anchors.factors import Moments
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.wrappers import full_parameters, module_class
from rwalk.gradients.batches import ExampleBatch, examples
from rwalk.gradients.comparison import CANCELLED, GradientFit
from rwalk.gradients.isolation import ModelSnapshot, isolated
from rwalk.gradients.objectives import Scores
from rwalk.gradients.over_data import check_totals
from rwalk.rules.base import Objective


def moments(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
) -> Callable[..., dict[str, Moments]]:
    """Prepare passes over data that measure second moments: for each batch one forward pass and few backward passes.

    A layer is measured if its class is exactly `torch.nn.Linear`, its weight is protected and used by no other module, and the
    data reach it. At the first examples, the gradient of its weight has to follow from its inputs and the gradients of its
    outputs; else the layer is left out, with a warning. If a layer is applied several times to an example, as along a sequence,
    A is the mean over all times and G the sum, averaged over the examples that count: different times are taken as independent
    (Eschenhagen et al. 2023, arXiv 2311.00636).

    Args:
        model: as for `per_example_over`.
        theta: as there.
        data: as there.
        loss: as there.
        logits: as there.

    Returns:
        A function `factors(objective, samples=None)` that returns the moments in state precision, by the names of weights. The
        objectives are those of `per_example_over` except "norm", and so are the errors.
    """
    return partial(_factors, model, theta, data, loss, logits)


def _factors(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    logits: Callable[[Any], Tensor] | None,
    objective: Objective,
    samples: int | None = None,
) -> dict[str, Moments]:
    """Go through the data once: see `moments`."""
    scores, ranks, root = Scores(objective, loss, logits), Ranks.of(model), bare(model)
    refuse_odd(theta)
    with full_parameters(model), isolated(model, loss, logits) as snapshot:
        layers = _linear_layers(root, named_parameters(model), theta)
        device = next((p.device for p in theta.values()), torch.device("cpu"))
        count = 0
        for raw in examples(data, ranks.share(samples), device, scores.is_likelihood):
            batch = scores.prepare(root, raw, snapshot)
            size = batch.size if scores.is_likelihood else 1  # a user's loss takes one example
            with _hooked(layers):
                for start in range(0, batch.size, size or 1):
                    _add(root, batch.cut(start, start + size), layers, scores, snapshot)
            count += batch.size
    sums = [t for layer in layers for t in (layer.inputs, layer.outputs)]
    count = check_totals(sums, count, data, ranks, device, scores)
    measured = [layer for layer in layers if layer.sum_over(ranks)]
    _warn_of([layer.weight for layer in measured if layer.odd])
    return {layer.weight: layer.moments(count) for layer in measured if not layer.odd}


class _LinearSums:
    """A linear layer, the sums of its moments, and its inputs and outputs in the current pass."""

    def __init__(self, module: nn.Linear, weight: str, bias: str | None) -> None:
        self.module, self.weight, self.bias = module, weight, bias
        rows, columns = module.weight.shape
        self.inputs, self.outputs = (
            torch.zeros(n, n, dtype=state_dtype(module.weight), device=module.weight.device)
            for n in (columns + (bias is not None), rows)
        )
        self.rows = 0
        self.compared = self.odd = False
        self.clear()

    def clear(self) -> None:
        """Begin a forward pass."""
        self.y: list[Tensor] = []
        self.x: list[Tensor] = []

    def after_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add inputs, and keep the output for its gradient; later operations may write into a copy."""
        if not torch.is_grad_enabled():
            return output
        x = (args[0] if args else kwargs["input"]).detach().reshape(-1, self.module.in_features).to(self.inputs.dtype)
        if not self.compared:
            self.x.append(x)
        if self.bias is not None:
            x = F.pad(x, (1, 0), value=1.0)
        self.inputs.addmm_(x.T, x)
        self.rows += len(x)
        if not output.requires_grad:
            output.requires_grad_()
        self.y.append(output)
        return output.clone()

    def rows_of(self, gradient: Tensor) -> Tensor:
        """Return gradients of the output as rows."""
        return gradient.detach().reshape(-1, self.module.out_features).to(self.outputs.dtype)

    def add(self, gradient: Tensor | None) -> None:
        """Add gradients of the output."""
        if gradient is not None:
            g = self.rows_of(gradient)
            self.outputs.addmm_(g.T, g)

    def compare(self, gradients: Sequence[Tensor | None], weight: Tensor | None) -> None:
        """Note whether the weight has another gradient than its inputs and the gradients of its outputs give."""
        pairs = [(self.rows_of(g), x) for g, x in zip(gradients, self.x, strict=True) if g is not None]
        total = sum((g.T @ x for g, x in pairs), torch.zeros_like(self.module.weight, dtype=self.outputs.dtype))
        bound = sum((g.square().sum() * x.square().sum() for g, x in pairs), total.new_zeros(()))
        fit = GradientFit.of(total, total.new_zeros(total.shape) if weight is None else weight, bound)
        self.compared = True
        self.odd |= not fit.fits(1.0, CANCELLED)

    def sum_over(self, ranks: Ranks) -> bool:
        """Add up the sums over ranks; return whether any data have reached the layer."""
        for total in (self.inputs, self.outputs):
            ranks.sum_(total)
        self.rows, odd = ranks.sum_(torch.tensor([self.rows, self.odd], device=self.inputs.device)).tolist()
        self.odd = odd > 0
        return self.rows > 0

    def moments(self, count: int) -> Moments:
        """Return the means, over `count` examples."""
        return Moments(self.bias, self.inputs / self.rows, self.outputs / count)


def _linear_layers(root: nn.Module, full: Mapping[str, nn.Parameter], theta: Mapping[str, Any]) -> list[_LinearSums]:
    """Find the layers to measure."""
    names = {id(p): name for name, p in full.items() if name in theta}
    users = [id(p) for module in root.modules() for p in module.parameters(recurse=False)]
    layers = [m for m in root.modules() if isinstance(m, nn.Linear) and module_class(m) is nn.Linear]
    found = [m for m in layers if all(users.count(id(p)) == 1 for p in m.parameters()) and id(m.weight) in names]
    return [_LinearSums(m, names[id(m.weight)], names.get(id(m.bias))) for m in found]


@contextmanager
def _hooked(layers: list[_LinearSums]) -> Iterator[None]:
    handles = [layer.module.register_forward_hook(layer.after_forward, with_kwargs=True, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(root: nn.Module, batch: ExampleBatch, layers: list[_LinearSums], scores: Scores, snapshot: ModelSnapshot) -> None:
    """Add the examples of a batch."""
    for layer in layers:
        layer.clear()
    output = snapshot.call(root, *batch.args, **batch.kwargs)
    outputs = [tensor for layer in layers for tensor in layer.y]
    fresh = [layer for layer in layers if layer.x and layer.module.weight.requires_grad]
    inputs = [*outputs, *(layer.module.weight for layer in fresh)]
    for score in _sums(*scores(output, batch.target, batch.size)) if outputs else ():
        gradients = iter(torch.autograd.grad(score, inputs, retain_graph=True, allow_unused=True))
        own = {layer: list(islice(gradients, len(layer.y))) for layer in layers}
        for layer, found in own.items():
            for gradient in found:
                layer.add(gradient)
        for layer, weight in zip(fresh, gradients, strict=True):
            layer.compare(own[layer], weight)


def _warn_of(odd: list[str]) -> None:
    """Name the layers that are left out."""
    if odd:
        warnings.warn(
            f"The weights of some layers have other gradients than inputs and outputs give ({listed(odd)}): they are "
            "used elsewhere too, or a hook on all modules changes outputs. Such weights are held one by one, as under `EWC`; "
            "what earlier tasks have measured of them stays as it is.",
            stacklevel=9,
        )


def _sums(score: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield sums over examples; the squares of their per-example gradients add up to the objective's."""
    for c in range(score.shape[1]):
        # a masked class must not add 0 * inf
        yield torch.where(weight[:, c] > 0, score[:, c] * weight[:, c].sqrt(), 0).sum()
