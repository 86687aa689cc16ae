"""Hugging Face's `Trainer` with a memory: each `train()` is a task, and checkpoints hold the memory too."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from rwalk import Consolidator
from rwalk._errors import explain
from rwalk.importance.base import Importance
from rwalk.integrations._guest import Guest
from rwalk.integrations._pretrained import protect, read
from rwalk.parallel import sharded
from rwalk.parameters import bare

__all__ = ["FILE", "ConsolidationCallback", "protect"]
FILE = "memory.safetensors"  # in a checkpoint's folder


class ConsolidationCallback(Guest, TrainerCallback):
    """Hold a model to what earlier tasks need: `Trainer(..., callbacks=[ConsolidationCallback(RWalk(), strength=10)])`.

    A task ends with `train()`, unless an error or a signal interrupts it. Pass the same callback to the next task's Trainer.
    With `load_best_model_at_end` a task is what led to its best checkpoint. Callbacks that average or restore weights when
    training ends come first, wherever they stand in the list: their weights are the model and the anchor.

    Args:
        rule: how importance is measured; None for the recommended recipe; or a `Consolidator`, such as `protect` returns.
        strength: factor of the penalty; see `Consolidator`.
        loss, logits: for rules that measure on data, as in `Consolidator.consolidate`. Without `loss`, rules that take the
            data's labels, such as `EWC(labels="true")`, take the model's own: of a language model, the mean over tokens. For
            language models `labels="sample"` draws the labels of all tokens that count.
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
        self._reading, self._figures = {"loss": loss, "logits": logits}, _Figures(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Watch the optimiser, and continue from a checkpoint where Trainer does."""
        trainer, folder = _loop()
        _refuse(trainer, self._memory)
        saved = None if folder is None else _saved(folder)
        handler, wrapped = trainer.callback_handler, trainer.model_wrapped
        handler.callbacks = [self._figures, *(each for each in handler.callbacks if each is not self._figures)]
        ranks = isinstance(wrapped, nn.parallel.DistributedDataParallel)
        memory = self.begin(wrapped if ranks else trainer.model, kwargs["optimizer"])
        if saved is not None:
            memory.load(saved)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Put the memory into the checkpoint."""
        wanted = args.load_best_model_at_end or not args.save_only_model
        if wanted and (args.should_save or any(sharded(p) for p in kwargs["model"].parameters())):
            self.memory.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Spare the console, which comes last, the figures of each layer."""
        for name in [name for name in logs if name.startswith(("memory/share/", "memory/drift/"))]:
            del logs[name]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """End the task."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.memory.load(_saved(state.best_model_checkpoint))  # the weights are back there, too
        self.end(**read(kwargs["train_dataloader"], self.memory.rule, **self._reading))


class _Figures(TrainerCallback):
    """Comes first among callbacks: adds the memory's figures to logs before trackers see them, and lets a task end last."""

    def __init__(self, owner: Guest) -> None:
        self.owner = owner

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if "loss" in logs:
            logs |= (figures := self.owner.memory.summary(logs["loss"]).scalars())
            state.log_history[-1] |= figures

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        callbacks = _loop()[0].callback_handler.callbacks  # whatever averages or restores weights comes before the owner
        if self.owner in callbacks:
            callbacks.remove(self.owner)
            callbacks.append(self.owner)


def _loop() -> tuple[Trainer, str | None]:
    """Return the Trainer at work and the folder that it resumes from: what its callbacks are not told, its frame says."""
    frame: Any = sys._getframe()
    while not ("resume_from_checkpoint" in frame.f_locals and isinstance(frame.f_locals.get("self"), Trainer)):
        frame = frame.f_back
    return frame.f_locals["self"], frame.f_locals["resume_from_checkpoint"]


def _saved(folder: str) -> Path:
    """Return where a checkpoint has its memory."""
    if not (path := Path(folder, FILE)).is_file():
        came, expected = f"the checkpoint `{folder}` without a `{FILE}`", "one that was saved with a memory, and whole"
        remedy = "Remove that folder and resume from the checkpoint before it; or load its model and train without resuming."
        raise FileNotFoundError(explain(came, expected, remedy))
    return path


def _refuse(trainer: Any, memory: Consolidator | None) -> None:
    """Refuse engines that hide gradients or weights, checkpoints that callbacks do not see, and weights that were frozen."""
    accelerator, model = trainer.accelerator, bare(trainer.model)
    engine = accelerator.distributed_type.value
    if engine in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (engine == "FSDP" and not getattr(accelerator, "is_fsdp2", False)):
        raise RuntimeError(explain(f"Trainer under {engine}", "gradients and weights in sight", "Train under DDP."))
    if getattr(trainer.args, "enable_jit_checkpoint", False):
        raise RuntimeError(explain("`enable_jit_checkpoint`", "checkpoints that callbacks are told of", "Use `save_steps`."))
    if memory is not None and any(part is bare(memory.model) for part in list(model.modules())[1:]):
        came = "a model that was wrapped, with adapters perhaps, after it was protected"
        remedy = "Call `protect` after `get_peft_model`; or train without a memory, merge the adapters, and then use it."
        raise ValueError(explain(came, "the model that was protected: what is held is frozen now, and cannot move", remedy))
