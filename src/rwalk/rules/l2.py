"""L2: every weight matters alike, a plain pull to where the weights were.

Towards pretrained weights it is L2-SP: Li, Grandvalet, Davoine, "Explicit inductive bias for transfer learning with
convolutional networks", ICML 2018, arXiv 1802.01483.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rwalk._parameters import zeros
from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.rules._stateless import Nothing, Stateless
from rwalk.rules.base import TaskEnd, check


@dataclass(frozen=True)
class L2(Stateless):
    """Importance 1 for every weight.

    Args:
        toward: hold to the weights after the "last" task, or to the "first" anchor: with `Consolidator.estimate()` before
            training those are the pretrained weights, which is L2-SP.
    """

    measures: ClassVar[Literal["steps", "data", "nothing"]] = "nothing"
    toward: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check(self.toward in ("last", "first"), self, "toward", "last or first")

    def conclude(self, state: Nothing, end: TaskEnd) -> tuple[Anchor, Nothing]:
        """Give every weight the importance 1."""
        first = end.anchor.point if self.toward == "first" else {}
        point = {name: first.get(name, p) for name, p in end.point.items()}
        return ElementwiseAnchor.at(point, [torch.ones_like(z) for z in zeros(list(point.values()))]), state
