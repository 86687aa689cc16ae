"""Avalanche: a memory as a plugin of its supervised strategies, and a plugin that replaces Avalanche's own Riemannian Walk.

Give the plugin to any strategy: `Naive(..., plugins=[RWalkPlugin(ewc_lambda=1.0)])`. A task is an experience, or in an online
stream with known boundaries all parts of one. The loss that Avalanche logs is that of the task alone, since the pull is
added to the gradients; `MemoryMetrics` logs the penalty.
"""

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models.utils import is_multi_task_module
from avalanche.training.plugins import SupervisedPlugin

from rwalk import RWalk
from rwalk.integrations._callback import HostCallback


class ConsolidationPlugin(HostCallback, SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Holds a strategy's model to what earlier experiences need.

    `plugin.memory` is the `Consolidator`, once training has begun. Rules that measure on data read that of each experience
    through the strategy's own loader of training data, with the arguments of `train`, except for replayed examples. To continue
    after a restart, load the model as it was, then `state_dict` into a new plugin, and train.

    Args:
        rule: how importance is measured, such as `SI()`; None for the recommended one; or a `Consolidator`.
        strength: factor of the penalty.
        options: `blend`, `snapshot`, `once` and `journal`, as `HostCallback` has them, and further arguments of `Consolidator`.
    """

    _parts = 0

    def before_training(self, strategy: Any, **_: Any) -> None:
        """Bind the memory before the model grows for the next experience, as a saved state is of the model before that.

        At the end of an experience other plugins come first, as they may change the weights, and the evaluation comes last.
        """
        others = [each for each in strategy.plugins if each is not self]
        last = others.index(strategy.evaluator) if strategy.evaluator in others else len(others)
        strategy.plugins = [*others[:last], self, *others[last:]]
        self.bind(strategy.model)

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Attach to the optimiser, which has the model's new parameters by now."""
        self.memory.model = strategy.model  # a new one if each experience starts afresh, as in GDumb; names are the same
        self.begin(strategy.model, strategy.optimizer)

    before_training_epoch = before_training_exp  # some strategies and plugins replace the optimiser in between

    def after_training_exp(self, strategy: Any, **options: Any) -> None:
        """Consolidate, before Avalanche evaluates."""
        experience = strategy.experience
        if _is_part(experience):
            self._parts = 1 if experience.is_first_subexp else self._parts + 1
            if not (experience.is_last_subexp or self._parts == experience.sub_stream_length):  # the flag may be missing
                return
        self.end(_ExperienceBatches(strategy, options))

    def before_eval(self, strategy: Any, **_: Any) -> None:  # noqa: ARG002
        """Begin to note which experiences are evaluated."""
        self._evaluated: dict[str, tuple[str, str]] = {}

    def after_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Note an experience by its number from 1, with what Avalanche calls it in its figures."""
        number, stream = strategy.experience.current_experience, strategy.experience.origin_stream.name
        self._evaluated[str(number + 1)] = f"/eval_phase/{stream}_stream/", f"/Exp{number:03d}"

    def after_eval(self, strategy: Any, **_: Any) -> None:
        """Hand the scores of the evaluated experiences to a journal, once a task has ended."""
        if self.journal is not None and self._memory is not None and not self._memory.steps:
            figures, metric = strategy.evaluator.get_last_metrics(), self.journal.metric
            start = "Top1_Acc_Exp" if metric == "accuracy" else f"{metric}_Exp"
            self.note({
                number: next((v for k, v in figures.items() if k.startswith(start + middle) and k.endswith(end)), None)
                for number, (middle, end) in self._evaluated.items()
            })  # fmt: skip


class RWalkPlugin(ConsolidationPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Riemannian Walk with the arguments, the defaults and the unit of strength of Avalanche's plugin of this name.

    Args:
        ewc_lambda: strength of the penalty, `Consolidator`'s `strength`.
        ewc_alpha: weight of the new value in the running Fisher information, `RWalk`'s `alpha`.
        delta_t: iterations between updates of the scores, `RWalk`'s `delta_t`.
        options: further arguments of `Consolidator`, such as `pull="proximal"`.
    """

    def __init__(self, ewc_lambda: float = 0.1, ewc_alpha: float = 0.9, delta_t: int = 10, **options: Any) -> None:
        rule = RWalk(alpha=ewc_alpha, delta_t=delta_t, eps=torch.finfo(torch.float32).eps)
        super().__init__(rule, ewc_lambda, **options)


class MemoryMetrics(PluginMetric):
    """Figures of a plugin's memory at the end of each epoch, among the metrics of an `EvaluationPlugin`.

    Penalty, and for each layer its share of the importance and its drift: `memory/penalty`, `memory/drift/features.0`.
    """

    def __init__(self, plugin: ConsolidationPlugin) -> None:
        super().__init__()
        self._plugin = plugin

    def result(self) -> dict[str, float]:
        """Return the current figures."""
        return self._plugin.memory.summary(snapshot=self._plugin.snapshot).scalars()

    def reset(self) -> None:
        """Do nothing, as nothing is accumulated."""

    def after_training_epoch(self, strategy: Any) -> list[MetricValue]:
        """Pass the figures to the loggers."""
        return [MetricValue(self, name, value, strategy.clock.train_iterations) for name, value in self.result().items()]


class _ExperienceBatches:
    """The batches of the last task as the strategy's model takes them, loaded again at each pass."""

    def __init__(self, strategy: Any, options: dict[str, Any]) -> None:
        self._strategy, self._options = strategy, options

    def __iter__(self) -> Iterator[Any]:
        strategy, experience = self._strategy, self._strategy.experience
        kept = strategy.adapted_dataset, strategy.dataloader, strategy.mbatch
        try:
            if _is_part(experience):
                strategy.adapted_dataset = experience.origin_experience.dataset.train()
            strategy.make_train_dataloader(**self._options)
            for strategy.mbatch in strategy.dataloader:  # noqa: B020
                strategy._unpack_minibatch()
                several = is_multi_task_module(strategy.model)
                yield (strategy.mb_x, strategy.mb_task_id) if several else strategy.mb_x, strategy.mb_y
        finally:
            strategy.adapted_dataset, strategy.dataloader, strategy.mbatch = kept


def _is_part(experience: Any) -> bool:
    """Return whether an experience is part of a known task, in an online stream."""
    return isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries
