"""Per-example gradients over data, for rules that measure importance at the end of a task."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from rwalk._parameters import bare, named_parameters, refuse_odd, state_dtype
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.wrappers import full_parameters
from rwalk.gradients.batches import ExampleBatch, examples
from rwalk.gradients.costs import ManyClasses, warn_one_by_one
from rwalk.gradients.isolation import ModelSnapshot, differentiable, isolated
from rwalk.gradients.layerwise import LayerwiseSums
from rwalk.gradients.likelihood import IGNORED, not_binary
from rwalk.gradients.mapping import UNMAPPED, in_agreement, mapped, reaches
from rwalk.gradients.objectives import Scores
from rwalk.gradients.outputs import given_inputs
from rwalk.gradients.texts import readable
from rwalk.rules.base import Objective

MEMORY = 2**28
"""Bytes of per-example gradients, or of layers' inputs and gradients, that one chunk of examples may take."""

CHUNK = 256
"""Most examples in one chunk."""

FIRST = 8
"""Examples in the first chunk, which shows how much memory an example takes."""

FASTER = (
    'Use `Kronecker(measure="data")`, which takes whole batches, measure fewer examples with `samples=`, or change what the '
    "model or `logits` does there."
)
"""What to do if examples are measured one at a time."""

HELD_ELSEWHERE = "the scores depend on parameters that something else than the model's modules holds, such as a list or a loss"


def per_example_over(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[..., Tensor] | None = None,
) -> Callable[..., list[Tensor]]:
    """Prepare passes over data that average a function of per-example gradients.

    Args:
        model: the network; it may be compiled or wrapped for distributed training.
        theta: the parameters of the model to differentiate, by name; everything else is constant.
        data: batches: a mapping for `model(**batch)` with its target under "labels", a pair `(inputs, target)`, or inputs
            alone. Inputs are a tensor, a tuple or list for `model(*inputs)`, or a mapping for `model(**inputs)`. The first
            dimension of the tensors is that of the examples. Inputs may be texts if the model has `preprocess` or `tokenize`.
        loss: for the objective "true", called as `loss(output, target)` on batches of one example; returns a scalar that
            replaces -log p(y|x). For "sample" and "exact", what the outputs mean: `cross_entropy` is a softmax over the second
            dimension, `binary_cross_entropy_with_logits` a probability for each output, `mse_loss` a mean for each output, with
            variance 1; these functions of `torch.nn.functional`, or their modules without weights or smoothing.
        logits: reads the logits from the model's output, which is otherwise a tensor or holds them as `logits` or
            `sentence_embedding`. With two arguments it gets the output and the batch as the model was given it.

    Without `loss`, p(y|x) follows from logits and targets of the first batch. One logit a row is a probability if all targets
    are 0 or 1, else the mean of a normal distribution of variance 1. Several are a softmax, with one row for each example or
    with more, whose log-likelihoods add up: (batch * rows, classes), (batch, rows, classes) or, as in `cross_entropy`,
    (batch, classes, ...). Targets are class indices; without targets, tokens of shape (batch, rows) show which of three
    dimensions are rows. Targets of -100 are ignored except in a regression, and so are examples without any other target. If
    the output holds a loss of the model's own, labels belong to the logits at their own place or, in causal language models,
    to those one place before, whichever gives that loss. Otherwise they belong to the logits at their own place.

    Examples lie along the first dimension and must not depend on each other. The first batch is checked: the output for one of
    three examples has to be that for the example alone, up to the root of the precision. This takes three small forward
    passes. Models that take one example at a time, or draw random numbers in evaluation mode, cannot be checked. Each forward
    pass begins with the attributes and buffers that the model has now.

    Returns:
        A function `gradients(objective, of, samples=None, only=None)` that returns, for each parameter of `theta` in order and
        shape and in state precision, the mean over examples of `of(gradient of the objective at one example)`. `of` works
        elementwise, fastest as `torch.square` or `torch.abs`, for which inputs of layers and gradients of their outputs often
        suffice; `samples` caps the number of examples; `only` names the parameters to return. If several ranks train the model,
        each passes its own share of the data, and the mean is over the examples of all. The objectives: "true", log p(y|x) of
        the data's labels; "sample", log p(y|x) of labels drawn from the model, one for each row that counts; "exact", log
        p(c|x) for every class c, with `of` averaged under p(c|x), for one row an example, and for single outputs, one pass for
        each, with `torch.square`; "norm", the sum of squares of the outputs; "output", the output along a random direction,
        whose squared gradient has the mean diag(J^T J), without labels. The function raises a ValueError if there are no
        examples, if examples depend on each other, if all outputs have the same norm under "norm", or if objective, data,
        outputs and `loss` do not fit, and a TypeError for batches and outputs of other kinds.
    """
    return partial(_gradients, model, theta, data, loss, logits)


def _gradients(
    model: nn.Module,
    theta: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    logits: Callable[..., Tensor] | None,
    objective: Objective,
    of: Callable[[Tensor], Tensor],
    samples: int | None = None,
    only: Collection[str] | None = None,
) -> list[Tensor]:
    """Go through the data once: see `per_example_over`."""
    scores, ranks, root = Scores(objective, loss, logits), Ranks.of(model), bare(model)
    refuse_odd(theta)
    chosen = {name: p for name, p in theta.items() if only is None or name in only}
    with full_parameters(model), isolated(model, loss, logits) as snapshot:
        full = named_parameters(model)
        engine = _Engine(root, {name: full[name] for name in chosen}, scores, of, snapshot)
        watch, read = ManyClasses(root, data, ranks.share(samples)), (readable(root, raw) for raw in data)
        for batch in examples(read, ranks.share(samples), engine.device, scores.is_likelihood):
            counted = scores.prepare(root, batch, snapshot)
            for part in watch.parts(counted, scores.passes):
                engine.add(part)
    totals = engine.totals()
    count = check_totals(totals, engine.count, data, ranks, engine.device, scores)
    return [ranks.sum_local_part(total, p).div_(count) for total, p in zip(totals, chosen.values(), strict=True)]


def check_totals(totals: Iterable[Tensor], count: int, data: Any, ranks: Ranks, device: torch.device, scores: Scores) -> int:
    """Return the number of examples of all ranks; raise a ValueError if it is 0, or if a total is not finite."""
    finite = all(torch.isfinite(total).all() for total in totals)
    family = None if scores.likelihood is None or scores.likelihood.named else scores.likelihood.family
    figures = [count, not finite, family == "bernoulli", family == "gaussian"]
    figures = ranks.sum_(torch.tensor(figures, dtype=torch.int64, device=device)).tolist()
    all_examples, not_finite, bernoulli, gaussian = figures
    if not all_examples:
        raise ValueError(_no_examples(data, scores.ignored))
    if not_finite:
        raise ValueError("Some gradients over the data are NaN or infinite. Look for NaN in the data and the model.")
    if bernoulli and gaussian:
        raise ValueError(not_binary())
    return int(all_examples)


def _no_examples(data: Any, ignored: int) -> str:
    if ignored:
        return f"The data hold {ignored} examples whose targets are all ignored. Look for targets other than {IGNORED}."
    if isinstance(data, Iterator):
        return f"The data are an iterator (`{type(data).__name__}`) that is used up. Pass the DataLoader or a list of batches."
    return "The data hold no examples. Check the data set and the cap on the number of samples."


class _Scored(nn.Module):
    """A model together with the scores of its output, so that both see the same replaced parameters."""

    def __init__(self, root: nn.Module, scores: Scores) -> None:
        super().__init__()
        self.root, self.scores = root, scores

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Tensor, Tensor]:
        score, weight = self.scores(self.root(*args, **kwargs), given_inputs(args, kwargs), target)
        return score[0], weight[0]


class _Engine:
    """Sums a function of per-example gradients: layer by layer as far as possible, else parameter by parameter.

    Parameter by parameter, this takes many examples at once if the model can be mapped over them, else one by one.
    """

    def __init__(
        self,
        root: nn.Module,
        theta: Mapping[str, nn.Parameter],
        scores: Scores,
        of: Callable[[Tensor], Tensor],
        snapshot: ModelSnapshot,
    ) -> None:
        real = {id(p): name for name, p in root.named_parameters()}  # compiled submodules have longer names than in `theta`
        self.theta = {real[id(p)]: p for p in theta.values()}
        self._totals = {name: torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False) for name, p in self.theta.items()}
        self.count = 0
        self.device = next((p.device for p in theta.values()), torch.device("cpu"))
        self._model, self._of, self._by_class = _Scored(root, scores), of, scores.objective == "exact"
        self._objective, self._snapshot = scores, snapshot
        self._fixed = {f"root.{name}": p.detach() for name, p in root.named_parameters()}
        self._layers = LayerwiseSums(root, self.theta, of)
        self._mapped, self._why = True, HELD_ELSEWHERE

    def add(self, batch: ExampleBatch) -> None:
        """Add the examples of a batch."""
        start = 0
        self._refuse_function()
        with differentiable(self.theta.values()):
            while start < batch.size:
                chunk = batch.cut(start, start + self._size())
                start += chunk.size
                for group in in_agreement(chunk, self._add_layers):
                    self._add_rest(group, {name: p for name, p in self.theta.items() if name not in self._layers.names})
        self.count += batch.size

    def _size(self) -> int:
        """Return how many examples to take next."""
        if not self._layers.names:
            return CHUNK
        return FIRST if self._layers.bytes_per_example is None else _fitting(self._layers.bytes_per_example)

    def _add_rest(self, chunk: ExampleBatch, theta: dict[str, nn.Parameter]) -> None:
        """Add examples for some parameters by their full per-example gradients."""
        size = _fitting(sum(p.numel() * state_dtype(p).itemsize for p in theta.values()))
        for start in range(0, chunk.size if theta else 0, size):
            part = chunk.cut(start, start + size)
            for added, group in in_agreement(part, lambda group: (self._add_mapped(group, theta), group)):
                for i in range(0 if added else group.size):
                    self._add_one(group.cut(i, i + 1), theta)
                    warn_one_by_one(self._model.root, self._why, FASTER)

    def _add_layers(self, chunk: ExampleBatch) -> ExampleBatch:
        """Add a chunk for the parameters that can be summed layer by layer; return it."""
        if self._layers.names:
            self._snapshot.restore()
            self._layers.add(self._scores, self.theta, *chunk.tree(), chunk.size)
        return chunk

    def _add_mapped(self, chunk: ExampleBatch, theta: dict[str, nn.Parameter]) -> bool:
        """Add a chunk by `vmap`; if the model cannot be mapped, return False and do not try again."""
        if not self._mapped:
            return False
        examples, dims = chunk.tree()
        self._snapshot.restore()
        try:
            fixed = {name: p.detach() for name, p in theta.items()}
            score, terms = mapped(self._terms, chunk.size, (None, dims), fixed, examples)
            self._mapped = not reaches(score, self.theta.values())
        except UNMAPPED as error:  # `_add_one` raises errors of the user's own again
            self._mapped, self._why = False, str(error)
        for name, term in terms.items() if self._mapped else ():
            self._totals[name].add_(term.detach().sum(0))
        return self._mapped

    def _scores(self, theta: Mapping[str, Tensor], example: tuple[Any, ...]) -> Any:
        """Return the scores of one example, and the weights of their gradients, with some parameters replaced."""
        return functional_call(self._model, self._fixed | {f"root.{name}": t for name, t in theta.items()}, example)

    def _terms(self, _: Tensor, theta: dict[str, Tensor], example: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores of one example, and its contribution for each parameter."""
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
        return torch.where(weight == 0, 0, value * weight)  # a masked class must not add 0 * inf

    def _add_one(self, example: ExampleBatch, theta: dict[str, nn.Parameter]) -> None:
        """Add one example by plain autograd."""
        self._snapshot.restore()
        score, weight = self._model(example.args, example.kwargs, example.target)
        for i in range(score.shape[0] if score.requires_grad else 0):
            more = i + 1 < score.shape[0]
            grads = torch.autograd.grad(score[i], list(theta.values()), retain_graph=more, allow_unused=True)
            for name, g in zip(theta, grads, strict=True):
                if g is not None:
                    self._totals[name].add_(self._weighted(g, weight[i]).detach())

    def _refuse_function(self) -> None:
        """Raise a ValueError if the expectation of a function of the gradient has no closed form."""
        known = self._objective.likelihood
        if self._by_class and known is not None and known.classes == 1 and self._of is not torch.square:
            raise ValueError(
                f'The labels "exact" of single outputs take `torch.square` of the gradients, and not {self._of}. '
                "Use labels drawn from the model."
            )

    def totals(self) -> list[Tensor]:
        """Return the sums over all examples, in the order of the parameters."""
        for name, total in self._layers.take().items():
            self._totals[name].add_(total)
        return list(self._totals.values())


def _fitting(nbytes: int) -> int:
    """Return how many examples fit into `MEMORY`, given the bytes of one."""
    return min(max(MEMORY // max(nbytes, 1), 1), CHUNK)
