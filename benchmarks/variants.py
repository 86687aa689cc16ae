"""The ways to train that are compared: plain training, and each rule of ours in its second task."""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.models import Case
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, OnlineEWC, RWalk, TaskFisher, kernels
from rwalk.rules.base import Rule

POOL = 20
"""Different batches that a loop goes round, so that no network learns a single one by heart until its gradients vanish."""

STRENGTH = 1e-3
"""Small enough for every rule not to diverge; what a step costs does not depend on it."""

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


class Loop:
    """Plain training, a few steps at a time."""

    first = 2
    """Steps in each earlier task."""

    def __init__(self, case: Case, optimizer: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = case.build()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.pool = [case.batch() for _ in range(POOL)]
        self._batches = cycle(self.pool)

    def steps(self, count: int) -> None:
        """Train for `count` steps."""
        for x, y in islice(self._batches, count):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def conclude(self) -> None:
        """End a task."""

    def prepare(self) -> None:
        """Do what must be done before a round and is not part of it."""

    @property
    def state_bytes(self) -> int | None:
        """Bytes that the method says it holds, None where it does not say."""
        return 0


class Watched(Loop):
    """Training with a consolidator of ours."""

    def __init__(
        self,
        case: Case,
        optimizer: str,
        seed: int,
        rule: Rule[Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(case, optimizer, seed)
        self.backend = backend
        self.prepare()
        self.memory = Consolidator(self.model, rule, STRENGTH).attach(self.optimizer)

    def conclude(self) -> None:
        x, y = self.pool[0]
        loss = F.cross_entropy if isinstance(self.memory.rule, EWC) else None
        self.memory.consolidate([(x[:2], y[:2])], loss=loss)  # two examples: their number is no matter for later steps

    def prepare(self) -> None:
        kernels.use(self.backend)

    @property
    def state_bytes(self) -> int:
        return self.memory.state_bytes


class Variant:
    """A way to train, ready to be measured after some tasks.

    Args:
        about: the method in words.
        make: makes its loop from a case, the name of an optimiser and a seed.
        tasks: how many tasks lie behind.
        backend: the kernels, where they are what is compared.
        base: key of the variant, beside "plain", that its time is also compared with.
        cases: the only cases to measure it on; all when empty.
    """

    def __init__(
        self,
        about: str,
        make: Callable[[Case, str, int], Loop],
        tasks: int = 1,
        backend: str = "",
        base: str = "plain",
        cases: tuple[str, ...] = (),
    ) -> None:
        self.about, self.make, self.tasks, self.backend, self.base, self.cases = about, make, tasks, backend, base, cases

    def start(self, case: Case, optimizer: str, seed: int) -> Loop:
        """Train through the earlier tasks and one step into the next, so that each round of ten holds one end of a window."""
        loop = self.make(case, optimizer, seed)
        for _ in range(self.tasks):
            loop.steps(loop.first)
            loop.conclude()
        loop.steps(1)
        return loop


def watched(about: str, rule: Rule[Any] | None, **options: Any) -> Variant:
    backend = options.get("backend") or "auto"

    def make(case: Case, optimizer: str, seed: int) -> Loop:
        return Watched(case, optimizer, seed, rule, backend)

    return Variant(about, make, **options)


def ours() -> dict[str, Variant]:
    """Return plain training and every variant of ours, by key."""
    others = [name for name in kernels.available() if name != "reference"]
    return {
        "plain": Variant("plain", Loop),
        **{f"rwalk-{name}": watched(f"RWalk, {name}", RWalk(), backend=name) for name in kernels.available()},
        "rwalk-50-tasks": watched("RWalk, 50 tasks", RWalk(), tasks=50, cases=("mlp-b10", "mlp-b128")),
        "rwalk-example": watched("RWalk, per example", RWalk(fisher="example")),
        **{f"recipe-{name}": watched(f"recipe, {name}", TaskFisher(), backend=name) for name in others},
        **{f"ewcpp-{name}": watched(f"EWCpp, {name}", EWCpp(), backend=name) for name in others},
        **{f"si-{name}": watched(f"SI, {name}", SI(), backend=name) for name in others},
        "default": watched("default", None),
        "ewc": watched("EWC", EWC(labels="true")),
        "online-ewc": watched("OnlineEWC", OnlineEWC(labels="true")),
        "mas": watched("MAS", MAS()),
        "l2": watched("L2", L2()),
    }
