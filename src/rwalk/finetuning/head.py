"""A new head is fitted first, on the features as they are, so that a random one does not spoil the network below it.

Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution" (LP-FT), arXiv 2202.10054.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._errors import printable
from rwalk._parameters import bare
from rwalk.consolidation.task_end import refuse_data
from rwalk.finetuning.head_checks import (
    FirstBatch,
    Loss,
    models_loss,
    refuse_labels,
    refuse_shared,
    rows_and_labels,
    suggested,
    used_parameters,
)
from rwalk.gradients.batches import ExampleBatch, examples
from rwalk.gradients.isolation import differentiable
from rwalk.gradients.likelihood import IGNORED
from rwalk.gradients.texts import readable

NO_BATCH = "The data have no batch. Pass a loader of the task's examples with their labels."


class Call(NamedTuple):
    """A call of a model.

    Args:
        head: the module that was called within it: the one that was named, or the last linear layer.
        inputs: what that got.
        batch: what the model got.
        output: what it returned.
    """

    head: nn.Module
    inputs: Tensor
    batch: ExampleBatch
    output: Any


class Features(NamedTuple):
    """What a head is fitted on.

    Args:
        head: the head.
        inputs: what came into it, one row for each label.
        labels: what should come out of it.
        loss: the loss that the model computes itself; None if it computes none.
    """

    head: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: Loss | None


def warm_head(
    model: nn.Module,
    data: Iterable[Any],
    head: nn.Module | str | None = None,
    *,
    loss: Loss | None = None,
    penalty: float = 1.0,
    steps: int = 100,
) -> float:
    """Fit a model's head on its features as they are, before the rest is trained: `warm_head(model, loader)`.

    One pass over the data without gradients, then L-BFGS on the head alone, in eval mode. All other weights, modes, buffers
    and gradients stay as they are. The features of all data are held in memory meanwhile.

    Args:
        model: the network.
        data: batches `(inputs, labels)`, or mappings with "labels".
        head: the head, as a module or by name; the linear layer that is called last if None. What comes out of it must be the
            logits, or the predictions.
        loss: of outputs and labels, a mean. If None, cross-entropy for whole numbers; for floats the binary one if they have
            two dimensions and are all 0 or 1, several labels for each example, and else squared error. A model that computes a
            loss of its own must compute the same.
        penalty: weight of half the squared norm of the head's weights over the number of rows, as scikit-learn's 1 / C.
        steps: how many steps of L-BFGS at most.

    Returns:
        The mean loss over the data that is left, without the penalty.

    Raises:
        ValueError: if there is no such head or no data, if inputs and labels do not fit, if a head that was not passed does
            not give what the model returns, or the head shares weights with other modules.
    """
    refuse_data(data)
    named = _find_head(model, head)
    with gradients.isolated(model) as kept, gradients.noted_calls(bare(model), named) as calls:
        features = _features(model, _calls(kept, bare(model), data, named, calls), named is None, loss)
        if loss is None:
            with torch.no_grad():
                refuse_labels(features.inputs, features.head(features.inputs), features.labels)
        return _fit(features, loss or features.loss or suggested(features.labels), penalty / len(features.labels), steps)


def called_head(model: nn.Module, data: Iterable[Any], head: nn.Module | str | None = None) -> nn.Module:
    """Return the head that `warm_head` would fit; one that is not named is found with the first batch.

    Raises:
        ValueError: if there is none.
    """
    named, root = _find_head(model, head), bare(model)
    if named is not None:
        return named
    with gradients.isolated(model) as kept, gradients.noted_calls(root) as calls:
        for call in _calls(kept, root, data, None, calls):
            return call.head
    raise ValueError(NO_BATCH)


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


@torch.no_grad()
def _calls(kept: gradients.ModelSnapshot, root: nn.Module, data: Any, head: nn.Module | None, calls: Any) -> Iterator[Call]:
    """Yield what each batch of labelled data makes of a model; `calls` receives the calls of its layers."""
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    for batch in examples((readable(root, raw) for raw in data), None, device):
        calls.clear()
        output = kept.call(lambda m, b: m(*b.args, **b.kwargs), root, batch)
        found = [(module, inputs) for module, inputs in calls if head is None or module is head]
        if not found:
            raise ValueError("The model calls no such head. Pass `head=`, the module whose outputs are the logits.")
        head, came = found[-1]
        yield Call(head, came, batch, output)


def _features(model: nn.Module, calls: Iterator[Call], check: bool, loss: Loss | None) -> Features:
    """Return a model's head, and what comes into it for each label; `check` that a head which was found is its last part."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    root, own, call = bare(model), None, None
    for call in calls:
        rows, wanted = rows_and_labels(call.inputs, call.batch.target)
        if not inputs and len(wanted):
            batch = FirstBatch(rows, wanted, call.batch.target, call.output, call.batch.target_in_inputs)
            own = _checked(root, call.head, batch, check, loss)
        if len(wanted):
            inputs.append(rows)
            labels.append(wanted)
    if call is None:
        raise ValueError(NO_BATCH)
    if not inputs:
        raise ValueError(f"All labels are {IGNORED}, which count for nothing. Pass data with labels that count.")
    return Features(call.head, torch.cat(inputs), torch.cat(labels), own)


@torch.no_grad()
def _checked(root: nn.Module, head: nn.Module, batch: FirstBatch, found: bool, loss: Loss | None) -> Loss | None:
    """Return the loss that a model computes itself of its head's outputs, if any; raise a ValueError for what is no head."""
    made = head(batch.inputs)
    if loss is None:
        refuse_labels(batch.inputs, made, batch.labels)
    with differentiable(head.parameters()):
        refuse_shared(root, head, used_parameters(head, batch.inputs))
    name = next(name for name, module in root.named_modules() if module is head) if found else None
    return models_loss(made, batch, name, loss)


def _fit(features: Features, loss: Loss, penalty: float, steps: int) -> float:
    """Minimise the penalised loss over a head's parameters; return the loss alone."""
    head = features.head
    with differentiable(head.parameters()):
        parameters = used_parameters(head, features.inputs)
        before = [p.detach().clone() for p in parameters]
        try:
            return _minimise(features, parameters, loss, penalty, steps)
        except BaseException:
            for p, value in zip(parameters, before, strict=True):
                p.detach().copy_(value)
            raise


def _minimise(features: Features, parameters: list[nn.Parameter], loss: Loss, penalty: float, steps: int) -> float:
    head = features.head
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(head(features.inputs), features.labels)
        total = total + penalty / 2 * sum(p.square().sum() for p in parameters if p.dim() > 1)
        total.backward()
        return total

    optimizer.step(closure)
    with torch.no_grad():
        left = float(loss(head(features.inputs), features.labels))
    if not left < float("inf"):
        raise FloatingPointError("The head's loss is not finite, so it was left as it was. Look at the size of its inputs.")
    return left
