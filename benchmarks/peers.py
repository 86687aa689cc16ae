"""Avalanche, where it is installed: its plugins around the same networks and batches, as further ways to train."""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import cycle, islice
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.nn import functional as F

from benchmarks.models import Case
from benchmarks.variants import STRENGTH, Loop, Variant, ours

UNUSED = {"GPUtil", "gdown", "google", "matplotlib", "psutil", "pytorchcv", "qpsolvers",
          "tensorboard", "torchmetrics", "wandb"}  # fmt: skip
"""What Avalanche imports for logging, plots, downloads and models; no training step of the plugins here calls any of it."""


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the packages of `UNUSED` that are not installed: whatever is asked of them is a mock."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(__version__="99", __getattr__=self.anything)

    @staticmethod
    def anything(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
"""Holds what `import_torchvision` defines for as long as the process lives."""


def import_torchvision() -> None:
    """Import torchvision, whose usual build finds its compiled operators beside CUDA builds of torch only.

    Its import fails on two of them, by name; nothing here calls any.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}() -> ()")
        import torchvision  # noqa: F401


@cache
def avalanche() -> ModuleType:
    """Import Avalanche with what it needs for training alone."""
    import_torchvision()
    stand = Stand()
    sys.meta_path.append(stand)
    try:
        with warnings.catch_warnings(action="ignore"):
            import avalanche.benchmarks
            import avalanche.training
            import avalanche.training.plugins
    finally:
        sys.meta_path.remove(stand)
    return avalanche


class Strategy(Loop):
    """A Naive strategy of Avalanche with or without a plugin, halted in the middle of its epochs.

    Its own loop runs over lists of ready batches, so that its data loaders, which are no part of a method, cost nothing here.
    """

    first = 10  # RWalkPlugin makes every weight NaN after a task shorter than its window

    def __init__(self, case: Case, optimizer: str, seed: int, plugin: Callable[[Any], Any] | None) -> None:
        super().__init__(case, optimizer, seed)
        library = avalanche()
        plugins = [plugin(library.training.plugins)] if plugin else []
        self.experience = self._experience(library)
        with warnings.catch_warnings(action="ignore"):  # it says that nothing is logged
            self.strategy = library.training.supervised.Naive(
                model=self.model,
                optimizer=self.optimizer,
                criterion=F.cross_entropy,
                train_mb_size=len(self.pool[0][0]),
                plugins=plugins,
                evaluator=None,
            )
        self._batches = cycle([[x, y, torch.zeros(len(x), dtype=torch.long)] for x, y in self.pool])
        self._begin()

    def _experience(self, library: Any) -> Any:
        """Return an experience of two batches, for the plugins that go over its data when it ends."""
        x, y = (torch.cat(column) for column in zip(*self.pool[:2], strict=True))
        data = torch.utils.data.TensorDataset(x, y, torch.zeros(len(x), dtype=torch.long))
        data = library.benchmarks.utils.AvalancheDataset([data])
        return library.benchmarks.benchmark_from_datasets(train=[data]).train_stream[0]

    def _begin(self) -> None:
        """Do what `train` does before the first iteration of an experience."""
        self.strategy.is_training = True
        self.model.train()
        self.strategy._before_training()
        self.strategy.experience = self.experience
        self.strategy._before_training_exp()
        self.strategy._before_training_epoch()

    def steps(self, count: int) -> None:
        self.strategy.dataloader = list(islice(self._batches, count))
        self.strategy.training_epoch()

    def conclude(self) -> None:
        self.strategy._after_training_epoch()
        self.strategy._after_training_exp()
        self.strategy._after_training()
        self._begin()

    @property
    def state_bytes(self) -> None:
        return None


def peer(about: str, plugin: Callable[[Any], Any] | None, **options: Any) -> Variant:
    def make(case: Case, optimizer: str, seed: int) -> Loop:
        return Strategy(case, optimizer, seed, plugin)

    return Variant(f"Avalanche {about}", make, base="avalanche", **options)


def peers() -> tuple[dict[str, Variant], str]:
    """Return the peers' variants by key, and why there are none if there are none."""
    if find_spec("avalanche") is None or find_spec("torchvision") is None:
        return {}, "Avalanche is not installed; `make peers` installs it"
    return {
        "avalanche": peer("Naive", None),
        "avalanche-rwalk": peer("RWalk", lambda plugins: plugins.RWalkPlugin(STRENGTH, 0.9, 10)),
        "avalanche-ewc": peer("EWC", lambda plugins: plugins.EWCPlugin(STRENGTH)),
        "avalanche-ewc-9-tasks": peer(
            "EWC, 9 tasks", lambda plugins: plugins.EWCPlugin(STRENGTH), tasks=9, cases=("mlp-b10", "mlp-b128")
        ),
        "avalanche-si": peer("SI", lambda plugins: plugins.SynapticIntelligencePlugin(STRENGTH)),
        "avalanche-mas": peer("MAS", lambda plugins: plugins.MASPlugin(STRENGTH)),
    }, ""


def everything() -> dict[str, Variant]:
    """Return all variants that can be measured here, by key."""
    return ours() | peers()[0]
