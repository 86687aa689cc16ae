"""The distribution of targets that a model's outputs describe, and its log-likelihood for one example or many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._parameters import state_dtype
from rwalk.rules.base import Objective, Rule

IGNORED = -100
"""The class index that is ignored, as in `torch.nn.functional.cross_entropy`."""

Family = Literal["categorical", "bernoulli", "gaussian"]

FAMILIES: dict[Any, Family] = {
    F.cross_entropy: "categorical",
    nn.CrossEntropyLoss: "categorical",
    F.binary_cross_entropy_with_logits: "bernoulli",
    nn.BCEWithLogitsLoss: "bernoulli",
    F.mse_loss: "gaussian",
    nn.MSELoss: "gaussian",
}
"""The distribution that a loss of `torch.nn` implies, as function or module."""

REMEDY = (
    "Pass `loss=torch.nn.functional.cross_entropy`, `binary_cross_entropy_with_logits` or `mse_loss` to say what the outputs "
    'mean; with `labels="true"` any loss of one example will do.'
)


def gaussian_loss(rule: Rule[Any]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the loss that tells a rule that outputs are means of targets with variance 1; None for one that takes no loss.

    With the data's own targets (`labels="true"`) that is the negative log-likelihood itself, else the name of its family.
    """
    labels = getattr(rule, "labels", None)
    return None if labels == "output" else _half_squares if labels == "true" else F.mse_loss


def _half_squares(output: Tensor, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of an example's targets, up to a constant, if each has variance 1 around its mean."""
    return F.mse_loss(output.reshape(target.shape), target, reduction="sum") / 2


@dataclass(frozen=True)
class Likelihood:
    """The distribution of an example's targets given the model's output.

    Rows of class logits, or single outputs, are independent given the inputs: an example's log-likelihood is the sum of theirs.

    Args:
        family: "categorical" over the logits of a row; for each output z by itself "bernoulli", with the probability
            sigmoid(z) of a 1, or "gaussian", with mean z and variance 1.
        dim: the dimension of the classes in logits of three or more dimensions, 1 or -1.
        classes: how many classes there are; 1 for the other families.
        shifted: whether a row predicts the target after its own, as in causal language models.
        ignored: the class index that is ignored.
        named: whether the user has named the family; targets then matter only if some of them may be ignored.
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
            objective: "true", "sample" or "exact", as for `per_example_over`.
            z: logits of `size` examples, the rows of each in turn along the first dimension.
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
                raise ValueError(
                    f'The labels "exact" take one row of class logits for each example, and here are {score.shape[1]} rows of '
                    'logits for one example: every class takes a backward pass. Use `labels="sample"`, which draws a label for '
                    "every row that counts."
                )
            return score[:, 0], p[:, 0]
        label = draw(p) if y is None or objective == "sample" else torch.where(counts, y, 0)
        picked = torch.where(counts, score.gather(-1, label.unsqueeze(-1)).squeeze(-1), 0).sum(1, keepdim=True)
        return picked, torch.ones_like(picked)

    def _of_outputs(self, objective: Objective, z: Tensor, target: Any, size: int) -> tuple[Tensor, Tensor]:
        """Return scores of outputs that each have a distribution of their own.

        As z is the natural parameter, the expected square of the score's gradient is the variance of the target times the
        square of z's gradient.
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
            raise ValueError(
                f"The logits have shape {tuple(z.shape)} for {counted(size, 'example')}, and not rows of {self.classes} "
                f"classes as in the first batch. {REMEDY}"
            )
        return z.reshape(size, -1, self.classes)

    def _targets(self, objective: Objective, target: Any, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return targets in the shape of `like`, (size, rows), and which of them count; None for targets that do not matter."""
        every = torch.ones((), dtype=torch.bool, device=like.device)
        if not isinstance(target, Tensor) and objective != "true":
            return None, every
        self.refuse_shape(target, *like.shape)
        if self.named and not self._ignores(target):
            return None, every
        y = target.reshape(like.shape)
        if not self._ignores(y):
            return y, every
        y = y.long()
        if self.shifted:
            y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], self.ignored)], 1)
        return y, y != self.ignored

    def refuse_shape(self, target: Any, size: int, rows: int) -> None:
        """Raise a ValueError unless targets are one index, one number, or probabilities of all classes for each row."""
        categorical, whole = self.family == "categorical", is_whole(target)
        each = self.classes if categorical and not whole else 1
        fits = isinstance(target, Tensor) and target.numel() == size * rows * each and (whole or self.named or not categorical)
        if not fits:
            raise ValueError(
                f"There is a target of {described(target)} for {counted(size, 'example')} of {counted(rows, 'row')} of "
                f"outputs, and not one {'class index' if categorical else 'number'} for each row. "
                + ("Pass inputs alone, or targets that belong to them." if self.named else REMEDY)
            )

    def counting_examples(self, target: Any, size: int) -> Tensor | None:
        """Return which examples have a target that counts, of shape (size,); None if every target counts."""
        if not self._ignores(target):
            return None
        counts: Tensor = (target.long().reshape(size, -1)[:, int(self.shifted) :] != self.ignored).any(1)
        return counts

    def rows_that_count(self, target: Tensor, size: int) -> float:
        """Return how many rows of an example, or outputs of it, have a target that counts, on average; at least 1 in all."""
        y = target.reshape(size, -1)[:, int(self.shifted) :]
        counts = y.long() != self.ignored if self._ignores(target) else torch.ones_like(y, dtype=torch.bool)
        return max(float(counts.sum()), 1.0) / size

    def _ignores(self, target: Any) -> bool:
        """Return whether some targets may be ignored: integers do, except those of a regression."""
        return is_whole(target) and self.family != "gaussian"

    def refuse(self, objective: Objective, target: Any) -> None:
        """Raise a ValueError for targets outside the family's range."""
        if self.named or self.family == "gaussian" or not isinstance(target, Tensor):
            return
        y = target[target.long() != self.ignored] if is_whole(target) else target
        if self.family == "bernoulli" and not ((y == 0) | (y == 1)).all():
            raise ValueError(not_binary())
        wrong = y[(y < 0) | ((y >= self.classes) & (objective == "true"))] if self.family == "categorical" else y[:0]
        if len(wrong):
            raise ValueError(
                f"Targets hold the class index {int(wrong[0])}. Correct them: indices go from 0 to {self.classes - 1}, or are "
                f"{self.ignored} for rows that do not count."
            )


def draw(p: Tensor) -> Tensor:
    """Draw a class for each row of probabilities p: of exponential waiting times with rates p, class c is first with p_c."""
    return (p / -torch.rand_like(p).log()).argmax(-1)


def named_distribution(loss: Any) -> Likelihood | None:
    """Return the distribution that a loss implies, its classes not counted yet; None for any other loss."""
    module = isinstance(loss, nn.Module)
    key = type(loss) if module else loss
    family = next((found for one, found in FAMILIES.items() if one is key), None)
    options = vars(loss) if module else {}
    weighted = module and any(True for _ in loss.buffers())
    if family is None or weighted or options.get("label_smoothing"):
        return None
    return Likelihood(family, 1, ignored=options.get("ignore_index", IGNORED), named=True)


def not_binary() -> str:
    """Return the message for targets of a regression that was taken for a binary classification."""
    return (
        "A single logit means a probability here, as in the first batch, but there are targets that are neither 0 nor 1. "
        "For a regression pass `loss=torch.nn.functional.mse_loss`."
    )


def is_whole(target: Any) -> bool:
    """Return whether targets are a tensor of integers."""
    return isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()


def described(target: Any) -> str:
    """Describe targets in a message."""
    if target is None:
        return "no targets"
    return f"shape {tuple(target.shape)}, {target.dtype}" if isinstance(target, Tensor) else f"type `{type(target).__name__}`"


def counted(number: int, what: str) -> str:
    """Write a number of things in a message."""
    return f"one {what}" if number == 1 else f"{number} {what}s"
