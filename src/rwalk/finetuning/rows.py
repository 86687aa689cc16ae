"""Outputs of a model as rows, one for each example or token that counts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare
from rwalk.gradients.outputs import attention_mask, entry

Read = Callable[..., Tensor]
"""Reads what matters from a model's output: `read(output)`, or `read(output, inputs)`."""


class OutputRows(NamedTuple):
    """What a model says about a batch.

    Args:
        values: one row for each example or token that counts, (rows, size).
        logits: whether these are logits.
    """

    values: Tensor
    logits: bool


def read_rows(output: Any, batch: Any, read: Read | None, logits: bool | None = None) -> OutputRows:
    """Return the rows of an output.

    Without `read` these are the output's `logits`; its `sentence_embedding`; of an encoder the mean of its last hidden states
    over the tokens that count, or over the places of a feature map; or the output itself, if it is a tensor.

    Args:
        output: what the model returned.
        batch: what it was given.
        read: what to take of it.
        logits: whether that is logits; where None, what has this name is.

    Raises:
        TypeError: if there is no such tensor.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
    hidden = None if read is not None else _mean_of_tokens(output, inputs)
    found = gradients.read_output(output, read, inputs) if hidden is None else hidden
    named = read is None and not isinstance(output, Tensor) and entry(output, "logits") is found
    mask = attention_mask(inputs)
    flat = found.reshape(-1, found.shape[-1]) if found.dim() > 1 else found.reshape(-1, 1)
    if found.dim() == 3 and mask is not None and mask.shape == found.shape[:2]:
        flat = flat[mask.flatten().bool().to(flat.device)]
    return OutputRows(flat, named if logits is None else logits)


def _mean_of_tokens(output: Any, inputs: Any) -> Tensor | None:
    """Return the mean of an encoder's last hidden states over the tokens that count, or places; None for other outputs."""
    hidden, mask = entry(output, "last_hidden_state"), attention_mask(inputs)
    if isinstance(output, Tensor) or not isinstance(hidden, Tensor):
        return None
    if hidden.dim() > 3:  # (examples, channels, height, width)
        return hidden.flatten(2).mean(2)
    if mask is None:
        return hidden.mean(1)
    weight = mask.to(hidden).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Yield a function that calls a model on a batch in eval mode, without gradients or a trace in it."""
    root = bare(model)
    with gradients.isolated(model) as kept, torch.no_grad():
        yield lambda batch: kept.call(gradients.forward, root, batch)


def without_labels(batch: Any) -> Any:
    """Return a batch without labels, so that a model computes no loss."""
    return {name: value for name, value in batch.items() if name != "labels"} if isinstance(batch, Mapping) else batch
