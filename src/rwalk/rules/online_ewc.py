"""Online EWC: one decaying Fisher information at the last weights.

Schwarz et al., "Progress & Compress: A scalable framework for continual learning", ICML 2018, arXiv 1805.06370.
"""

from dataclasses import dataclass

from rwalk.anchors.base import Anchor
from rwalk.rules._stateless import Nothing
from rwalk.rules.base import TaskEnd, check_share
from rwalk.rules.ewc import EWC


@dataclass(frozen=True)
class OnlineEWC(EWC):
    """Importance gamma * omega + Fisher, at the weights after the last task.

    Args:
        gamma: what is kept of earlier tasks' importance, in [0, 1]; that of a branch without use in a task decays too.
        labels: as for `EWC`.
        samples: as for `EWC`.
    """

    gamma: float = 0.95

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        super().__post_init__()
        check_share(self, "gamma")

    def conclude(self, state: Nothing, end: TaskEnd) -> tuple[Anchor, Nothing]:
        """Decay the importance of earlier tasks and add this one's."""
        pairs = zip(end.earlier(), self.fisher(end), strict=True)
        return end.renew([new if old is None else new.add_(old, alpha=self.gamma) for old, new in pairs]), state
