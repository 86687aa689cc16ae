"""What a model's outputs mean in a task, as rules that measure on data and selections of examples take it."""

import math

from torch import Tensor
from torch.nn import functional as F


def competing(output: Tensor, labels: Tensor) -> Tensor:
    """Return a row of logits for each label that belongs to an example, over the outputs of `labels`.

    A single one comes beside another that is shut, as a row of one logit would mean a chance of 0 or 1.
    """
    scores = output[:, labels]
    scores = scores.movedim(1, -1).flatten(0, -2) if scores.dim() > 2 else scores
    return F.pad(scores, (0, 1), value=-math.inf) if len(labels) == 1 else scores
