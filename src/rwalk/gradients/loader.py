"""Per-example gradients over data, for rules that measure importance at a task's end."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from rwalk._errors import explain
from rwalk.gradients.batches import Batch, examples
from rwalk.gradients.layered import UNMAPPED, Layers, mapped, reaches
from rwalk.gradients.likelihood import IGNORED, not_binary
from rwalk.gradients.objective import Scores
from rwalk.gradients.undisturbed import Kept, differentiable, undisturbed
from rwalk.importance.base import Objective
from rwalk.parallel import Ranks, gathered
from rwalk.parameters import bare, named, refuse_odd, state_dtype

MEMORY = 2**28
"""Bytes of per-example gradients, or of layers' inputs and gradients, that one chunk of a pass over data may hold."""

CHUNK = 256
"""Most examples in one chunk."""

FIRST = 8
"""Examples in the first chunk, after which it is known what they take."""


def over(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
) -> Callable[..., list[Tensor]]:
    """Prepare passes over data that average a function of per-example gradients.

    Args:
        model: the network; it may be compiled or wrapped for distributed training.
        theta: the parameters of the model to differentiate, by name; everything else is constant.
        data: batches: a mapping for `model(**batch)` with its target under "labels", a pair `(inputs, target)`, or inputs
            alone. Inputs are a tensor, a tuple or list for `model(*inputs)`, or a mapping for `model(**inputs)`. The first
            dimension of the tensors is that of the examples.
        loss: for the objective "true", called as `loss(output, target)` on batches of one example; returns a scalar, which
            replaces -log p(y|x). For "sample" and "exact", what the outputs mean: `cross_entropy` is a softmax over the second
            dimension, `binary_cross_entropy_with_logits` a chance for each output, `mse_loss` a mean for each output, with
            variance 1; these functions of `torch.nn.functional`, or their modules without weights or smoothing.
        logits: reads the logits from the model's output, which is otherwise a tensor or holds them as `logits`.

    Without `loss`, p(y|x) follows from logits and targets of the first batch. One logit a row is a chance if all targets are 0
    or 1, else the mean of a normal distribution of variance 1. Several are a softmax, of one row for each example or of more,
    whose log-likelihoods add up: (batch * rows, classes), (batch, rows, classes) or, as `cross_entropy` takes them,
    (batch, classes, ...); targets are class indices, and where there are none, tokens of shape (batch, rows) tell three
    dimensions apart. Targets of -100 do not count but in a regression, nor do examples without any other. If the
    output holds a loss of the model's own, labels stand where that loss has them: at their logits or, in causal language
    models, one place later. Otherwise they stand at their logits.

    Examples lie along the first dimension and must not depend on each other. The first batch tells: the output for one of
    three examples has to be that for the example alone, up to the root of the precision. This takes three small forward
    passes. It cannot be told of models that take one example at a time, or that draw random numbers in evaluation mode.
    Each forward pass begins with the attributes and buffers that the model has now.

    Returns:
        A function `gradients(objective, of, samples=None, only=None)` that returns, for each parameter of `theta` in order and
        shape and in state precision, the mean over examples of `of(gradient of the objective at one example)`. `of` works
        elementwise, fastest as `torch.square` or `torch.abs`, for which inputs of layers and gradients at outputs often do;
        `samples` caps the number of examples; `only` names the parameters to return. Where several ranks train the model, each
        passes its own share of the data, and the mean is over the examples of all. The objectives: "true", log p(y|x) of the
        data's labels; "sample", log p(y|x) of labels drawn from the model, one for each row that counts; "exact", log p(c|x)
        for every class c, with `of` averaged under p(c|x), for one row an example, and for single outputs, of which each takes
        one pass, with `torch.square`; "norm", the sum of squares of the outputs. The function raises a ValueError if there are
        no examples, if examples depend on each other, or if objective, data, outputs and `loss` do not fit, and a TypeError for
        batches and outputs of other kinds.
    """
    root = bare(model)

    def gradients(
        objective: Objective,
        of: Callable[[Tensor], Tensor],
        samples: int | None = None,
        only: Collection[str] | None = None,
    ) -> list[Tensor]:
        scores = Scores(objective, loss, logits)
        refuse_odd(theta)
        ranks = Ranks.of(model)
        chosen = {name: p for name, p in theta.items() if only is None or name in only}
        with gathered(model), undisturbed(model, loss, logits) as kept:
            whole = named(model)
            engine = _Engine(root, {name: whole[name] for name in chosen}, scores, of, kept)
            for batch in examples(data, ranks.share(samples), engine.device, scores.likely):
                engine.add(scores.ready(root, batch, kept))
        totals = engine.totals()
        count = checked(totals, engine.count, data, ranks, engine.device, scores)
        return [ranks.sum_part(total, p).div_(count) for total, p in zip(totals, chosen.values(), strict=True)]

    return gradients


def checked(totals: Iterable[Tensor], count: int, data: Any, ranks: Ranks, device: torch.device, scores: Scores) -> int:
    """Return over how many examples of all ranks the totals go, or raise a ValueError if none, or if a total is not finite."""
    fine = all(torch.isfinite(total).all() for total in totals)
    family = None if scores.likelihood is None or scores.likelihood.named else scores.likelihood.family
    figures = [count, not fine, family == "bernoulli", family == "gaussian"]
    found = ranks.sum_(torch.tensor(figures, dtype=torch.int64, device=device)).tolist()
    if not found[0]:
        raise ValueError(_nothing(data, scores.ignored))
    if found[1]:
        raise ValueError(
            explain(
                "gradients over the data that are NaN or infinite",
                "finite inputs, weights and losses",
                "Look for NaN in the data and the model.",
            )
        )
    if found[2] and found[3]:
        raise ValueError(not_binary())
    return int(found[0])


def _nothing(data: Any, ignored: int) -> str:
    if ignored:
        came, expected = f"{ignored} examples whose targets are all ignored", "a target that counts"
        return explain(came, expected, f"Look for targets other than {IGNORED}.")
    if isinstance(data, Iterator):
        return explain(
            f"an iterator (`{type(data).__name__}`) that is used up",
            "data that can be gone through again",
            "Pass the DataLoader itself or a list of batches.",
        )
    return explain("no examples", "data with at least one example", "Check the data set and the cap on the number of samples.")


class _Scored(nn.Module):
    """A model and what is differentiated of its output, together, so that a user's loss sees the same parameters."""

    def __init__(self, root: nn.Module, scores: Scores) -> None:
        super().__init__()
        self.root, self.scores = root, scores

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Tensor, Tensor]:
        score, weight = self.scores(self.root(*args, **kwargs), target)
        return score[0], weight[0]


class _Engine:
    """Sum a function of per-example gradients: layer by layer as far as possible, else parameter by parameter.

    That is done for many examples at once where the model allows it, else one by one.
    """

    def __init__(
        self, root: nn.Module, theta: Mapping[str, nn.Parameter], scores: Scores, of: Callable[[Tensor], Tensor], kept: Kept
    ) -> None:
        real = {id(p): name for name, p in root.named_parameters()}  # compiled submodules have longer names than `theta` says
        self.theta = {real[id(p)]: p for p in theta.values()}
        self._totals = {name: torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False) for name, p in self.theta.items()}
        self.count = 0
        self.device = next((p.device for p in theta.values()), torch.device("cpu"))
        self._model, self._of, self._by_class = _Scored(root, scores), of, scores.objective == "exact"
        self._scored, self._kept = scores, kept
        self._fixed = {f"root.{name}": p.detach() for name, p in root.named_parameters()}
        self._layers = Layers(root, self.theta, of)
        self._mapped = True

    def add(self, batch: Batch) -> None:
        """Add the examples of a batch."""
        start = 0
        self._refuse_function()
        with differentiable(self.theta.values()):
            while start < batch.size:
                chunk = batch.cut(start, start + self._size())
                start += chunk.size
                if self._layers.names:
                    self._kept.restore()
                    self._layers.add(self._scores, self.theta, *chunk.tree(), chunk.size)
                self._add_rest(chunk, {name: p for name, p in self.theta.items() if name not in self._layers.names})
        self.count += batch.size

    def _size(self) -> int:
        """Say how many examples to take next."""
        if not self._layers.names:
            return CHUNK
        return FIRST if self._layers.held is None else _fitting(self._layers.held)

    def _add_rest(self, chunk: Batch, theta: dict[str, nn.Parameter]) -> None:
        """Add examples for some parameters, whose per-example gradients are made in full."""
        size = _fitting(sum(p.numel() * state_dtype(p).itemsize for p in theta.values()))
        for start in range(0, chunk.size if theta else 0, size):
            part = chunk.cut(start, start + size)
            if not self._mapped or not self._together(part, theta):
                for i in range(part.size):
                    self._alone(part.cut(i, i + 1), theta)

    def _together(self, chunk: Batch, theta: dict[str, nn.Parameter]) -> bool:
        """Add a chunk by `vmap`; where the model cannot be mapped, return False and leave it at that from then on."""
        examples, dims = chunk.tree()
        self._kept.restore()
        try:
            score, terms = mapped(self._terms, (None, dims), {name: p.detach() for name, p in theta.items()}, examples)
            self._mapped = not reaches(score, self.theta.values())
        except UNMAPPED:  # `_alone` meets errors of the user's own again
            self._mapped = False
        for name, term in terms.items() if self._mapped else ():
            self._totals[name].add_(term.detach().sum(0))
        return self._mapped

    def _scores(self, theta: Mapping[str, Tensor], example: tuple[Any, ...]) -> Any:
        """Return the scores of one example, and the weights of their gradients, with some parameters replaced."""
        return functional_call(self._model, self._fixed | {f"root.{name}": t for name, t in theta.items()}, example)

    def _terms(self, theta: dict[str, Tensor], example: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores of one example, and what it contributes for each parameter."""
        score, pull, weight = cast(tuple[Any, ...], vjp(partial(self._scores, example=example), theta, has_aux=True))
        unit = torch.eye(score.shape[0], dtype=score.dtype, device=score.device)
        terms: dict[str, Tensor] = {}
        for i in range(score.shape[0]):
            for name, g in pull(unit[i])[0].items():
                term = self._weighted(g, weight[i])
                terms[name] = terms[name] + term if i else term
        return score, terms

    def _weighted(self, g: Tensor, weight: Tensor) -> Tensor:
        value = self._of((g.to_dense() if g.is_sparse else g).to(state_dtype(g)))
        if not self._by_class:
            return value
        return torch.where(weight == 0, 0, value * weight)  # a shut class must not bring in 0 * inf

    def _alone(self, example: Batch, theta: dict[str, nn.Parameter]) -> None:
        """Add one example by plain autograd."""
        self._kept.restore()
        score, weight = self._model(example.args, example.kwargs, example.target)
        for i in range(score.shape[0] if score.requires_grad else 0):
            more = i + 1 < score.shape[0]
            grads = torch.autograd.grad(score[i], list(theta.values()), retain_graph=more, allow_unused=True)
            for name, g in zip(theta, grads, strict=True):
                if g is not None:
                    self._totals[name].add_(self._weighted(g, weight[i]).detach())

    def _refuse_function(self) -> None:
        """Raise a ValueError where the expectation of a function of the gradient has no closed form."""
        known = self._scored.likelihood
        if self._by_class and known is not None and known.classes == 1 and self._of is not torch.square:
            came = f'the labels "exact" with {self._of} of the gradients of single outputs'
            raise ValueError(explain(came, "`torch.square`", "Use labels drawn from the model."))

    def totals(self) -> list[Tensor]:
        """Return the sums over all examples, in the order of the parameters."""
        for name, total in self._layers.take().items():
            self._totals[name].add_(total)
        return list(self._totals.values())


def _fitting(nbytes: int) -> int:
    """Say how many examples of so many bytes to hold at once."""
    return min(max(MEMORY // max(nbytes, 1), 1), CHUNK)
