"""What a model's outputs mean in a task, as rules that measure on data and selections of examples take it."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rwalk.rules.base import Rule


def competing(output: Tensor, labels: Tensor) -> Tensor:
    """Return a row of logits for each label that belongs to an example, over the outputs of `labels`.

    A single one comes beside another that is shut, as a row of one logit would mean a chance of 0 or 1.
    """
    scores = output[:, labels]
    scores = scores.movedim(1, -1).flatten(0, -2) if scores.dim() > 2 else scores
    return F.pad(scores, (0, 1), value=-math.inf) if len(labels) == 1 else scores


def gaussian(rule: Rule[Any]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the loss that tells a rule that outputs are means of targets with variance 1; None for one that takes no loss.

    With the data's own targets (`labels="true"`) that is the negative log-likelihood itself, else the name of its family.
    """
    labels = getattr(rule, "labels", "")
    return None if labels == "output" else half_squares if labels == "true" else F.mse_loss


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of an example's targets, up to a constant, if each has variance 1 around its mean."""
    return F.mse_loss(output, target, reduction="sum") / 2
