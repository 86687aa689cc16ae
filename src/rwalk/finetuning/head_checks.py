"""Whether what comes out of a head is what its model returns, and which loss its labels suggest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk import gradients
from rwalk._parameters import listed
from rwalk.gradients.likelihood import IGNORED
from rwalk.gradients.outputs import own_loss

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and labels, a mean."""


class FirstBatch(NamedTuple):
    """What the checks look at.

    Args:
        inputs: what came into the head, one row for each label.
        labels: those that count.
        target: the labels as they came.
        output: what the model returned.
        own: whether the model was given the labels, too.
    """

    inputs: Tensor
    labels: Tensor
    target: Tensor
    output: Any
    own: bool


def numbers(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(output.reshape(y.shape), y.to(output.dtype))


def several(output: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of yes and no for each label."""
    return F.binary_cross_entropy_with_logits(output.reshape(y.shape), y.to(output.dtype))


def suggested(labels: Tensor) -> Loss:
    """Return the loss that labels suggest."""
    if not labels.is_floating_point():
        return F.cross_entropy
    return several if labels.dim() == 2 and bool(((labels == 0) | (labels == 1)).all()) else numbers


def rows_and_labels(values: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Return inputs or outputs of a head and labels, one row for each label that counts.

    Raises:
        ValueError: if there are no labels, or not as many as rows.
    """
    if not isinstance(target, Tensor):
        raise ValueError('There is a batch without labels. Yield pairs `(inputs, labels)` or mappings with "labels".')
    target = target if target.is_floating_point() else target.long()
    if values.dim() > target.dim() > 1 and values.shape[: target.dim()] == target.shape:  # one label for each token
        values, target = values.flatten(0, target.dim() - 1), target.flatten()
    if len(values) != len(target):
        raise ValueError(
            f"The head gets {len(values)} rows for {len(target)} labels. Pass `head=`, the module that gets one row for each."
        )
    counts = target != IGNORED if target.dim() == 1 and not target.is_floating_point() else slice(None)
    return values[counts], target[counts]


def used_parameters(head: nn.Module, inputs: Tensor) -> list[nn.Parameter]:
    """List the trainable parameters of a head that its output depends on.

    Raises:
        ValueError: if there are none.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    with torch.enable_grad():
        made = head(inputs)
        found = torch.autograd.grad(made.sum(), parameters, allow_unused=True) if made.requires_grad else ()
    used = [p for p, g in zip(parameters, found, strict=False) if g is not None]
    if not used:
        raise ValueError(
            f"The head, a `{type(head).__name__}`, has no parameters that its output depends on. Pass another one."
        )
    return used


def refuse_shared(root: nn.Module, head: nn.Module, used: list[nn.Parameter]) -> None:
    """Raise a ValueError for a head with parameters that other modules have, too, such as the embedding."""
    inside, ids = set(head.modules()), {id(p) for p in used}
    others = {name: m for name, m in root.named_modules() if m not in inside}
    tied = [name for name, m in others.items() if any(id(p) in ids for p in m.parameters(recurse=False))]
    if tied:
        raise ValueError(
            f"The head has weights that {listed(tied)} has as well, and `warm_head` moves nothing except the head. "
            "Leave it out for this model, or give the head weights of its own."
        )


def refuse_labels(inputs: Tensor, made: Tensor, labels: Tensor) -> None:
    """Raise a ValueError for labels that fit what a head makes of its inputs under none of the losses."""
    came, gives, wanted = (tuple(t.shape) for t in (inputs, made, labels))
    shapes = f"The head gets inputs of shape {came} and gives outputs of shape {gives} for labels of shape {wanted}"
    if labels.is_floating_point():
        if made.numel() != labels.numel():
            raise ValueError(f"{shapes}, which are numbers. Pass a head with one output for each, or `loss=`.")
        return
    if made.dim() != labels.dim() + 1 or made.shape[2:] != labels.shape[1:]:
        raise ValueError(
            f"{shapes}, where classes need one row of logits for each label. Pass the module that gets one row for each, and "
            "several labels of one example as floats of 0 and 1. Where a head is called at all tokens and one place is taken "
            "later, leave `warm_head` out."
        )
    if made.shape[1] == 1:
        raise ValueError(
            f"{shapes}: one output cannot tell classes apart. Give the head an output for each class, or pass `loss=`, such as "
            "`lambda output, y: F.binary_cross_entropy_with_logits(output[:, 0], y.float())`."
        )
    counted = labels[labels != IGNORED]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < made.shape[1]:
        raise ValueError(
            f"The labels go from {int(counted.min())} to {int(counted.max())}, and the head has {made.shape[1]} outputs, for "
            f"labels from 0 to {made.shape[1] - 1}. Pass a head with an output for each label."
        )


def models_loss(made: Tensor, batch: FirstBatch, name: str | None, given: Loss | None) -> Loss | None:
    """Return the loss that the model itself computes of a head's outputs; None if it computes none, or one was given.

    Args:
        made: what came out of the head.
        batch: what the model was given and returned.
        name: of a head that was found; None for one that was passed.
        given: the loss that was passed.

    Raises:
        ValueError: if what comes out of a head that was found is not what the model returns, or its loss is another one.
    """
    own = own_loss(batch.output) if batch.own and given is None else None
    possible: tuple[Loss, ...] = (several, numbers) if batch.labels.is_floating_point() else (F.cross_entropy,)
    fitting = [loss for loss in possible if own is not None and _close(loss(made, batch.labels), own)]
    values = _values(batch, made)
    if name is not None and (not fitting if values is None else not _alike(made, values, batch.labels, given)):
        raise ValueError(
            f"The linear layer that is called last, {listed([name])}, does not give what the model returns: it may be an "
            "auxiliary head, a pooler, or an adapter within the head. Pass `head=`, the module whose outputs are the logits."
        )
    if own is not None and not fitting:
        raise ValueError(
            f"The model's own loss is {float(own):.4g}, and that of the head's outputs at the labels is "
            f"{float(suggested(batch.labels)(made, batch.labels)):.4g}: the model shifts the labels, as causal language models "
            "do, or weighs them. Pass `loss=`, which is then taken as it is, or leave `warm_head` out."
        )
    return fitting[0] if fitting else None


def _values(batch: FirstBatch, made: Tensor) -> Tensor | None:
    """Return what the model has returned in the form of what the head has made; None if it has another one."""
    try:
        rows, _ = rows_and_labels(gradients.read_output(batch.output, None), batch.target)
        return rows.reshape(made.shape)
    except (RuntimeError, TypeError, ValueError):
        return None


def _alike(made: Tensor, values: Tensor, labels: Tensor, given: Loss | None) -> bool:
    """Return whether outputs of a head and of its model are the same to a loss; to cross-entropy their mean does not matter."""
    loss = given or suggested(labels)
    limit = 8 * torch.finfo(made.dtype).eps * float(values.abs().max())
    if _close(made, values, limit) or labels.is_floating_point() or made.dim() < 2:
        return _close(made, values, limit)
    a, b = (t - t.mean(1, keepdim=True) for t in (made, values))
    return _close(a, b, limit) and _close(loss(made, labels), loss(values, labels))


def _close(a: Tensor, b: Tensor, least: float = 1e-4) -> bool:
    """Return whether two losses, or two outputs, are equal up to rounding, which is `least` near 0; nan equals nan."""
    limit = max(1e-4, *(4 * torch.finfo(t.dtype).eps for t in (a, b)))
    a, b = a.float(), b.float()
    near = (a - b).abs() <= least + limit * a.abs().max()
    return bool(((a == b) | near | (a.isnan() & b.isnan())).all())
