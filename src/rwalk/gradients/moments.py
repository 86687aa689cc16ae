"""Second moments of linear layers over data: of their inputs, and of the gradients at their outputs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._errors import explain
from rwalk.factors import Moments
from rwalk.gradients import loader
from rwalk.gradients.batches import Batch, examples
from rwalk.gradients.comparison import CANCELLED, Comparison
from rwalk.gradients.objective import Scores
from rwalk.gradients.undisturbed import Kept, undisturbed
from rwalk.importance.base import Objective
from rwalk.parallel import Ranks, gathered, kind
from rwalk.parameters import bare, listed, named, refuse_odd, state_dtype


def moments(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
) -> Callable[..., dict[str, Moments]]:
    """Prepare passes over data that measure second moments: for each batch one forward pass and few backward passes.

    A layer is measured if it is exactly a `torch.nn.Linear`, its weight is protected and used by no other module, and the data
    reaches it. The first examples that do must have the gradient of the weight that follows from the layer's inputs and the
    gradients at its outputs; else the layer is left out, with a warning. Where a layer is applied several times to an
    example, as along a sequence, A is the mean over all times and G the sum, averaged over the examples that count: different
    times are taken as independent (Eschenhagen et al. 2023, arXiv 2311.00636).

    Args:
        model: as for `rwalk.gradients.over`.
        theta: as for `over`.
        data: as for `over`.
        loss: as for `over`.
        logits: as for `over`.

    Returns:
        A function `factors(objective, samples=None)` that returns, by the names of weights, the moments in state precision. The
        objectives are those of `over` but "norm". It raises what those of `over` raise.
    """
    root = bare(model)

    def factors(objective: Objective, samples: int | None = None) -> dict[str, Moments]:
        scores = Scores(objective, loss, logits)
        refuse_odd(theta)
        ranks = Ranks.of(model)
        with gathered(model), undisturbed(model, loss, logits) as kept:
            taps = _taps(root, named(model), theta)
            device = next((p.device for p in theta.values()), torch.device("cpu"))
            count = 0
            for raw in examples(data, ranks.share(samples), device, scores.likely):
                batch = scores.ready(root, raw, kept)
                size = batch.size if scores.likely else 1  # a user's loss is about one example
                with _watched(taps):
                    for start in range(0, batch.size, size or 1):
                        _add(root, batch.cut(start, start + size), taps, scores, kept)
                count += batch.size
        sums = [t for tap in taps for t in (tap.inputs, tap.outputs)]
        whole = loader.checked(sums, count, data, ranks, device, scores)
        measured = [tap for tap in taps if tap.joined(ranks)]
        _warn_of([tap.weight for tap in measured if tap.odd])
        return {tap.weight: tap.moments(whole) for tap in measured if not tap.odd}

    return factors


class _Tap:
    """A linear layer and its sums."""

    def __init__(self, module: nn.Linear, weight: str, bias: str | None) -> None:
        self.module, self.weight, self.bias = module, weight, bias
        rows, columns = module.weight.shape
        self.inputs, self.outputs = (
            torch.zeros(n, n, dtype=state_dtype(module.weight), device=module.weight.device)
            for n in (columns + (bias is not None), rows)
        )
        self.rows = 0
        self.compared = self.odd = False
        self.reached: list[Tensor] = []
        self.seen: list[Tensor] = []

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add inputs, and keep the output for its gradient; what follows may write into a copy."""
        if not torch.is_grad_enabled():
            return output
        x = (args[0] if args else kwargs["input"]).detach().reshape(-1, self.module.in_features).to(self.inputs.dtype)
        if not self.compared:
            self.seen.append(x)
        if self.bias is not None:
            x = F.pad(x, (1, 0), value=1.0)
        self.inputs.addmm_(x.T, x)
        self.rows += len(x)
        if not output.requires_grad:
            output.requires_grad_()
        self.reached.append(output)
        return output.clone()

    def rows_of(self, gradient: Tensor) -> Tensor:
        """Return gradients at the output, one row for each place."""
        return gradient.detach().reshape(-1, self.module.out_features).to(self.outputs.dtype)

    def add(self, gradient: Tensor | None) -> None:
        """Add gradients at the output."""
        if gradient is not None:
            g = self.rows_of(gradient)
            self.outputs.addmm_(g.T, g)

    def compare(self, gradients: Sequence[Tensor | None], whole: Tensor | None) -> None:
        """Note whether the weight has another gradient than its inputs and the gradients at its outputs make."""
        pairs = [(self.rows_of(g), x) for g, x in zip(gradients, self.seen, strict=True) if g is not None]
        total = sum((g.T @ x for g, x in pairs), torch.zeros_like(self.module.weight, dtype=self.outputs.dtype))
        apart = sum((g.square().sum() * x.square().sum() for g, x in pairs), total.new_zeros(()))
        self.compared = True
        self.odd |= not Comparison.of(total, total.new_zeros(total.shape) if whole is None else whole, apart).fits(
            1.0, CANCELLED
        )

    def joined(self, ranks: Ranks) -> bool:
        """Add up the sums over ranks; return whether any data has reached the layer."""
        for total in (self.inputs, self.outputs):
            ranks.sum_(total)
        self.rows, odd = ranks.sum_(torch.tensor([self.rows, self.odd], device=self.inputs.device)).tolist()
        self.odd = odd > 0
        return self.rows > 0

    def moments(self, count: int) -> Moments:
        """Return the means, over `count` examples."""
        return Moments(self.bias, self.inputs / self.rows, self.outputs / count)


def _taps(root: nn.Module, whole: Mapping[str, nn.Parameter], theta: Mapping[str, Any]) -> list[_Tap]:
    """Find the layers to measure."""
    names = {id(p): name for name, p in whole.items() if name in theta}
    users = [id(p) for module in root.modules() for p in module.parameters(recurse=False)]
    layers = [m for m in root.modules() if isinstance(m, nn.Linear) and kind(m) is nn.Linear]
    found = [m for m in layers if all(users.count(id(p)) == 1 for p in m.parameters()) and id(m.weight) in names]
    return [_Tap(m, names[id(m.weight)], names.get(id(m.bias))) for m in found]


@contextmanager
def _watched(taps: list[_Tap]) -> Iterator[None]:
    handles = [tap.module.register_forward_hook(tap.see, with_kwargs=True, prepend=True) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(root: nn.Module, batch: Batch, taps: list[_Tap], scores: Scores, kept: Kept) -> None:
    """Add the examples of a batch."""
    for tap in taps:
        tap.reached, tap.seen = [], []
    output = kept.call(root, *batch.args, **batch.kwargs)
    outputs = [tensor for tap in taps for tensor in tap.reached]
    fresh = [tap for tap in taps if tap.seen and tap.module.weight.requires_grad]
    inputs = [*outputs, *(tap.module.weight for tap in fresh)]
    for score in _sums(*scores(output, batch.target, batch.size)) if outputs else ():
        gradients = iter(torch.autograd.grad(score, inputs, retain_graph=True, allow_unused=True))
        own = {tap: list(islice(gradients, len(tap.reached))) for tap in taps}
        for tap, found in own.items():
            for gradient in found:
                tap.add(gradient)
        for tap, whole in zip(fresh, gradients, strict=True):
            tap.compare(own[tap], whole)


def _warn_of(odd: list[str]) -> None:
    """Name the layers that are left out."""
    if odd:
        came = f"layers whose weights have other gradients than their inputs and outputs make ({listed(odd)})"
        expected = "weights that only their layer's own forward uses, as it is, and outputs that no hook on all modules changes"
        remedy = "Such weights are held one by one, as under `EWC`; what earlier tasks have measured of them stays as it is."
        warnings.warn(explain(came, expected, remedy), stacklevel=9)


def _sums(score: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield sums over examples whose gradients, squared example by example, add up to what the objective asks for."""
    for c in range(score.shape[1]):
        yield torch.where(
            weight[:, c] > 0, score[:, c] * weight[:, c].sqrt(), 0
        ).sum()  # a shut class must not bring in 0 * inf
