"""A callback with which a Lightning `Trainer` trains one task after another without forgetting: each `fit` is a task."""
# ruff: noqa: ARG002 -- hooks have Lightning's signatures

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
from rwalk._errors import warn
from rwalk.integrations._callback import HostCallback
from rwalk.rules.base import Rule


class ConsolidationCallback(HostCallback, Callback):
    """Protects what a `Trainer` has learned, and consolidates at the end of each `fit` that was not interrupted.

    Callbacks that average or restore weights when training ends run first, wherever they are in the list: their weights are
    those of the model and of the anchor.

    Give one callback to the trainers of all tasks: `Trainer(callbacks=[ConsolidationCallback(RWalk(), strength=10)])`. Its
    state is part of Lightning's checkpoints. The penalty is logged as `memory/penalty` every `log_every_n_steps`, and all
    figures of `Consolidator.summary` at the end of each task, before it is consolidated.

    Args:
        rule: how importance is measured; None for the recommended one; or a `Consolidator` of the model.
        strength: factor of the penalty; see `Consolidator`.
        loss, logits: for rules that measure on data, here on the training loader's; see `Consolidator.consolidate`.
        options: `blend`, `snapshot`, `once` and `journal`, as `HostCallback` has them, and further arguments of `Consolidator`.
    """

    def __init__(
        self,
        rule: Rule[Any] | Consolidator | None = None,
        strength: float | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rule, strength, **options)
        self._reading, self._open = {"loss": loss, "logits": logits}, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimiser of this `fit`."""
        strategy = trainer.strategy
        lasting = getattr(strategy, "_start_method", "popen") == "popen"
        if not (isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and lasting):
            raise ValueError(
                f"The strategy `{type(strategy).__name__}` shards parameters, or trains in processes that end with `fit`. Pass "
                '`Trainer(devices=1)` or `Trainer(strategy="ddp")`; to shard, use `fully_shard` in a loop of your own.'
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"`configure_optimizers` returned {len(trainer.optimizers)} optimisers, and a memory works with one. Put all "
                "parameters into one optimiser, with a parameter group for each setting."
            )
        rule = self.begin(strategy.model, trainer.optimizers[0]).rule
        if rule.measures == "data" and not is_overridden("forward", pl_module):
            raise ValueError(
                f"`{type(pl_module).__name__}` has no `forward`, which {type(rule).__name__} needs to measure on data. Define "
                "`forward` for the inputs of a batch `(inputs, labels)`, or use a rule that measures during training, such as "
                "`RWalk()`."
            )
        others = [each for each in trainer.callbacks if each is not self]  # callbacks that change weights at the end come first
        last = sum(not isinstance(each, Checkpoint) for each in others)
        trainer.callbacks = [*others[:last], self, *others[last:]]
        self._open = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse validation that cannot give a journal what it needs."""
        if self.journal is not None and not isinstance(trainer.val_dataloaders, Mapping):
            raise ValueError(
                "A journal needs the validation sets of all tasks by name, in the order of the tasks. Pass "
                '`fit(model, loader, val_dataloaders={"first": ..., "second": ...})`.'
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the penalty every `log_every_n_steps`."""
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            pl_module.log("memory/penalty", self.memory.penalty())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how much of what the model knew before is left, if there is a snapshot."""
        if self.snapshot is not None and not trainer.sanity_checking:
            pl_module.log_dict(self.snapshot.kept(pl_module).scalars())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task."""
        for logger in trainer.loggers:
            logger.log_metrics(self.memory.summary().scalars(), step=trainer.global_step)
        self.end(_TrainingBatches(trainer) if is_overridden("forward", pl_module) else None, **self._reading)
        self._open = False
        if self.journal is not None:
            _validate(trainer)
            self.note(_scores(trainer, self.journal.metric))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a task that was resumed from a checkpoint of the end of its last epoch, with nothing left to train."""
        if self._open and self.memory.steps:
            trainer.strategy.model_to_device()
            self.on_train_end(trainer, pl_module)
            pl_module.cpu()
        elif self._open:
            warn(
                "There was a `fit` without a training step, so no task was learned. Make a new `Trainer` for each task, or "
                "raise `trainer.fit_loop.max_epochs`."
            )
        else:
            self.refuse_later_changes()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` when training begins; the model may not be on its device before."""
        self._saved = state_dict


def _validate(trainer: Trainer) -> None:
    """Run the validation loop once more, as Lightning itself does in training."""
    connector = trainer._logger_connector
    first, trainer.validating = connector._first_loop_iter, True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training, connector._first_loop_iter = True, first


def _scores(trainer: Trainer, metric: str) -> dict[str, float | None]:
    """Return what was logged of a metric on each validation set: under its name, or one that ends with it (`val_accuracy`)."""
    names, found = list(trainer.val_dataloaders), dict[str, float | None]()
    for place, name in enumerate(names):
        ending = f"/dataloader_idx_{place}" if len(names) > 1 else ""
        known = {key.removesuffix(ending): value for key, value in trainer.callback_metrics.items() if key.endswith(ending)}
        fitting = [key for key in known if key == metric or key.endswith((f"_{metric}", f"/{metric}"))]
        found[name] = float(known[fitting[0]]) if fitting else None
    return found


@dataclass
class _TrainingBatches:
    """The batches of a trainer's training loader, as its `training_step` gets them."""

    trainer: Trainer

    def __iter__(self) -> Iterator[Any]:
        trainer, most = self.trainer, self.trainer.num_training_batches
        for batch in islice(trainer.train_dataloader, None if most == float("inf") else int(most)):
            ready = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(ready)
