"""Memory aware synapses: how strongly each weight moves the output, no labels needed.

Aljundi et al., "Memory aware synapses: Learning what (not) to forget", ECCV 2018, arXiv 1711.09601.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rwalk.anchors.base import Anchor
from rwalk.rules._stateless import Nothing, Stateless, check_samples
from rwalk.rules.base import TaskEnd, check_share


@dataclass(frozen=True)
class MAS(Stateless):
    """Mean over examples of the absolute gradient of the output's squared norm (equation 3), summed over tasks.

    Outputs of constant norm, such as normalised embeddings, have no such gradient and are refused: for them, use
    `EWC(labels="output")`.

    Args:
        decay: what is kept of earlier tasks' importance, in [0, 1]; 1 is the paper's sum.
        samples: how many examples of the data to use, from the first on; all of them when None.
    """

    measures: ClassVar[Literal["steps", "data", "nothing"]] = "data"
    decay: float = 1.0
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_share(self, "decay")
        check_samples(self)

    def conclude(self, state: Nothing, end: TaskEnd) -> tuple[Anchor, Nothing]:
        """Add the task's importance to that of earlier tasks."""
        pairs = zip(end.earlier(), end.gradients("norm", torch.abs, self.samples), strict=True)
        return end.renew([new if old is None else new.add_(old, alpha=self.decay) for old, new in pairs]), state
