"""EWC++: a running Fisher information from the gradients of training itself, without a pass over the data.

Chaudhry, Dokania, Ajanthan, Torr, "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
ECCV 2018, arXiv 1801.10112, equation 6.
"""

from dataclasses import dataclass
from typing import NamedTuple, get_args

from torch import Tensor

from rwalk._parameters import zeros
from rwalk.anchors.base import Anchor
from rwalk.rules.base import Fisher, Rule, Step, TaskEnd, check, check_finite, check_share, counted


class RunningFisher(NamedTuple):
    """State of a running Fisher information.

    Args:
        fisher: F.
        seen: how many steps of this task gave the tensor a gradient.
        known: whether an earlier task did.
    """

    fisher: list[Tensor]
    seen: list[int]
    known: list[bool]


@dataclass(frozen=True)
class EWCpp(Rule[RunningFisher]):
    """Importance is the running Fisher information F <- alpha * g^2 + (1 - alpha) * F, which no task's end resets.

    Args:
        alpha: weight of the new squared gradient, in [0, 1].
        fisher: "batch" squares the averaged gradient; "example" averages squared per-example gradients, in the same backward.
    """

    alpha: float = 0.9
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        check_share(self, "alpha")
        check(self.fisher in get_args(Fisher), self, "fisher", "batch or example")

    @property
    def per_example(self) -> bool:
        """Whether squared per-example gradients are needed."""
        return self.fisher == "example"

    def init(self, theta: list[Tensor]) -> RunningFisher:
        """Start without any gradient seen."""
        return RunningFisher(zeros(theta), [0] * len(theta), [False] * len(theta))

    def observe(self, state: RunningFisher, step: Step) -> RunningFisher:
        """Move the running Fisher information towards the new squared gradient."""
        started = state.seen if all(state.seen) else [n > 0 or known for n, known in zip(state.seen, state.known, strict=True)]
        step.update(fisher=state.fisher, weight=[self.alpha if s else 1.0 for s in started])
        return state._replace(seen=counted(state.seen, step.grad))

    def conclude(self, state: RunningFisher, end: TaskEnd) -> tuple[Anchor, RunningFisher]:
        """Hold to the running Fisher information; a tensor that never had a gradient keeps what an anchor gave it."""
        ever = [known or n > 0 for n, known in zip(state.seen, state.known, strict=True)]
        earlier = zip(state.fisher, end.earlier(), ever, strict=True)
        omega = [fisher.clone() if trained or old is None else old.clone() for fisher, old, trained in earlier]
        check_finite(dict(zip(end.point, omega, strict=True)), "Look at the size of the gradients.")
        return end.renew(omega), state._replace(seen=[0] * len(ever), known=ever)
