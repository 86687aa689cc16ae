"""What a model says about examples: the features before its last linear layer, that layer's weights, and its output."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._errors import explain
from rwalk.parameters import bare


class Look(NamedTuple):
    """Of all examples, in float64 on the CPU; see `Candidates`."""

    features: Tensor | None = None
    logits: Tensor | None = None
    weight: Tensor | None = None


@torch.no_grad()
def look(
    model: nn.Module | None,
    inputs: Sequence[Tensor],
    features: Callable[[Tensor], Tensor] | None,
    logits: Callable[[Any], Tensor] | None,
) -> Look:
    """Go through batches of inputs in evaluation mode; the model is left as it was.

    Raises:
        ValueError: if what comes out for an example depends on the others of its batch.
    """
    if model is None:
        found = Look(_whole([features(x) for x in inputs] if features else [], inputs, "features"))
        if features:
            _compare(features, inputs, [])
        return found
    root = bare(model)
    phi, out = [], []
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    with gradients.undisturbed(model, features, logits) as kept, torch.no_grad(), _last_linear(root) as last:

        def output(x: Tensor) -> Tensor:
            return gradients.read_output(kept.call(gradients.forward, root, (x,)), logits)

        for x in inputs:
            out.append(output(x))
            if features or last:
                phi.append(features(x.to(device)) if features else last[1])
        columns = _whole(phi, inputs, "features" if features else ""), _whole(out, inputs, "logits" if logits else "")
        found = Look(*columns, last[0].weight.cpu().double() if last else None)
        _compare(output, inputs, root.parameters())
        if features:
            _compare(lambda x: features(x.to(device)), inputs, root.parameters())
    return found


def _compare(run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
    """Refuse what reads a row of an example from the others, too, on the first batch of several."""
    x = next((x for x in inputs if len(x) > 1), None)
    if x is not None:
        gradients.refuse_dependence(run, x, [*parameters, x])


@contextmanager
def _last_linear(root: nn.Module) -> Iterator[list[Any]]:
    """Give a list that holds the linear layer that was called last, and its input."""
    last: list[Any] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        last[:] = layer, args[0]

    handles = [layer.register_forward_hook(hook) for layer in root.modules() if isinstance(layer, nn.Linear)]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


def _whole(parts: list[Tensor], inputs: Sequence[Tensor], asked: str) -> Tensor | None:
    """Put batches of rows together; None if they are no rows, unless a function of the user's has returned them."""
    strange = [part.shape for part, x in zip(parts, inputs, strict=False) if part.dim() != 2 or len(part) != len(x)]
    if strange and asked:
        came = f"shape {tuple(strange[0])} from `{asked}` for a batch of inputs of shape {tuple(inputs[0].shape)}"
        raise ValueError(explain(came, "one row for each example", "Let the function return such a tensor."))
    return torch.cat(parts).cpu().double() if parts and not strange else None
