"""A new head is fitted first, on the features as they are, so that a random one does not spoil the network below it.

Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution" (LP-FT), arXiv 2202.10054.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk import gradients
from rwalk._errors import printable
from rwalk._parameters import bare
from rwalk.gradients.batches import examples
from rwalk.gradients.likelihood import IGNORED
from rwalk.gradients.texts import readable


class Features(NamedTuple):
    """What a head is fitted on.

    Args:
        inputs: what came into the head, one row for each label.
        labels: what should come out of it.
    """

    inputs: Tensor
    labels: Tensor


def warm_head(
    model: nn.Module,
    data: Iterable[Any],
    head: nn.Module | str | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    penalty: float = 1.0,
    steps: int = 100,
) -> float:
    """Fit a model's head on its features as they are, before the rest is trained: `warm_head(model, loader)`.

    One pass over the data without gradients, then L-BFGS on the head alone. All other weights, modes, buffers and gradients
    stay as they are. The features of all data are held in memory meanwhile.

    Args:
        model: the network.
        data: batches `(inputs, labels)`, or mappings with "labels".
        head: the head, as a module or by name; the linear layer that is called last if None. What comes out of it must be the
            logits, or the predictions.
        loss: of outputs and labels, a mean; cross-entropy for whole numbers, squared error for others if None.
        penalty: weight of half the squared norm of the head's weights over the number of rows, as scikit-learn's 1 / C.
        steps: how many steps of L-BFGS at most.

    Returns:
        The mean loss over the data that is left, without the penalty.

    Raises:
        ValueError: if there is no such head or no data, or inputs and labels do not fit.
    """
    found, features = _features(model, data, _find_head(model, head))
    return _fit(found, features, loss or _loss_for(features.labels), penalty / len(features.labels), steps)


def called_head(model: nn.Module, data: Iterable[Any], head: nn.Module | str | None = None) -> nn.Module:
    """Return the head that `warm_head` would fit; one that is not named is found with the first batch.

    Raises:
        ValueError: if there is none.
    """
    named = _find_head(model, head)
    return named or _features(model, islice(iter(data), 1), None)[0]


def _find_head(model: nn.Module, head: nn.Module | str | None) -> nn.Module | None:
    """Return a head that was named; None if it has to be found."""
    root: nn.Module = bare(model)
    if isinstance(head, str):
        modules: dict[str, nn.Module] = dict(root.named_modules())
        if head not in modules:
            raise ValueError(f"The model has no module `{printable(head)}`. Pass the head itself, or its name.")
        return modules[head]
    if head is not None and not any(module is head for module in root.modules()):
        raise ValueError(f"The head, a `{type(head).__name__}`, is no part of the model. Pass one of its modules.")
    return head


def _features(model: nn.Module, data: Iterable[Any], head: nn.Module | None) -> tuple[nn.Module, Features]:
    """Return a model's head, found if it was not named, and what comes into it for each label."""
    root = bare(model)
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    inputs, labels = [], []
    with gradients.isolated(model) as kept, torch.no_grad(), gradients.noted_calls(root, head) as calls:
        for batch in examples((readable(root, raw) for raw in data), None, device):
            calls.clear()
            kept.call(lambda m, b: m(*b.args, **b.kwargs), root, batch)
            if not calls:
                raise ValueError("The model calls no such head. Pass `head=`, the module whose outputs are the logits.")
            head, came = calls[-1]
            rows, wanted = _rows(came, batch.target)
            inputs.append(rows)
            labels.append(wanted)
    if head is None or not inputs:
        raise ValueError("The data have no batch. Pass a loader of the task's examples with their labels.")
    return head, Features(torch.cat(inputs), torch.cat(labels))


def _rows(inputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Return inputs of a head and labels, one row for each label that counts."""
    if not isinstance(target, Tensor):
        raise ValueError('There is a batch without labels. Yield pairs `(inputs, labels)` or mappings with "labels".')
    if target.dim() > 1 and inputs.shape[: target.dim()] == target.shape:  # one label for each token
        inputs, target = inputs.flatten(0, target.dim() - 1), target.flatten()
    if len(inputs) != len(target):
        raise ValueError(
            f"The head gets {len(inputs)} rows for {len(target)} labels. Pass `head=`, the module that gets one row for each."
        )
    counts = target != IGNORED if target.dim() == 1 and not target.is_floating_point() else slice(None)
    return inputs[counts], target[counts]


def _loss_for(labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss that labels suggest."""
    if not labels.is_floating_point():
        return F.cross_entropy
    return lambda output, y: F.mse_loss(output.reshape(y.shape), y.to(output.dtype))


def _fit(head: nn.Module, features: Features, loss: Callable[[Tensor, Tensor], Tensor], penalty: float, steps: int) -> float:
    """Minimise the penalised loss over a head's parameters; return the loss alone."""
    parameters = list(head.parameters())
    before = [(p, p.grad, p.requires_grad, p.detach().clone()) for p in parameters]
    try:
        for p in parameters:
            p.grad = None
            p.requires_grad_(True)
        left = _minimise(head, parameters, features, loss, penalty, steps)
    except BaseException:
        for p, *_, value in before:
            p.detach().copy_(value)
        raise
    finally:
        for p, grad, required, _ in before:
            p.requires_grad_(required)
            p.grad = grad
    return left


@torch.enable_grad()
def _minimise(
    head: nn.Module,
    parameters: list[nn.Parameter],
    features: Features,
    loss: Callable[[Tensor, Tensor], Tensor],
    penalty: float,
    steps: int,
) -> float:
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(head(features.inputs), features.labels)
        total = total + penalty / 2 * torch.stack([p.square().sum() for p in parameters if p.dim() > 1]).sum()
        total.backward()
        return total

    optimizer.step(closure)
    with torch.no_grad():
        left = float(loss(head(features.inputs), features.labels))
    if not left < float("inf"):
        raise FloatingPointError("The head's loss is not finite, so it was left as it was. Look at the size of its inputs.")
    return left
