"""A scikit-learn classifier that keeps what it has learned: a new label of a task protects the task before."""
# ruff: noqa: N803 - a capital X is scikit-learn's name for inputs

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from rwalk import Consolidator
from rwalk.importance.base import Importance
from rwalk.integrations._network import numbered, perceptron, seeded, train


@dataclass(eq=False, repr=False)
class RWalkClassifier(ClassifierMixin, BaseEstimator):
    """A network that learns one task after another; `network_`, `optimizer_` and `memory_` are there once it is fitted.

    Args:
        rule, strength, options: of the `Consolidator`; `options` are its further arguments, such as `{"pull": "proximal"}`.
        module: makes a network that returns logits, from (features, classes); None for a perceptron with `hidden` units.
        optimizer: called as `optimizer(parameters, lr=lr)`; `functools.partial` gives it more arguments.
        epochs, batch_size: passes over the data of `fit`, and examples per step; they may be changed later, all others not.
        dtype: of inputs and network, "float32" or "float64".
        random_state: seed of initial weights and of the order of examples; PyTorch's global random numbers stay as they are.
    """

    rule: Importance[Any] | None = None
    strength: float | None = None
    _: KW_ONLY
    options: dict[str, Any] | None = None
    module: Callable[[int, int], torch.nn.Module] | None = None
    hidden: int | tuple[int, ...] = 100
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    lr: float = 0.001
    epochs: int = 20
    batch_size: int = 32
    dtype: str = "float32"
    device: str | torch.device = "cpu"
    random_state: Any = None

    def fit(self, X: Any, y: Any) -> Self:
        """Begin anew, learn one task and protect it; `partial_fit` goes on with the next."""
        x, labels = self._checked(X, y, reset=True)
        check_classification_targets(labels)
        self._begin(np.unique(labels))
        return self._train(x, labels, self.epochs).consolidate(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, task: Any = None) -> Self:
        """Go on with one pass over examples; the first call needs `classes`, all labels that may ever come.

        A new `task` ends the one before and protects it. The same, or None, goes on with it, in any number of calls.
        """
        first = not hasattr(self, "memory_")
        x, labels = self._checked(X, y, reset=first)
        known = self.classes_ if not first else np.unique([] if classes is None else classes)
        numbered(labels if classes is None else np.append(labels, classes), known)
        if first:
            self._begin(known)
        if self.memory_.steps and task not in (None, self.task_):
            self.consolidate()
        self.task_: Any = self.task_ if task is None else task
        return self._train(x, labels, 1)

    def consolidate(self, X: Any = None, y: Any = None) -> Self:
        """End the task at hand and protect it without waiting for the next; X and y are for rules that measure on data."""
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

    def _tensors(self, x: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(x, device=self.device), numbered(labels, self.classes_).to(self.device)

    def _seeded(self) -> Any:
        return seeded(self._random.randint(2**31 - 1), self.device)

    def _begin(self, classes: Any) -> None:
        self.classes_, self._random, self.task_ = classes, check_random_state(self.random_state), None
        with self._seeded():
            network = (self.module or partial(perceptron, hidden=self.hidden))(self.n_features_in_, len(classes))
        self.network_ = network.to(self.device, getattr(torch, self.dtype))
        self.optimizer_ = self.optimizer(self.network_.parameters(), lr=self.lr)
        self.memory_ = Consolidator(self.network_, self.rule, self.strength, **(self.options or {}))

    def _train(self, x: Any, labels: Any, epochs: int) -> Self:
        self.memory_.attach(self.optimizer_)
        try:
            with self._seeded():
                train(self.network_, self.optimizer_, *self._tensors(x, labels), epochs, self.batch_size)
        finally:
            self.memory_.detach()  # hooks do not pickle
        return self
