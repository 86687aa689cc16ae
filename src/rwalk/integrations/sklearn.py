"""A classifier and a regressor for scikit-learn that learn one task after another, each of them protected at its end."""
# ruff: noqa: N803 - a capital X is scikit-learn's name for inputs

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rwalk import Consolidator, Kronecker
from rwalk.gradients.likelihood import gaussian_loss
from rwalk.integrations._examples import (
    WeightedExamples,
    checked_tasks,
    checked_weight,
    class_indices,
    refuse_many_labels,
    train,
)
from rwalk.rules.base import Rule

NESTED = "rule__"
"""What the names of a rule's parameters begin with, as in scikit-learn those of an estimator within another."""


@dataclass(eq=False, repr=False)
class RWalkEstimator(BaseEstimator):
    """A network that learns one task after another; fitting sets `network_`, `optimizer_` and `memory_`.

    The parameters of the rule are parameters here too: `set_params(rule__alpha=0.5)`. Without a rule they are `Kronecker`'s.

    Args:
        rule, strength, options: of the `Consolidator`; `options` are its further arguments, such as `{"pull": "proximal"}`.
        module: called as `module(features, outputs)`, returns a network; None for a perceptron with `hidden` units.
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

    def fit(self, X: Any, y: Any, task: Any = None, sample_weight: Any = None) -> Self:
        """Begin anew, learn one task after another and protect each at its end; `partial_fit` continues with the next.

        Args:
            X: examples.
            y: their targets.
            task: the task of each example; tasks are learned in ascending order. None if all are one task. Searches and cross
                validations pass each fold its part, so give them folds with examples of every task, as `KFold(shuffle=True)`.
            sample_weight: how much each example counts, 0 or more; a batch's loss is the weighted mean over its examples. Rules
                that look at single examples while these train, as the default does, see the gradients of weighted losses;
                those that measure on data see examples as often as their weights say. At 0 an example is left out.
        """
        x, targets = self._checked(X, y, reset=True)
        weight, tasks = checked_weight(sample_weight, len(x)), checked_tasks(task, len(x))
        self._accept(targets, True, self._all_classes(targets))
        examples = self._examples(x, targets, weight)
        tasks = tasks if weight is None else tasks[weight > 0]
        for number in np.unique(tasks):
            part = examples.take(np.flatnonzero(tasks == number))
            self._train(part, self.epochs)._end(part)
        return self

    def consolidate(self, X: Any = None, y: Any = None, sample_weight: Any = None) -> Self:
        """End the current task and protect it without waiting for the next; X and y are for rules that measure on data."""
        check_is_fitted(self, "memory_")
        if X is None:
            return self._end(None)
        x, targets = self._checked(X, y)
        return self._end(self._examples(x, targets, checked_weight(sample_weight, len(x))))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name; `deep` for those of the rule too."""
        found: dict[str, Any] = super().get_params(deep)
        return found | {NESTED + name: value for name, value in _rule_params(self.rule).items() if deep}

    def set_params(self, **params: Any) -> Self:
        """Set parameters, those of the rule by names such as `rule__alpha`, for which a new rule takes the place of the old."""
        nested = {name.removeprefix(NESTED): params.pop(name) for name in list(params) if name.startswith(NESTED)}
        rule = params.get("rule", self.rule)
        known = _rule_params(rule)
        for name in nested:
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for estimator {rule}. Valid parameters are: {list(known)}.")
        if nested:
            params["rule"] = replace(Kronecker() if rule is None else rule, **nested)
        super().set_params(**params)
        return self

    @abstractmethod
    def _all_classes(self, targets: Any) -> Any:
        """Return the classes among targets that are all there will be; None where there are no classes."""

    @abstractmethod
    def _accept(self, targets: Any, first: bool, classes: Any) -> None:
        """Begin with the first targets, or refuse those that do not fit them."""

    @abstractmethod
    def _targets(self, targets: Any) -> Tensor:
        """Return targets as the loss takes them."""

    @abstractmethod
    def _losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example."""

    def _meaning(self) -> Callable[[Any, Any], Tensor] | None:
        """Return the loss that tells rules what outputs mean; None where they see it from the targets."""
        return None

    def _checked(self, *data: Any, reset: bool = False) -> Any:
        return validate_data(self, *data, reset=reset, dtype=self.dtype, order="C")

    def _continue(self, X: Any, y: Any, task: Any, sample_weight: Any, classes: Any = None) -> Self:
        """Make one pass over examples of a task, which may be a new one."""
        first = not hasattr(self, "memory_")
        x, targets = self._checked(X, y, reset=first)
        weight = checked_weight(sample_weight, len(x))
        refuse_many_labels(task)
        self._accept(targets, first, classes)
        if self.memory_.steps and task not in (None, self.task_):
            self.consolidate()
        self.task_: Any = self.task_ if task is None else task
        return self._train(self._examples(x, targets, weight), 1)

    def _examples(self, x: Any, targets: Any, weight: Any) -> WeightedExamples:
        """Return the examples that count."""
        every = WeightedExamples(torch.tensor(x, device=self.device), self._targets(targets).to(self.device))
        if weight is None:
            return every
        rows = np.flatnonzero(weight)
        weights = None if (weight[rows] == 1).all() else torch.from_numpy(weight)
        return every._replace(weight=weights).take(rows)

    def _seeded(self) -> Any:
        return _seeded(self._random.randint(2**31 - 1), self.device)

    def _begin(self, outputs: int) -> None:
        self._random, self.task_ = check_random_state(self.random_state), None
        with self._seeded():
            network = (self.module or partial(_perceptron, hidden=self.hidden))(self.n_features_in_, outputs)
        self.network_ = network.to(self.device, getattr(torch, self.dtype))
        self.optimizer_ = self.optimizer(self.network_.parameters(), lr=self.lr)
        self.memory_ = Consolidator(self.network_, self.rule, self.strength, **(self.options or {}))

    def _train(self, examples: WeightedExamples, epochs: int) -> Self:
        self.memory_.attach(self.optimizer_)
        try:
            with self._seeded():
                train(self.network_, self.optimizer_, examples, self._losses, epochs, self.batch_size)
        finally:
            self.memory_.detach()  # hooks do not pickle
        return self

    def _end(self, examples: WeightedExamples | None) -> Self:
        with self._seeded():
            data = None if examples is None else examples.drawn().batches(self.batch_size)
            self.memory_.consolidate(data, loss=self._meaning())
        return self

    def _outputs(self, X: Any) -> Tensor:
        """Return the network's outputs for examples."""
        check_is_fitted(self, "memory_")
        x = torch.tensor(self._checked(X), device=self.device)
        self.network_.eval()
        with torch.no_grad():
            return torch.cat([self.network_(part) for part in x.split(4096)])


class RWalkClassifier(ClassifierMixin, RWalkEstimator):
    """A classifier that learns one task after another; its network returns logits. See `RWalkEstimator` for the arguments."""

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, task: Any = None, sample_weight: Any = None) -> Self:
        """Continue with one pass over examples; the first call needs `classes`, all labels that may ever come.

        A new `task` ends the one before and protects it. The same task, or None, continues it, in any number of calls.
        `sample_weight` is as in `fit`.
        """
        return self._continue(X, y, task, sample_weight, classes)

    def predict_proba(self, X: Any) -> Any:
        """Return each class's probability, of shape (examples, classes), in the order of `classes_`."""
        return self._outputs(X).softmax(1, dtype=torch.float64).cpu().numpy()

    def predict(self, X: Any) -> Any:
        """Return the most likely label of each example."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _all_classes(self, targets: Any) -> Any:
        check_classification_targets(targets)
        return np.unique(targets)

    def _accept(self, targets: Any, first: bool, classes: Any) -> None:
        known = np.unique([] if classes is None else classes) if first else self.classes_
        class_indices(targets if classes is None else np.append(targets, classes), known)
        if first:
            self.classes_: Any = known
            self._begin(len(known))

    def _targets(self, targets: Any) -> Tensor:
        return class_indices(targets, self.classes_)

    def _losses(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction="none")


class RWalkRegressor(RegressorMixin, RWalkEstimator):
    """A regressor of one target or several that learns one task after another, by the mean squared error.

    Its network returns a number for each target; for rules that measure on data it is the mean of a normal distribution of
    variance 1. Targets are taken as they are, so learning rate and strength depend on their unit. To bring them to unit
    variance, use scikit-learn's `TransformedTargetRegressor(RWalkRegressor(), transformer=StandardScaler())`. See
    `RWalkEstimator` for the arguments.
    """

    def partial_fit(self, X: Any, y: Any, *, task: Any = None, sample_weight: Any = None) -> Self:
        """Continue with one pass over examples.

        A new `task` ends the one before and protects it. The same task, or None, continues it, in any number of calls.
        `sample_weight` is as in `fit`.
        """
        return self._continue(X, y, task, sample_weight)

    def predict(self, X: Any) -> Any:
        """Return the predicted targets, of shape (examples,) or (examples, targets), as in the first call."""
        return self._outputs(X).double().cpu().numpy().reshape(-1, *self._shape)

    def __sklearn_tags__(self) -> Any:
        """Return what scikit-learn asks of an estimator: here there may be several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _checked(self, *data: Any, reset: bool = False) -> Any:
        numbers = {"multi_output": True, "y_numeric": True} if len(data) > 1 else {}
        return validate_data(self, *data, reset=reset, dtype=self.dtype, order="C", **numbers)

    def _all_classes(self, targets: Any) -> None:
        """There are none."""

    def _accept(self, targets: Any, first: bool, classes: Any) -> None:  # noqa: ARG002
        if first:
            self._shape = targets.shape[1:]
            self._begin(targets[0].size)
        else:
            self._targets(targets)

    def _targets(self, targets: Any) -> Tensor:
        came, known = targets[0].size, int(np.prod(self._shape))
        if came != known:
            raise ValueError(f"`y` has {came} targets for each example, and had {known} in the first call. Pass as many.")
        return torch.tensor(targets.reshape(len(targets), -1), dtype=getattr(torch, self.dtype))

    def _losses(self, output: Tensor, targets: Tensor) -> Tensor:
        if len(output) != len(targets) or output.numel() != targets.numel():
            came, wanted = tuple(output.shape), tuple(targets.shape)
            raise ValueError(
                f"The network returned shape {came} for targets of shape {wanted}. Let `module` return {wanted[1]}."
            )
        return F.mse_loss(output.reshape(targets.shape), targets, reduction="none").mean(1)

    def _meaning(self) -> Callable[[Any, Any], Tensor] | None:
        return gaussian_loss(self.memory_.rule)


def _rule_params(rule: Any) -> dict[str, Any]:
    """Return the parameters of a rule by name; none of what is no rule."""
    rule = Kronecker() if rule is None else rule
    return {field.name: getattr(rule, field.name) for field in fields(rule)} if isinstance(rule, Rule) else {}


def _perceptron(features: int, outputs: int, hidden: int | Sequence[int]) -> nn.Module:
    """Make a multi-layer perceptron with ReLU."""
    widths = [features, *np.atleast_1d(hidden).tolist()]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


@contextmanager
def _seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """Draw PyTorch's random numbers from a seed, and restore their state at the end."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield
