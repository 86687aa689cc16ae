"""Hugging Face's `Trainer` with a memory: each `train()` is a task, and checkpoints include the memory."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from inspect import signature
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from rwalk import Consolidator
from rwalk._errors import printable, warn
from rwalk._parameters import bare, named_parameters, state_dtype
from rwalk.distributed.shards import sharded
from rwalk.finetuning import Distillation, warm_head
from rwalk.finetuning.head import called_head
from rwalk.integrations._callback import HostCallback
from rwalk.integrations._trainer import running_trainer, while_training
from rwalk.rules.base import Rule

__all__ = ["FILE", "ConsolidationCallback", "protect"]
FILE = "memory.safetensors"  # in a checkpoint's folder


class ConsolidationCallback(HostCallback, TrainerCallback):
    """Protects what earlier tasks need: `Trainer(..., callbacks=[ConsolidationCallback(RWalk(), strength=10)])`.

    A task ends with `train()`, unless an error or a signal interrupts it. Pass the same callback to the next task's Trainer.
    With `load_best_model_at_end` a task ends at its best checkpoint. Callbacks that average or restore weights when training
    ends run first, wherever they are in the list: their weights are those of the model and of the anchor.

    Args:
        rule: how importance is measured; None for the recommended one; or a `Consolidator`, such as `protect` returns.
        strength: factor of the penalty; see `Consolidator`.
        warm_head: True, or the head as a module or by name: fit it on the task's data before each task; see `rwalk.warm_head`,
            which takes labels of several classes for each example, too. Each task needs a head of its own, as in
            `model.classifier = heads[task]`.
        distill: adds its term to the model's own loss; make it of the model as it was before all tasks.
        loss, logits: for rules that measure on data, as in `Consolidator.consolidate`. Without `loss`, rules that take the
            data's labels, such as `EWC(labels="true")`, take the model's own: of a language model, the mean over tokens. For
            language models `labels="sample"` draws the labels of all tokens that count.
        options: `blend`, `snapshot`, `once` and `journal`, as `HostCallback` has them, and further arguments of `Consolidator`.
    """

    def __init__(
        self,
        rule: Rule[Any] | Consolidator | None = None,
        strength: float | None = None,
        *,
        warm_head: bool | str | nn.Module = False,
        distill: Distillation | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rule, strength, **options)
        self._reading, self._figures = {"loss": loss, "logits": logits}, _Figures(self)
        self._warm_head, self._distill, self._during = warm_head, distill, ExitStack()
        self._fitted: list[weakref.ref[nn.Module]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Attach to the optimiser, and continue from a checkpoint if Trainer does."""
        trainer, folder = running_trainer()
        _refuse(trainer, self._memory)
        if self.journal is not None:
            _refuse_unscored(trainer, self.journal.metric)
        saved = None if folder is None else _saved(folder)
        handler, wrapped = trainer.callback_handler, trainer.model_wrapped
        handler.callbacks = [self._figures, *(each for each in handler.callbacks if each is not self._figures)]
        ranks = isinstance(wrapped, nn.parallel.DistributedDataParallel)
        self._during.close()
        if saved is not None and state.global_step >= state.max_steps:
            _warn_of_finished(str(folder), state)
        model = wrapped if ranks else trainer.model
        memory = self.bind(model)
        if self._warm_head is not False:
            self._warm(trainer, None if self._warm_head is True else self._warm_head, saved is None)
        if self._distill is not None:
            counted = not getattr(trainer, "_loss_shifts_labels", False)
            self._during.enter_context(self._distill.in_loss(trainer.model, while_training(trainer), counted))
        self.begin(model, kwargs["optimizer"])
        if saved is not None:
            memory.load(saved)

    def _warm(self, trainer: Trainer, head: str | nn.Module | None, fit: bool) -> None:
        """Fit the head on all of a trainer's data, in order, without a trace in the random state; or only note which it is."""
        batch_size = trainer.args.per_device_eval_batch_size
        with torch.random.fork_rng():
            data = _LabelledBatches(_loader(trainer.model, trainer.train_dataset, trainer.data_collator, batch_size))
            module = called_head(trainer.model, data, head)
            if fit and (any(earlier() is module for earlier in self._fitted) or self._learned(module)):
                raise ValueError(
                    "The head was fitted for an earlier task, and fitting it anew would forget that one. Give each task a head "
                    "of its own, as in `model.classifier = heads[task]`; where all tasks share one, leave `warm_head` out."
                )
            if fit:
                warm_head(trainer.model, data, head)
        self._fitted.append(weakref.ref(module))

    def _learned(self, head: nn.Module) -> bool:
        """Return whether a head is as the last task that was trained has left it."""
        memory = self.memory._memory
        if not memory.tasks or (memory.last_end is not None and not memory.last_end.observed):  # or was estimated only
            return False
        names = {id(p): name for name, p in named_parameters(memory.model).items()}
        pairs = [(p.detach(), memory.anchor.point.get(names.get(id(p), ""))) for p in head.parameters()]
        return all(
            point is not None and torch.equal(p.to(state_dtype(p)), point.to(p.device, state_dtype(p))) for p, point in pairs
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the memory in the checkpoint."""
        wanted = args.load_best_model_at_end or not args.save_only_model
        if wanted and (args.should_save or any(sharded(p) for p in kwargs["model"].parameters())):
            self.memory.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Leave the figures of each layer out of the console, which comes last."""
        for name in [name for name in logs if name.startswith(("memory/share/", "memory/drift/"))]:
            del logs[name]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """End the task."""
        self._during.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.memory.load(_saved(state.best_model_checkpoint))  # the weights are those of this checkpoint, too
        self.end(**_arguments(kwargs["train_dataloader"], self.memory.rule, **self._reading))
        if self.journal is not None:
            trainer, metric = running_trainer()[0], self.journal.metric
            figures = trainer.evaluate()
            self.note({name: figures.get(f"eval_{name}_{metric}") for name in trainer.eval_dataset})
        if self.snapshot is not None:
            running_trainer()[0].log(self.snapshot.kept(kwargs["model"]).scalars())


class _Figures(TrainerCallback):
    """The first of the callbacks: it adds the memory's figures to logs before trackers see them, and lets a task end last."""

    def __init__(self, owner: HostCallback) -> None:
        self.owner = owner

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        figures = self.owner.memory.summary(logs["loss"]).scalars() if "loss" in logs else {}
        if self.owner.snapshot is not None and any(name.startswith("eval_") for name in logs):
            figures |= self.owner.snapshot.kept(kwargs["model"]).scalars()
        logs |= figures
        state.log_history[-1] |= figures

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        callbacks = running_trainer()[
            0
        ].callback_handler.callbacks  # callbacks that average or restore weights come before the owner
        if self.owner in callbacks:
            callbacks.remove(self.owner)
            callbacks.append(self.owner)


def _warn_of_finished(folder: str, state: Any) -> None:
    warn(
        f"The checkpoint `{printable(folder)}` is at step {state.global_step} of {state.max_steps}: nothing is left to train, "
        "and the task ends as it is. If that is the checkpoint of an earlier task, give each task an `output_dir` of its own."
    )


def _saved(folder: str) -> Path:
    """Return the file of the memory in a checkpoint."""
    if not (path := Path(folder, FILE)).is_file():
        raise FileNotFoundError(
            f"The checkpoint `{printable(folder)}` is without a `{FILE}`: it was saved without a memory, or not completely. "
            "Remove that folder and resume from the checkpoint before it; or load its model and train without resuming."
        )
    return path


def _refuse(trainer: Any, memory: Consolidator | None) -> None:
    """Refuse engines that hide gradients or weights, checkpoints without callbacks, and models wrapped after protection."""
    accelerator, model = trainer.accelerator, bare(trainer.model)
    engine = accelerator.distributed_type.value
    if engine in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (engine == "FSDP" and not getattr(accelerator, "is_fsdp2", False)):
        raise RuntimeError(f"There is a Trainer under {engine}, which hides gradients and weights. Train under DDP.")
    if getattr(trainer.args, "enable_jit_checkpoint", False):
        raise RuntimeError("`enable_jit_checkpoint` saves checkpoints without the callbacks. Use `save_steps` instead.")
    if memory is not None and any(part is bare(memory.model) for part in list(model.modules())[1:]):
        raise ValueError(
            "The model was wrapped after it was protected, perhaps with adapters, so that the protected weights are frozen. "
            "Call `protect` after `get_peft_model`; or train without a memory, merge the adapters, and then use it."
        )


def _refuse_unscored(trainer: Any, metric: str) -> None:
    """Refuse a Trainer whose evaluation cannot give a journal what it needs."""
    if not isinstance(trainer.eval_dataset, Mapping):
        raise ValueError(
            "A journal needs the evaluation sets of all tasks by name, in the order of the tasks. Pass "
            '`Trainer(eval_dataset={"first": ..., "second": ...})`.'
        )
    if metric != "loss" and trainer.compute_metrics is None:
        raise ValueError(
            f"The journal's metric is `{printable(metric)}`, and Trainer computes the loss alone. Pass `compute_metrics`, or "
            '`Journal(..., metric="loss", higher=False)`.'
        )


def protect(
    model: nn.Module,
    dataset: Any,
    rule: Rule[Any] | None = None,
    strength: float | None = None,
    *,
    data_collator: Callable[[Any], Any] = default_data_collator,
    batch_size: int = 8,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Consolidator:
    """Protect what a pretrained model can do, before any fine-tuning: pass the result to `ConsolidationCallback`.

    Parameters that require gradients are protected: under PEFT those of the adapters. `summary()` counts them.

    Args:
        model: the pretrained model, with its adapters, if any.
        dataset: examples of what it does well, as Trainer takes them, or a loader; None for rules that measure nothing.
        rule: one that measures on data, such as `EWC()`; for a language model `EWC(labels="sample")`, for embeddings
            `EWC(labels="output")`.
        strength: as in `Consolidator`.
        data_collator: as in Trainer.
        batch_size: how many examples are read at a time; the result does not depend on it.
        loss: as in `ConsolidationCallback`.
        logits: as in `ConsolidationCallback`.
        options: further arguments of `Consolidator`.

    Raises:
        RuntimeError: if the rule measures during training.
        ValueError: if everything is frozen, or there is no data that the rule can measure on.
    """
    memory = Consolidator(model, rule, strength, **options)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "The model's parameters are all frozen. Unfreeze those that fine-tuning moves with `requires_grad_(True)`, or add "
            "adapters first."
        )
    data = None if dataset is None else _loader(model, dataset, data_collator, batch_size)
    memory.estimate(**_arguments(data, memory.rule, loss, logits))
    return memory


class _LabelledBatches:
    """A loader's batches; a batch whose labels have other names than "labels" is its own target.

    A batch of several columns of texts, as sentence-transformers has them, becomes one batch for each column.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(0)  # the same order, even if training was resumed in the middle of an epoch
        for batch in self._data:
            if columns := _columns(batch):
                yield from columns
            else:
                yield (batch, batch) if isinstance(batch, Mapping) and "labels" not in batch else batch

    def __length_hint__(self) -> int:
        """Return how many batches there are, 0 if that is unknown."""
        return length_hint(self._data, 0)


def _columns(batch: Any) -> list[dict[str, Any]]:
    """Return the features of each column of a batch such as `anchor_input_ids`, `positive_input_ids`; else none."""
    if not isinstance(batch, Mapping) or "input_ids" in batch:
        return []
    prefixes = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
    return [{n.removeprefix(prefix): value for n, value in batch.items() if n.startswith(prefix)} for prefix in prefixes]


def _loader(model: nn.Module, dataset: Any, collator: Callable[[Any], Any], batch_size: int) -> Iterable[Any]:
    """Load a data set in order, with the columns that the model takes, as Trainer does."""
    if isinstance(dataset, DataLoader):
        return dataset
    root: Any = bare(model)
    names = signature((root.get_base_model() if hasattr(root, "get_base_model") else root).forward).parameters
    return DataLoader(dataset, batch_size, collate_fn=RemoveColumnsCollator(collator, [*names, "label", "label_ids"]))


def _arguments(data: Iterable[Any] | None, rule: Rule[Any], loss: Any, logits: Any) -> dict[str, Any]:
    """Return the arguments of `consolidate`; a rule for the data's labels takes the loss that the model computes."""
    own = _models_loss if getattr(rule, "labels", None) == "true" else None
    return {"data": None if data is None else _LabelledBatches(data), "loss": loss or own, "logits": logits}


def _models_loss(output: Any, _: Any) -> Tensor:
    """Return the loss in a model's output, from where Trainer reads it.

    Raises:
        ValueError: if there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if not isinstance(loss, Tensor):
        raise ValueError(
            "The model returned an output without the model's own loss, as the batch has no labels. Let the data collator make "
            'them, mostly under "labels", or pass `loss=`.'
        )
    return loss
