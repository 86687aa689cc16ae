"""Per-example gradients over data, for rules that measure importance at a task's end."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn import functional as F

from rwalk._errors import explain
from rwalk.gradients.layered import UNMAPPED, Layers, mapped, reaches
from rwalk.gradients.undisturbed import undisturbed
from rwalk.importance.base import Objective
from rwalk.parallel import Ranks, gathered
from rwalk.parameters import bare, named, state_dtype

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
        loss: called as `loss(output, target)` on batches of one example, returns a scalar; replaces -log p(y|x) of a
            classifier for the objective "true".
        logits: reads the logits from the model's output, which is otherwise a tensor or holds them as `logits`.

    Returns:
        A function `gradients(objective, of, samples=None, only=None)` that returns, for each parameter of `theta` in order and
        shape and in state precision, the mean over examples of `of(gradient of the objective at one example)`. `of` works
        elementwise, fastest as `torch.square` or `torch.abs`, for which inputs of layers and gradients at outputs often do;
        `samples` caps the number of examples; `only` names the parameters to return. Where several ranks train the model, each
        passes its own share of the data, and the mean is over the examples of all. The objectives: "true", log p(y|x) of the
        data's labels; "sample", log p(y|x) of a label drawn from the model; "exact", log p(c|x) for every class c, with `of`
        averaged under p(c|x); "norm", the sum of squares of the outputs. The function raises a ValueError if there are no
        examples or the objective does not fit data, outputs or `loss`, and a TypeError for batches and outputs of other kinds.
    """
    root = bare(model)

    def gradients(
        objective: Objective,
        of: Callable[[Tensor], Tensor],
        samples: int | None = None,
        only: Collection[str] | None = None,
    ) -> list[Tensor]:
        refuse_objective(objective, loss)
        ranks = Ranks.of(model)
        chosen = {name: p for name, p in theta.items() if only is None or name in only}
        with gathered(model), undisturbed(model):
            whole = named(model)
            engine = _Engine(root, {name: whole[name] for name in chosen}, _Score(objective, loss, logits), of)
            for batch in examples(data, ranks.share(samples), engine.device):
                engine.add(batch)
        totals = engine.totals()
        count = checked(totals, engine.count, data, ranks, engine.device)
        return [ranks.sum_part(total, p).div_(count) for total, p in zip(totals, chosen.values(), strict=True)]

    return gradients


def checked(totals: Iterable[Tensor], count: int, data: Any, ranks: Ranks, device: torch.device) -> int:
    """Return over how many examples of all ranks the totals go, or raise a ValueError if none, or if a total is not finite."""
    fine = all(torch.isfinite(total).all() for total in totals)
    found = ranks.sum_(torch.tensor([count, not fine], dtype=torch.int64, device=device)).tolist()
    if not found[0]:
        raise ValueError(_nothing(data))
    if found[1]:
        raise ValueError(
            explain(
                "gradients over the data that are NaN or infinite",
                "finite inputs, weights and losses",
                "Look for NaN in the data and the model.",
            )
        )
    return int(found[0])


def refuse_objective(objective: str, loss: Any) -> None:
    """Refuse an objective that is unknown or does not go with a loss of the user's own."""
    if objective not in get_args(Objective):
        known = ", ".join(f'"{name}"' for name in get_args(Objective))
        raise ValueError(explain(f'objective "{objective}"', f"one of {known}", "Pass one of these."))
    if loss is not None and objective in ("sample", "exact"):
        raise ValueError(
            explain(
                f'a `loss` with the labels "{objective}"',
                "a classifier, whose softmax says how likely each label is",
                'Use `labels="true"` with a `loss` of your own, or leave `loss` out.',
            )
        )


def _nothing(data: Any) -> str:
    if isinstance(data, Iterator):
        return explain(
            f"an iterator (`{type(data).__name__}`) that is used up",
            "data that can be gone through again",
            "Pass the DataLoader itself or a list of batches.",
        )
    return explain("no examples", "data with at least one example", "Check the data set and the cap on the number of samples.")


@dataclass
class Batch:
    """Examples as the model takes them: all tensors have them in their first dimension, but for those whose id is `shared`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int
    shared: frozenset[int]

    def cut(self, start: int, stop: int) -> "Batch":
        """Return the examples from `start` up to `stop`."""
        stop = min(stop, self.size)
        return self._each(lambda t: t[start:stop], stop - start)

    def tree(self) -> tuple[Any, Any]:
        """Return all that a model and a loss need, and for each tensor the dimension to map over: the examples, if at all."""
        single = self._each(lambda t: t.unsqueeze(1), self.size)
        parts = (single.args, single.kwargs, single.target)
        return parts, _mapped(parts, lambda t: None if id(t) in self.shared else 0, lambda _: None)

    def _each(self, function: Callable[[Tensor], Tensor], size: int) -> "Batch":
        def apply(t: Tensor) -> Tensor:
            return t if id(t) in self.shared else function(t)

        args, kwargs, target = (_mapped(part, apply) for part in (self.args, self.kwargs, self.target))
        return Batch(args, kwargs, target, size, self.shared)


def _mapped(tree: Any, leaf: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Replace the tensors in nested tuples, lists and mappings, and what is neither by `other`; mappings become dicts."""
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, leaf, other) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [_mapped(value, leaf, other) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return other(tree)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Go through the tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    for part in parts:
        yield from _tensors(part)


def first_size(tree: Any) -> int | None:
    """Return the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in _tensors(tree) if t.dim()), None)


def examples(data: Iterable[Any], samples: int | None, device: torch.device) -> Iterator[Batch]:
    """Read batches, up to `samples` examples in all, onto the device."""
    left = math.inf if samples is None else samples
    if left <= 0:
        return
    for raw in data:
        batch = _read_batch(raw, device)
        batch = batch.cut(0, int(min(left, batch.size)))
        if batch.size:
            yield batch
        left -= batch.size
        if left <= 0:
            return


def _read_batch(raw: Any, device: torch.device) -> Batch:
    """Tell inputs from target in a batch, or raise a TypeError that names what came."""
    inputs, target = raw, None
    if isinstance(raw, Mapping):
        target = raw.get("labels")
    elif isinstance(raw, tuple | list):
        if len(raw) not in (1, 2):
            raise TypeError(_unreadable(f"a {type(raw).__name__} of {len(raw)}"))
        inputs, target = raw[0], raw[1] if len(raw) == 2 else None
    inputs, target = (_mapped(part, lambda t: t.to(device)) for part in (inputs, target))
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    size = first_size(inputs)
    if size is None:
        raise TypeError(_unreadable(f"a batch whose inputs, a `{type(inputs).__name__}`, hold no tensor"))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    shared = frozenset(id(t) for t in _tensors((inputs, target)) if not t.dim() or t.shape[0] != size)
    return Batch(args, kwargs, target, size, shared)


def _unreadable(came: str) -> str:
    return explain(
        came,
        "batches that are a mapping of the model's arguments, a pair of inputs and target, or inputs as tensors",
        "Let the DataLoader's `collate_fn` return one of these.",
    )


@dataclass(frozen=True)
class _Score:
    """What is differentiated at one example."""

    objective: str
    loss: Callable[[Any, Any], Tensor] | None
    logits: Callable[[Any], Tensor] | None

    def __call__(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Return scores to differentiate one by one and the weights of their gradients, both of shape (scores,)."""
        if self.objective == "true" and target is None:
            raise ValueError(untargeted())
        if self.objective == "true" and self.loss is not None:
            score = scalar(self.loss(output, target))
        elif self.objective == "norm":
            values = read_output(output, self.logits)
            score = values.masked_fill(values == -math.inf, 0).square().sum()  # a shut class is no output
        else:
            return self._likelihood(classes(read_output(output, self.logits)), target)
        return score.reshape(1), torch.ones_like(score).reshape(1)

    def _likelihood(self, z: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of one example from logits of shape (1, classes)."""
        score = F.log_softmax(z.to(state_dtype(z)), dim=1)[0]
        p = score.detach().exp()
        if self.objective == "exact":
            return score, p
        drawn = draw(p) if self.objective == "sample" else labels(target)
        return -F.nll_loss(score.unsqueeze(0), drawn, reduction="sum").reshape(1), torch.ones_like(p[:1])


def untargeted() -> str:
    """Say that a batch has no target."""
    return explain(
        "a batch without a target",
        "labels, which the true log-likelihood and a `loss` are about",
        'Yield pairs `(inputs, target)` or mappings with "labels", or use labels drawn from the model.',
    )


def scalar(value: Any) -> Tensor:
    """Return what `loss` gave as a scalar, or raise a ValueError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a `{type(value).__name__}`"
        raise ValueError(
            explain(f"{came} from `loss`", "a scalar tensor for one example", "Let `loss` average or sum over its output.")
        )
    return value.reshape(())


def read_output(output: Any, logits: Callable[[Any], Tensor] | None) -> Tensor:
    """Find the logits in a model's output."""
    if logits is not None:
        output = logits(output)
    elif not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        output = output if found is None else found
    if not isinstance(output, Tensor):
        raise TypeError(
            explain(
                f"a model output of type `{type(output).__name__}`",
                "a tensor, or an object or mapping with `logits`",
                "Pass `logits=`, a function that reads the logits from the output.",
            )
        )
    return output


def classes(z: Tensor) -> Tensor:
    """Return logits of shape (batch, classes), or raise a ValueError."""
    if z.dim() != 2:
        raise ValueError(
            explain(
                f"logits of shape {tuple(z.shape)} for one example",
                "shape (batch, classes)",
                "Pass `loss=`, the loss of one example, for a model that is no plain classifier.",
            )
        )
    return z


def draw(p: Tensor) -> Tensor:
    """Draw a class for each row of chances p: of independent exponential times with rates p, the first is that of c."""
    return (p / -torch.rand_like(p).log()).argmax(-1).reshape(-1)


def labels(target: Any, size: int = 1) -> Tensor:
    """Return the labels of `size` examples, shape (size,)."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.numel() != size or target.dim() > 1:
        came = f"shape {tuple(target.shape)}, {target.dtype}" if isinstance(target, Tensor) else f"`{type(target).__name__}`"
        raise ValueError(
            explain(
                f"a target of {came} for {'one example' if size == 1 else f'{size} examples'}",
                "one class index" + " each" * (size > 1),
                "Pass `loss=`, the loss of one example, for targets of another kind.",
            )
        )
    return target.reshape(size).long()


class _Scored(nn.Module):
    """A model and what is differentiated of its output, together, so that a user's loss sees the same parameters."""

    def __init__(self, root: nn.Module, score: _Score) -> None:
        super().__init__()
        self.root, self.score = root, score

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Tensor, Tensor]:
        return self.score(self.root(*args, **kwargs), target)


class _Engine:
    """Sum a function of per-example gradients: layer by layer as far as possible, else parameter by parameter.

    That is done for many examples at once where the model allows it, else one by one.
    """

    def __init__(
        self, root: nn.Module, theta: Mapping[str, nn.Parameter], score: _Score, of: Callable[[Tensor], Tensor]
    ) -> None:
        real = {id(p): name for name, p in root.named_parameters()}  # compiled submodules have longer names than `theta` says
        self.theta = {real[id(p)]: p for p in theta.values()}
        self._totals = {name: torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False) for name, p in self.theta.items()}
        self.count = 0
        self.device = next((p.device for p in theta.values()), torch.device("cpu"))
        self._model, self._of, self._by_class = _Scored(root, score), of, score.objective == "exact"
        self._fixed = {f"root.{name}": p.detach() for name, p in root.named_parameters()}
        self._layers = Layers(root, self.theta, of)
        self._mapped = True

    def add(self, batch: Batch) -> None:
        """Add the examples of a batch."""
        start = 0
        with _differentiable(self.theta.values()):
            while start < batch.size:
                chunk = batch.cut(start, start + self._size())
                start += chunk.size
                if self._layers.names:
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
        value = self._of(g.to(state_dtype(g)))
        if not self._by_class:
            return value
        return torch.where(weight == 0, 0, value * weight)  # a shut class must not bring in 0 * inf

    def _alone(self, example: Batch, theta: dict[str, nn.Parameter]) -> None:
        """Add one example by plain autograd."""
        score, weight = self._model(example.args, example.kwargs, example.target)
        for i in range(score.shape[0] if score.requires_grad else 0):
            more = i + 1 < score.shape[0]
            grads = torch.autograd.grad(score[i], list(theta.values()), retain_graph=more, allow_unused=True)
            for name, g in zip(theta, grads, strict=True):
                if g is not None:
                    self._totals[name].add_(self._weighted(g, weight[i]).detach())

    def totals(self) -> list[Tensor]:
        """Return the sums over all examples, in the order of the parameters."""
        for name, total in self._layers.take().items():
            self._totals[name].add_(total)
        return list(self._totals.values())


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have gradients of frozen parameters, too."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _fitting(nbytes: int) -> int:
    """Say how many examples of so many bytes to hold at once."""
    return min(max(MEMORY // max(nbytes, 1), 1), CHUNK)


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on the inputs of a batch, of any of the kinds that `over` takes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    read = _read_batch(batch, device)
    return model(*read.args, **read.kwargs)
