"""Second moments of linear layers over data: of their inputs, and of the gradients at their outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk.factors import Moments
from rwalk.gradients import loader
from rwalk.gradients.batches import Batch, examples
from rwalk.gradients.objective import Scores
from rwalk.gradients.undisturbed import Kept, undisturbed
from rwalk.importance.base import Objective
from rwalk.parallel import Ranks, gathered, kind
from rwalk.parameters import bare, named, refuse_odd, state_dtype


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
    reaches it. Where it is applied several times to an example, as along a sequence, A is the mean over all times and G the
    sum, averaged over the examples that count: different times are taken as independent (Eschenhagen et al. 2023, arXiv
    2311.00636).

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
        return {tap.weight: tap.moments(whole) for tap in taps if tap.joined(ranks)}

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
        self.reached: list[Tensor] = []

    def see(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add inputs, and keep the output for its gradient; what follows may write into a copy."""
        x = args[0].detach().reshape(-1, self.module.in_features).to(self.inputs.dtype)
        if self.bias is not None:
            x = F.pad(x, (1, 0), value=1.0)
        self.inputs.addmm_(x.T, x)
        self.rows += len(x)
        if not output.requires_grad:
            output.requires_grad_()
        self.reached.append(output)
        return output.clone()

    def add(self, gradient: Tensor | None) -> None:
        """Add gradients at the output."""
        if gradient is not None:
            g = gradient.detach().reshape(-1, self.module.out_features).to(self.outputs.dtype)
            self.outputs.addmm_(g.T, g)

    def joined(self, ranks: Ranks) -> bool:
        """Add up the sums over ranks; return whether any data has reached the layer."""
        for total in (self.inputs, self.outputs):
            ranks.sum_(total)
        self.rows = int(ranks.sum_(torch.tensor(self.rows, device=self.inputs.device)))
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
    handles = [tap.module.register_forward_hook(tap.see) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(root: nn.Module, batch: Batch, taps: list[_Tap], scores: Scores, kept: Kept) -> None:
    """Add the examples of a batch."""
    for tap in taps:
        tap.reached = []
    output = kept.call(root, *batch.args, **batch.kwargs)
    reached = [(tap, tensor) for tap in taps for tensor in tap.reached]
    for score in _sums(*scores(output, batch.target, batch.size)) if reached else ():
        gradients = torch.autograd.grad(score, [t for _, t in reached], retain_graph=True, allow_unused=True)
        for (tap, _), gradient in zip(reached, gradients, strict=True):
            tap.add(gradient)


def _sums(score: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield sums over examples whose gradients, squared example by example, add up to what the objective asks for."""
    for c in range(score.shape[1]):
        yield torch.where(
            weight[:, c] > 0, score[:, c] * weight[:, c].sqrt(), 0
        ).sum()  # a shut class must not bring in 0 * inf
