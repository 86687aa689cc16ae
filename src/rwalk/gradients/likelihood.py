"""How likely a model's outputs make targets: which distribution they mean, and its log-likelihood for one example or many."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._errors import explain
from rwalk.gradients.batches import tensors
from rwalk.importance.base import Objective
from rwalk.parameters import state_dtype

IGNORED = -100
"""The class index that does not count, as in `torch.nn.functional.cross_entropy`."""

SHAPING = frozenset(
    f"{name}Backward{variant}"
    for variant in range(3)
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Transpose", "Permute", "T"),
        *("Squeeze", "Unsqueeze", "Select", "Slice", "Split", "Unbind"),
    )
)
"""Operations that change no value, as autograd calls them."""

Family = Literal["categorical", "bernoulli", "gaussian"]

NAMED: dict[Any, Family] = {
    F.cross_entropy: "categorical",
    nn.CrossEntropyLoss: "categorical",
    F.binary_cross_entropy_with_logits: "bernoulli",
    nn.BCEWithLogitsLoss: "bernoulli",
    F.mse_loss: "gaussian",
    nn.MSELoss: "gaussian",
}
"""Losses that name a distribution, as functions or modules of `torch.nn`."""

REMEDY = (
    "Pass `loss=torch.nn.functional.cross_entropy`, `binary_cross_entropy_with_logits` or `mse_loss` to say what the outputs "
    'mean; with `labels="true"` any loss of one example will do.'
)


@dataclass(frozen=True)
class Likelihood:
    """The distribution of an example's targets given the model's output.

    Rows of class logits, or single outputs, are independent given the inputs: an example's log-likelihood is their sum.

    Args:
        family: "categorical" over the logits of a row; for each output z by itself "bernoulli", with the chance sigmoid(z) of
            a 1, or "gaussian", with mean z and variance 1.
        dim: where the classes are in logits of three or more dimensions, 1 or -1.
        classes: how many there are; 1 for the other families.
        shifted: whether a row is about the target after its own, as in causal language models.
        ignored: the class index that does not count.
        named: whether the user has named the family; of targets only whole numbers then matter, as some may be ignored.
    """

    family: Family
    dim: int = -1
    classes: int = 1
    shifted: bool = False
    ignored: int = IGNORED
    named: bool = False

    def scores(self, objective: Objective, z: Tensor, target: Any, size: int = 1) -> tuple[Tensor, Tensor]:
        """Return scores to differentiate one by one, and the weights of their gradients.

        Args:
            objective: "true", "sample" or "exact", as for `rwalk.gradients.over`.
            z: logits of `size` examples, in its first dimension one example after the other.
            target: their targets, with the examples in the first dimension, or None.
            size: how many examples there are.

        Returns:
            Two tensors of shape (size, scores).

        Raises:
            ValueError: if logits, targets and objective do not fit.
        """
        z = z.to(state_dtype(z))
        return self._of_rows(objective, z, target, size) if self.classes > 1 else self._of_outputs(objective, z, target, size)

    def _of_rows(self, objective: Objective, z: Tensor, target: Any, size: int) -> tuple[Tensor, Tensor]:
        score = F.log_softmax(self._rows(z, size), -1)
        p = score.detach().exp()
        y, counts = self._targets(objective, target, score[..., 0])
        if objective == "exact":
            if score.shape[1] > 1:
                raise ValueError(many_rows(score.shape[1]))
            return score[:, 0], p[:, 0]
        label = draw(p) if y is None or objective == "sample" else torch.where(counts, y, 0)
        picked = torch.where(counts, score.gather(-1, label.unsqueeze(-1)).squeeze(-1), 0).sum(1, keepdim=True)
        return picked, torch.ones_like(picked)

    def _of_outputs(self, objective: Objective, z: Tensor, target: Any, size: int) -> tuple[Tensor, Tensor]:
        """Return scores of outputs that each have a distribution of their own, of an exponential family.

        Where z is the natural parameter, the score's expected square is the variance of the target times that of z's gradient.
        """
        z = z.reshape(size, -1)
        gaussian = self.family == "gaussian"
        mean = z.detach() if gaussian else z.detach().sigmoid()
        y, counts = self._targets(objective, target, z)
        if objective == "exact":
            return z, torch.where(counts, torch.ones_like(mean) if gaussian else mean * (1 - mean), 0)
        if y is None or objective == "sample":
            y = mean + torch.randn_like(mean) if gaussian else (torch.rand_like(mean) < mean).to(z.dtype)
        y = y.to(z.dtype)
        each = (
            F.mse_loss(z, y, reduction="none") / 2 if gaussian else F.binary_cross_entropy_with_logits(z, y, reduction="none")
        )
        score = torch.where(counts, -each, 0).sum(1, keepdim=True)
        return score, torch.ones_like(score)

    def _rows(self, z: Tensor, size: int) -> Tensor:
        """Return logits of shape (size, rows, classes)."""
        z = z.movedim(self.dim, -1) if z.dim() > 2 else z
        if z.dim() < 2 or z.shape[-1] != self.classes or z.shape[0] % size:
            came = f"logits of shape {tuple(z.shape)} for {_counted(size, 'example')}"
            raise ValueError(explain(came, f"rows of {self.classes} classes as in the first batch", REMEDY))
        return z.reshape(size, -1, self.classes)

    def _targets(self, objective: Objective, target: Any, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return targets in the shape of `like`, (size, rows), None if there are none, and which of them count."""
        every = torch.ones((), dtype=torch.bool, device=like.device)
        if not isinstance(target, Tensor) and objective != "true":
            return None, every
        self._refuse_shape(target, *like.shape)
        if self.named and not self._ignores(target):
            return None, every
        y = target.reshape(like.shape)
        if not self._ignores(y):
            return y, every
        y = y.long()
        if self.shifted:
            y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], self.ignored)], 1)
        return y, y != self.ignored

    def _refuse_shape(self, target: Any, size: int, rows: int) -> None:
        """Raise a ValueError for targets that are not one for each row: one index, one number, or chances for all classes."""
        categorical, whole = self.family == "categorical", _whole(target)
        each = self.classes if categorical and not whole else 1
        fits = isinstance(target, Tensor) and target.numel() == size * rows * each and (whole or self.named or not categorical)
        if not fits:
            came = f"a target of {_described(target)} for {_counted(size, 'example')} of {_counted(rows, 'row')} of outputs"
            remedy = "Pass inputs alone, or targets that belong to them." if self.named else REMEDY
            raise ValueError(explain(came, f"one {'class index' if categorical else 'number'} for each row", remedy))

    def counted(self, target: Any, size: int) -> Tensor | None:
        """Return which examples have a target that counts, of shape (size,); None if all of them do, whatever they are."""
        if not self._ignores(target):
            return None
        counts: Tensor = (target.long().reshape(size, -1)[:, int(self.shifted) :] != self.ignored).any(1)
        return counts

    def _ignores(self, target: Any) -> bool:
        """Tell whether some targets may not count: class indices, and zeros and ones in whole numbers, but no regression's."""
        return _whole(target) and self.family != "gaussian"

    def refuse(self, objective: Objective, target: Any) -> None:
        """Raise a ValueError for targets that the family does not have."""
        if self.named or self.family == "gaussian" or not isinstance(target, Tensor):
            return
        y = target[target.long() != self.ignored] if _whole(target) else target
        if self.family == "bernoulli" and not ((y == 0) | (y == 1)).all():
            raise ValueError(not_binary())
        wrong = y[(y < 0) | ((y >= self.classes) & (objective == "true"))] if self.family == "categorical" else y[:0]
        if len(wrong):
            expected = f"indices from 0 to {self.classes - 1}, or {self.ignored} for what does not count"
            raise ValueError(explain(f"the class index {int(wrong[0])}", expected, "Correct the targets."))


def draw(p: Tensor) -> Tensor:
    """Draw a class for each row of chances p: of independent exponential times with rates p, the first is that of c."""
    return (p / -torch.rand_like(p).log()).argmax(-1)


def named(loss: Any) -> Likelihood | None:
    """Return the distribution that a loss names, with classes that are yet to be counted; None for any other loss."""
    module = isinstance(loss, nn.Module)
    key = type(loss) if module else loss
    family = next((found for one, found in NAMED.items() if one is key), None)
    options = vars(loss) if module else {}
    weighted = module and any(True for _ in loss.buffers())
    if family is None or weighted or options.get("label_smoothing"):
        return None
    return Likelihood(family, 1, ignored=options.get("ignore_index", IGNORED), named=True)


def settled(
    z: Tensor, size: int, target: Any, every: Any, own: Tensor | None, given: Likelihood | None, inputs: Any = ()
) -> Likelihood:
    """Find out which distribution the outputs of a model mean.

    Args:
        z: logits of a few examples, one after the other in the first dimension.
        size: how many these are.
        target: their targets.
        every: the targets of these and more examples.
        own: the loss that the model has computed itself from these few examples' targets.
        given: what the user has named.
        inputs: what the model was given for these few examples; tokens tell where the places are.

    Raises:
        ValueError: if outputs and targets can be read in no way, or in several.
    """
    if not z.is_floating_point():
        raise ValueError(explain(f"logits of type {z.dtype}", "floating-point numbers", "Pass `logits=`."))
    if given is not None:
        found = _classes(z, size, every, given, inputs) if given.family == "categorical" else [given]
    else:
        found = _single(z, size, every) or _classes(z, size, every, Likelihood("categorical"), inputs)
    if own is None or len(found) == 1:
        return found[0]
    value = own.item()
    limit = max(1e-4, 4 * torch.finfo(z.dtype).eps) * max(1.0, abs(value))
    fitting = [one for one in found if abs(_mean_loss(one, z.detach(), size, target).item() - value) <= limit]
    if len(fitting) > 1:  # such as under a head of zeros, where every label costs the same
        fitting = _alike(fitting, z, size, target, own)
    if len(fitting) != 1:
        if found[0].family != "categorical":
            return found[0]
        expected = "the mean cross-entropy of its logits at the labels, or at the labels after them"
        remedy = (
            "Pass pairs of inputs and labels, which then count at the logits of their own place, or "
            '`loss=lambda output, target: output.loss` with `labels="true"`.'
        )
        raise ValueError(explain(f"a model's own loss of {value:.4g}, whose labels cannot be found out", expected, remedy))
    return fitting[0]


def _single(z: Tensor, size: int, target: Any) -> list[Likelihood]:
    """Return readings of outputs that have one logit a row; none where there are several."""
    one = z.dim() < 2 or 1 in (z.shape[-1], z.shape[1] if z.dim() > 3 else 0)
    matched = isinstance(target, Tensor) and len(target) and target[0].numel() * size == z.numel()
    if not one or (z.dim() > 2 and isinstance(target, Tensor) and not matched) or (z.dim() < 2 and z.numel() != size):
        return []
    if not isinstance(target, Tensor) or target.is_complex():
        came = f"one logit for each row, of shape {tuple(z.shape)}, without targets that say what it means"
        expected = "targets of 0 and 1, or numbers for a regression"
        raise ValueError(explain(came, expected, REMEDY))
    Likelihood("gaussian")._refuse_shape(target[:size], size, z.numel() // size)
    values = target[target.long() != IGNORED] if _whole(target) else target
    binary = bool(((values == 0) | (values == 1)).all())
    return [Likelihood("bernoulli"), Likelihood("gaussian")] if binary else [Likelihood("gaussian")]


def _classes(z: Tensor, size: int, target: Any, like: Likelihood, inputs: Any) -> list[Likelihood]:
    """Return readings of outputs as class logits: where the classes are, and which target a row is about."""
    if isinstance(target, Tensor) and not _whole(target) and not like.named:
        came = f"targets of type {target.dtype} for outputs of shape {tuple(z.shape)}"
        raise ValueError(explain(came, "class indices, one for each row of logits", REMEDY))
    if like.named and (z.dim() < 2 or (z.dim() == 2 and z.shape[1] == 1)):
        came = f"cross-entropy of logits of shape {tuple(z.shape)}"
        remedy = "For one logit pass `loss=torch.nn.functional.binary_cross_entropy_with_logits`."
        raise ValueError(explain(came, "two classes or more in the second dimension", remedy))
    if z.dim() == 2 and not z.shape[0] % size and isinstance(target, Tensor):
        replace(like, classes=z.shape[1])._refuse_shape(target[:size], size, z.shape[0] // size)
    dims = _class_dims(z, size, target, like.named) if _whole(target) else _free_dims(z, size, like.named, inputs)
    if len(dims) != 1:
        came = f"logits of shape {tuple(z.shape)} and {_described(target)} for {_counted(size, 'example')}"
        what = "in the second dimension as well as in the last" if dims else "in neither the second nor the last dimension"
        expected = f"classes in one dimension and an index for each row; here they fit {what}"
        remedy = (
            "Pass `logits=`, which returns a row of class logits for each target: `lambda o: o.flatten(0, 1)` if classes come "
            "last, `lambda o: o.movedim(1, -1).flatten(0, -2)` if they are in the second dimension."
        )
        raise ValueError(explain(came, expected, remedy))
    plain = replace(like, dim=dims[0], classes=z.shape[dims[0]])
    several = z.numel() // size > plain.classes and _whole(target) and dims[0] == -1
    return [plain, replace(plain, shifted=True)] if several else [plain]


def _free_dims(z: Tensor, size: int, named: bool, inputs: Any) -> list[int]:
    """Return in which dimensions the classes may be where no targets tell: with tokens, where these leave them."""
    if z.dim() < 2 or z.shape[0] % size or z.dim() > 3 or (z.dim() == 3 and named):
        return []
    if z.dim() == 2:
        return [-1]
    dims = [d for d in (-1, 1) if z.shape[d] > 1]
    tokens = {t.shape for t in tensors(inputs) if _whole(t)}
    return [d for d in dims if z.movedim(d, -1).shape[:-1] in tokens] or dims


def _class_dims(z: Tensor, size: int, target: Tensor, named: bool) -> list[int]:
    """Return in which dimensions of logits the classes may be; named as for `cross_entropy`, in the second if they can."""
    if z.dim() < 2 or z.shape[0] % size:
        return []
    if z.dim() == 2:
        return [-1]
    each, dims = target.shape[1:], [d for d in (-1, 1) if z.shape[d] > 1]
    alike = [d for d in dims if z.movedim(d, -1).shape[1:-1] == each]
    found = alike or [d for d in dims if math.prod(each) * size * z.shape[d] == z.numel()]
    return [1] if named and 1 in found else found


def refuse_chances(reading: Likelihood, z: Tensor) -> None:
    """Raise a ValueError for outputs that are probabilities already: what is made of these is another distribution."""
    if reading.family == "categorical":
        rows = z.detach().movedim(reading.dim, -1)
        found = bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 1e-3).all())
        why, last, inverse = "they add up to 1 in each row", "softmax", "log"
    else:
        found = reading.family == "bernoulli" and _maker(z).startswith(("Sigmoid", "Hardsigmoid", "Softmax"))
        why, last, inverse = "a sigmoid or a softmax makes them", "sigmoid", "logit"
    if found:
        same = "`logits=lambda output: output` if they are logits nevertheless"
        remedy = f"Pass `logits=lambda output: output.{inverse}()`, or {same}."
        raise ValueError(explain(f"outputs that are probabilities, as {why}", f"logits, before the {last}", remedy))


def _maker(z: Tensor) -> str:
    """Return the name of the operation that has made the values of a tensor, whatever was done to its shape or type later."""
    node = z.grad_fn
    while node is not None and node.name() in SHAPING and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def _alike(readings: list[Likelihood], z: Tensor, size: int, target: Tensor, own: Tensor) -> list[Likelihood]:
    """Return which of several readings has the gradient of the model's own loss at its logits; all where there is none."""
    found = (
        torch.autograd.grad(own, z, retain_graph=True, allow_unused=True) if own.requires_grad and z.requires_grad else [None]
    )
    if (pull := found[0]) is None:
        return readings

    def apart(reading: Likelihood) -> float:
        leaf = z.detach().requires_grad_()
        return float((torch.autograd.grad(_mean_loss(reading, leaf, size, target), leaf)[0] - pull).abs().max())

    return [min(readings, key=apart)]


def _mean_loss(reading: Likelihood, z: Tensor, size: int, target: Tensor) -> Tensor:
    """Return the loss that a model of Hugging Face computes under a reading: a mean over rows."""
    score, _ = reading.scores("true", z.float(), target, size)
    y = target.reshape(size, -1)[:, int(reading.shifted) :]
    counted = reading.family != "gaussian" and _whole(y)
    count = int((y.long() != reading.ignored).sum()) if counted else y.numel()
    return -score.sum() * (2 if reading.family == "gaussian" else 1) / (count or math.nan)


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


def own_loss(output: Any) -> Tensor | None:
    """Return the loss that a model has computed itself, if its output has one."""
    if isinstance(output, Tensor):
        return None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def not_binary() -> str:
    """Say that one logit was taken for a chance."""
    expected = "0 or 1 for a single logit, as in the first batch"
    return explain("targets that are neither 0 nor 1", expected, "For a regression pass `loss=torch.nn.functional.mse_loss`.")


def many_rows(rows: int) -> str:
    """Say that there are too many rows for every class of each."""
    came = f'the labels "exact" with {rows} rows of logits for one example'
    expected = "one row of class logits for each example, as it takes a backward pass for every class"
    return explain(came, expected, 'Use `labels="sample"`, which draws a label for every row that counts.')


def _whole(target: Any) -> bool:
    return isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()


def _described(target: Any) -> str:
    if target is None:
        return "no targets"
    return f"shape {tuple(target.shape)}, {target.dtype}" if isinstance(target, Tensor) else f"type `{type(target).__name__}`"


def _counted(number: int, what: str) -> str:
    return f"one {what}" if number == 1 else f"{number} {what}s"
