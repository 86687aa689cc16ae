"""Answers that stay as they were: a term of the loss that keeps a model's distribution near that of the model before.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531); as a penalty on forgetting Li and Hoiem 2016 (arXiv 1606.09282).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare, state_dtype
from rwalk.finetuning.rows import Read, read_rows, without_labels
from rwalk.gradients.likelihood import IGNORED


class Distillation:
    """weight * KL(softmax(old / T) || softmax(new / T)) * T^2, the mean over rows: `loss = loss + distill(x, model(x))`.

    The old model is a frozen copy in eval mode; with PEFT the same model without its adapters, which takes no memory, and with
    the modules of before `get_peft_model` in place of its `modules_to_save`, such as a head. It costs one forward pass a step.
    A consolidator beside it sees the gradient of the whole loss.

    Args:
        model: the network as it should stay, before it is trained further.
        weight: factor of the term.
        temperature: T, which divides the logits of both.
        read: reads the logits from an output, as for `Snapshot`; rows of tokens that do not count are left out.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, temperature: float = 2.0, read: Read | None = None) -> None:
        if not weight >= 0 or not 0 < temperature < float("inf"):
            raise ValueError(
                f"`weight` must be 0 or more and `temperature` above 0, but they are {weight!r} and {temperature!r}."
            )
        self.weight, self.temperature, self._read = weight, temperature, read
        root: Any = bare(model)
        self._adapted = root if hasattr(root, "disable_adapter") else None
        self._old = None if self._adapted is not None else frozen_copy(root)

    def __call__(self, batch: Any, output: Any) -> Tensor:
        """Return the term for a batch and what the model in training made of it.

        Args:
            batch: what the model was given, or pairs `(inputs, labels)` of it.
            output: what it returned.
        """
        new = read_rows(output, batch, self._read)
        with torch.no_grad(), self._old_model() as old:
            before = read_rows(gradients.forward(old, without_labels(batch)), batch, self._read)
        t = self.temperature
        target, answer = ((rows.values.to(state_dtype(rows.values)) / t).log_softmax(1) for rows in (before, new))
        term = nn.functional.kl_div(answer, target, reduction="batchmean", log_target=True)
        return self.weight * t * t * term

    @contextmanager
    def _old_model(self) -> Iterator[nn.Module]:
        """Yield the old model, in eval mode."""
        if self._old is not None:
            yield self._old
            return
        adapted: Any = self._adapted
        modes = [(module, module.training) for module in adapted.modules()]
        flags = [(p, p.requires_grad) for p in adapted.parameters()]
        adapted.eval()
        try:
            with adapted.disable_adapter():
                yield adapted
        finally:
            for module, mode in modes:
                module.training = mode
            for p, required in flags:  # PEFT unfreezes whatever adapter is active
                p.requires_grad = required

    @contextmanager
    def in_loss(self, model: nn.Module, active: Callable[[], bool] = lambda: True, first_counts: bool = True) -> Iterator[None]:
        """Add the term to the loss that a model computes itself, in train mode, as Hugging Face's do.

        Args:
            model: the network.
            active: whether the term is to be added now; asked in each forward pass.
            first_counts: whether `num_items_in_batch` counts the first label of each row; not where labels are shifted.

        Raises:
            RuntimeError: in a forward pass without such a loss.
        """
        hook = partial(self._added, torch.compiler.disable(active), first_counts)
        handle = bare(model).register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _added(
        self,
        active: Callable[[], bool],
        first_counts: bool,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if not model.training or not torch.is_grad_enabled() or not self.weight or not active():
            return None
        if not isinstance(getattr(output, "loss", None), Tensor):
            raise RuntimeError(
                "The model's output has no loss that the term could be added to. In a loop or a `compute_loss` of your own, "
                "add `distill(batch, output)` to the loss."
            )
        batch = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"} or (args, None)
        output["loss"] = output.loss + _share_of_step(kwargs, first_counts) * self(batch, output)
        return output


def _share_of_step(kwargs: Mapping[str, Any], first_counts: bool) -> float:
    """Return the share of a step's labels that are in this micro-batch: Trainer adds up the losses of all of them."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    shifted = kwargs.get("shift_labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    counted = shifted if isinstance(shifted, Tensor) else labels if first_counts else labels[..., 1:]
    return int((counted != IGNORED).sum()) / (float(items) or 1.0)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it is now, in eval mode, that nothing trains."""
    old = copy.deepcopy(model).eval().requires_grad_(False)
    old.zero_grad()
    return old
