"""A scikit-learn classifier that learns one task after another: a new `task` protects what it has learned."""
# ruff: noqa: N803 - a capital X is scikit-learn's name for inputs

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rwalk import Consolidator
from rwalk._errors import printable
from rwalk.rules.base import Rule


@dataclass(eq=False, repr=False)
class RWalkClassifier(ClassifierMixin, BaseEstimator):
    """A network that learns one task after another; fitting sets `network_`, `optimizer_` and `memory_`.

    Args:
        rule, strength, options: of the `Consolidator`; `options` are its further arguments, such as `{"pull": "proximal"}`.
        module: called as `module(features, classes)`, returns a network with logits; None for a perceptron with `hidden` units.
        optimizer: called as `optimizer(parameters, lr=lr)`; `functools.partial` gives it more arguments.
        epochs, batch_size: passes over the data of `fit`, and examples per step; only these may be changed later.
        dtype: of inputs and network, "float32" or "float64".
        random_state: seed of initial weights and of the order of examples; PyTorch's global random numbers stay as they are.
    """

    rule: Rule[Any] | None = None
    strength: float | None = None
    _: KW_ONLY
    options: dict[str, Any] | None = None
    module: Callable[[int, int], nn.Module] | None = None
    hidden: int | tuple[int, ...] = 100
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    lr: float = 0.001
    epochs: int = 20
    batch_size: int = 32
    dtype: str = "float32"
    device: str | torch.device = "cpu"
    random_state: Any = None

    def fit(self, X: Any, y: Any) -> Self:
        """Begin anew, learn one task and protect it; `partial_fit` continues with the next."""
        x, labels = self._checked(X, y, reset=True)
        check_classification_targets(labels)
        self._begin(np.unique(labels))
        return self._train(x, labels, self.epochs).consolidate(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, task: Any = None) -> Self:
        """Continue with one pass over examples; the first call needs `classes`, all labels that may ever come.

        A new `task` ends the one before and protects it. The same task, or None, continues it, in any number of calls.
        """
        first = not hasattr(self, "memory_")
        x, labels = self._checked(X, y, reset=first)
        known = self.classes_ if not first else np.unique([] if classes is None else classes)
        _class_indices(labels if classes is None else np.append(labels, classes), known)
        if first:
            self._begin(known)
        if self.memory_.steps and task not in (None, self.task_):
            self.consolidate()
        self.task_: Any = self.task_ if task is None else task
        return self._train(x, labels, 1)

    def consolidate(self, X: Any = None, y: Any = None) -> Self:
        """End the current task and protect it without waiting for the next; X and y are for rules that measure on data."""
        check_is_fitted(self, "memory_")
        tensors = () if X is None else self._tensors(*self._checked(X, y))
        with self._seeded():
            self.memory_.consolidate(list(zip(*(t.split(self.batch_size) for t in tensors), strict=True)) or None)
        return self

    def predict_proba(self, X: Any) -> Any:
        """Return each class's probability, of shape (examples, classes), in the order of `classes_`."""
        check_is_fitted(self, "memory_")
        x = torch.tensor(self._checked(X), device=self.device)
        self.network_.eval()
        with torch.no_grad():
            return torch.cat([self.network_(part).softmax(1, dtype=torch.float64) for part in x.split(4096)]).cpu().numpy()

    def predict(self, X: Any) -> Any:
        """Return the most likely label of each example."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _checked(self, *data: Any, reset: bool = False) -> Any:
        return validate_data(self, *data, reset=reset, dtype=self.dtype, order="C")

    def _tensors(self, x: Any, labels: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(x, device=self.device), _class_indices(labels, self.classes_).to(self.device)

    def _seeded(self) -> Any:
        return _seeded(self._random.randint(2**31 - 1), self.device)

    def _begin(self, classes: Any) -> None:
        self.classes_, self._random, self.task_ = classes, check_random_state(self.random_state), None
        with self._seeded():
            network = (self.module or partial(_perceptron, hidden=self.hidden))(self.n_features_in_, len(classes))
        self.network_ = network.to(self.device, getattr(torch, self.dtype))
        self.optimizer_ = self.optimizer(self.network_.parameters(), lr=self.lr)
        self.memory_ = Consolidator(self.network_, self.rule, self.strength, **(self.options or {}))

    def _train(self, x: Any, labels: Any, epochs: int) -> Self:
        self.memory_.attach(self.optimizer_)
        try:
            with self._seeded():
                _train(self.network_, self.optimizer_, *self._tensors(x, labels), epochs, self.batch_size)
        finally:
            self.memory_.detach()  # hooks do not pickle
        return self


def _perceptron(features: int, classes: int, hidden: int | Sequence[int]) -> nn.Module:
    """Make a multi-layer perceptron with ReLU that returns logits."""
    widths = [features, *np.atleast_1d(hidden).tolist()]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _class_indices(labels: Any, classes: Any) -> Tensor:
    """Return the index of each label in `classes`, which are sorted.

    Raises:
        ValueError: if a label is not among them.
    """
    known = classes.tolist()
    if unknown := set(labels.tolist()).difference(known):
        came = printable(f"labels {sorted(unknown, key=str)} in a classifier that began with the classes {known}")
        raise ValueError(
            f"There are {came}. Begin anew with a first `partial_fit` that gets all classes, also those of later tasks, as "
            "`classes`."
        )
    return torch.from_numpy(np.searchsorted(classes, labels))


def _train(network: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, epochs: int, batch_size: int) -> None:
    """Train a classifier on inputs `x` and class indices `y`, shuffled again for each epoch.

    A last batch of a single example joins the one before: BatchNorm refuses it.
    """
    network.train()
    for _ in range(epochs):
        batches = torch.randperm(len(y)).split(batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()


@contextmanager
def _seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """Draw PyTorch's random numbers from a seed, and restore their state at the end."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield
