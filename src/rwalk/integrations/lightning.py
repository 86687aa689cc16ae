"""A callback with which a Lightning `Trainer` trains one task after another without forgetting: one `fit` is one task."""
# ruff: noqa: ARG002 -- hooks have the host's signatures

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from rwalk import Consolidator
from rwalk._errors import explain
from rwalk.importance.base import Importance
from rwalk.integrations._guest import Guest


class ConsolidationCallback(Guest, Callback):
    """Watch the training of a `Trainer`, and consolidate at the end of each `fit` that was not interrupted.

    Callbacks that average or restore weights when training ends come first, wherever they stand in the list: their weights are
    the model and the anchor.

    Give one callback to the trainers of all tasks: `Trainer(callbacks=[ConsolidationCallback(RWalk(), strength=10)])`. Its
    state is part of Lightning's checkpoints. The penalty is logged as `memory/penalty` every `log_every_n_steps`, and all
    figures of `Consolidator.summary` at the end of each task, before it is consolidated.

    Args:
        rule: how importance is measured; None for the recommended recipe; or a `Consolidator` of the model.
        strength: factor of the penalty; see `Consolidator`.
        loss, logits: for rules that measure on data, here on the training loader's; see `Consolidator.consolidate`.
        options: further arguments of `Consolidator`.
    """

    def __init__(
        self,
        rule: Importance[Any] | Consolidator | None = None,
        strength: float | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rule, strength, **options)
        self._reading, self._open = {"loss": loss, "logits": logits}, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimiser of this `fit`."""
        strategy = trainer.strategy
        lasting = getattr(strategy, "_start_method", "popen") == "popen"
        if not (isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and lasting):
            raise _wrong(
                f"the strategy `{type(strategy).__name__}`, which shards parameters, or trains in processes that it forgets",
                "one device, or DistributedDataParallel in processes that stay",
                'Pass `Trainer(devices=1)` or `Trainer(strategy="ddp")`; shard with `fully_shard` in a loop of your own.',
            )
        if len(trainer.optimizers) != 1:
            raise _wrong(
                f"{len(trainer.optimizers)} optimisers from `configure_optimizers`",
                "one, whose steps are watched",
                "Put all parameters into one optimiser, as parameter groups where settings differ.",
            )
        rule = self.begin(strategy.model, trainer.optimizers[0]).rule
        if rule.measures == "data" and not is_overridden("forward", pl_module):
            raise _wrong(
                f"a `{type(pl_module).__name__}` without `forward`, under {type(rule).__name__}, which measures on data",
                "a `forward` that takes the inputs of a batch `(inputs, labels)`",
                "Define `forward`, or use a rule that measures during training, such as `RWalk()`.",
            )
        others = [each for each in trainer.callbacks if each is not self]  # whatever changes weights at the end comes first
        last = sum(not isinstance(each, Checkpoint) for each in others)
        trainer.callbacks = [*others[:last], self, *others[last:]]
        self._open = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the penalty now and then."""
        rhythm = trainer.log_every_n_steps
        if rhythm and (trainer.global_step + 1) % rhythm == 0:
            pl_module.log("memory/penalty", self.memory.penalty())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task."""
        for logger in trainer.loggers:
            logger.log_metrics(self.memory.summary().scalars(), step=trainer.global_step)
        self.end(_Batches(trainer) if is_overridden("forward", pl_module) else None, **self._reading)
        self._open = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a task of which nothing else was left to do, as its checkpoint is of the last epoch's end."""
        if self._open and self.memory.steps:
            trainer.strategy.model_to_device()
            self.on_train_end(trainer, pl_module)
            pl_module.cpu()
        elif self._open:
            remedy = "Make a new `Trainer` for each task, or raise `trainer.fit_loop.max_epochs`."
            warnings.warn(explain("a `fit` without a training step", "a task to be learned", remedy), stacklevel=2)
        else:
            self.refuse_later_changes()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` when training begins: before, the model may not be on its device."""
        self._saved = state_dict


@dataclass
class _Batches:
    """The batches of a trainer's training loader, as its `training_step` gets them."""

    trainer: Trainer

    def __iter__(self) -> Iterator[Any]:
        trainer, most = self.trainer, self.trainer.num_training_batches
        for batch in islice(trainer.train_dataloader, None if most == float("inf") else int(most)):
            ready = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(ready)


def _wrong(*parts: str) -> ValueError:
    return ValueError(explain(*parts))
