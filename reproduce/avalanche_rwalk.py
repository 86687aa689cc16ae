"""Avalanche's own RWalkPlugin in Avalanche's own loop, as a learner: the same stream, network and batches' size as ours."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import avalanche
from rwalk.bench import Experience, Training
from rwalk.bench.training import Learner


class AvalancheRWalk(Learner):
    """Avalanche's Naive strategy with its RWalkPlugin at alpha .9 and windows of ten steps, as the plugin's defaults are.

    Outputs compete as under our learners: the criterion shuts the others.

    Args:
        strength: `ewc_lambda`.
        build, training, seed: as for `Learner`; Avalanche's order of batches comes from torch's seed.
    """

    def __init__(self, strength: float, build: Callable[[], nn.Module], training: Training, seed: int) -> None:
        super().__init__(build, training, seed)
        torch.manual_seed(seed)
        self.library = avalanche()
        self._shut = torch.zeros(0)
        with warnings.catch_warnings(action="ignore"):  # it says that nothing is logged
            self.strategy = self.library.training.supervised.Naive(
                model=self.model,
                optimizer=self.optimizer,
                criterion=lambda output, y: F.cross_entropy(output.masked_fill(self._shut, -torch.inf), y),
                train_mb_size=training.batch_size,
                train_epochs=training.epochs,
                device=self.device,
                plugins=[self.library.training.plugins.RWalkPlugin(ewc_lambda=strength, ewc_alpha=0.9, delta_t=10)],
                evaluator=None,
            )

    def fit(self, experience: Experience) -> None:
        """Train on one task."""
        self.seen |= set(experience.classes)
        self._shut = ~self.allowed(experience)
        self.strategy.train(self._theirs(*experience.train.read()))

    def _theirs(self, x: Tensor, y: Tensor) -> Any:
        data = torch.utils.data.TensorDataset(x, y, torch.zeros(len(y), dtype=torch.long))
        columns = self.library.benchmarks.utils.AvalancheDataset([data])
        return self.library.benchmarks.benchmark_from_datasets(train=[columns]).train_stream[0]
