"""Elastic weight consolidation: the Fisher information over each task's data, one anchor per task, merged exactly.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796. How the Fisher
information is computed matters: van de Ven 2025, arXiv 2502.11756.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from rwalk.anchors.base import Anchor
from rwalk.rules._stateless import Nothing, Stateless, check_samples
from rwalk.rules.base import TaskEnd, check

Labels = Literal["exact", "sample", "true", "output"]


@dataclass(frozen=True)
class EWC(Stateless):
    """Fisher information at the end of each task over its data, always per example.

    A sum of quadratics is one quadratic, so one anchor per task needs no more memory than one anchor.

    Args:
        labels: "exact" weights every class by its probability, "sample" draws labels from the model, one for each row of logits
            (the only choice for tokens), "true" takes the data's labels (the empirical Fisher information); "exact" costs one
            backward pass per class. "output" measures how much the output itself moves, whatever it means, and needs no labels:
            gradients of random directions of it, one for each example. Their mean square is the diagonal of J^T J.
        samples: how many examples of the data to use, from the first on; all of them when None.
    """

    measures: ClassVar[Literal["steps", "data", "nothing"]] = "data"
    labels: Labels = "exact"
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(self.labels in get_args(Labels), self, "labels", f"one of {', '.join(get_args(Labels))}")
        check_samples(self)

    def conclude(self, state: Nothing, end: TaskEnd) -> tuple[Anchor, Nothing]:
        """Add the task's quadratic, Fisher * (theta - point)^2, to those of earlier tasks."""
        return end.anchor.merge(end.point, self.fisher(end)), state

    def fisher(self, end: TaskEnd) -> list[Tensor]:
        """Return the Fisher information over the task's data."""
        return end.gradients(self.labels, torch.square, self.samples)
