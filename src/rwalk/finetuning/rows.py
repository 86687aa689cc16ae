"""Outputs of a model as rows, one for each example or token that counts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare

Read = Callable[..., Tensor]
"""Reads what matters from a model's output: `read(output)`, or `read(output, batch)`."""


class Rows(NamedTuple):
    """What a model says about a batch.

    Args:
        values: one row for each example or token that counts, (rows, size).
        logits: whether these are logits.
    """

    values: Tensor
    logits: bool


def read_rows(output: Any, batch: Any, read: Read | None, logits: bool | None = None) -> Rows:
    """Return the rows of an output.

    Without `read` these are the output's `logits`; its `sentence_embedding`; of an encoder the mean of its last hidden states
    over the tokens that count; or the output itself, if it is a tensor.

    Args:
        output: what the model returned.
        batch: what it was given.
        read: what to take of it.
        logits: whether that is logits; where None, what has this name is.

    Raises:
        TypeError: if there is no such tensor.
    """
    found, named = _take(output, batch, read)
    if not isinstance(found, Tensor) or not found.dim():
        raise TypeError(
            f"The model's output is a `{type(output).__name__}` without logits or embeddings. Pass `read=`, a function of the "
            "output, or of output and batch, that returns a tensor with one row for each example."
        )
    mask = _mask(batch)
    flat = found.reshape(-1, found.shape[-1]) if found.dim() > 1 else found.unsqueeze(1)
    if found.dim() == 3 and mask is not None and mask.shape == found.shape[:2]:
        flat = flat[mask.flatten().bool().to(flat.device)]
    return Rows(flat, named if logits is None else logits)


def _take(output: Any, batch: Any, read: Read | None) -> tuple[Any, bool]:
    """Return what to look at, and whether it is called logits."""
    if read is not None:
        return (read(output, batch) if _takes_two(read) else read(output)), False
    if isinstance(output, Tensor):
        return output, False
    for name in ("logits", "sentence_embedding"):
        found = _entry(output, name)
        if found is not None:
            return found, name == "logits"
    hidden, mask = _entry(output, "last_hidden_state"), _mask(batch)
    if isinstance(hidden, Tensor) and mask is not None:
        weight = mask.to(hidden).unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1), False
    return (None if hidden is None else hidden.mean(1)), False


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _mask(batch: Any) -> Tensor | None:
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _takes_two(read: Read) -> bool:
    needed = [p for p in signature(read).parameters.values() if p.default is Parameter.empty]
    return len(needed) > 1


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Yield a function that calls a model on a batch in eval mode, without gradients or a trace in it."""
    root = bare(model)
    with gradients.isolated(model) as kept, torch.no_grad():
        yield lambda batch: kept.call(gradients.forward, root, batch)


def without_labels(batch: Any) -> Any:
    """Return a batch without the labels of which a model would compute a loss."""
    return {name: value for name, value in batch.items() if name != "labels"} if isinstance(batch, Mapping) else batch
