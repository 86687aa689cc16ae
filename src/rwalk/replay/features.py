"""Outputs of a model on examples: the features before its last linear layer, that layer's weights, and the logits."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare


class Evaluated(NamedTuple):
    """Features, logits and last weight for all examples, in float64 on the CPU; see `Candidates`."""

    features: Tensor | None = None
    logits: Tensor | None = None
    weight: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module | None,
    inputs: Sequence[Tensor],
    features: Callable[[Tensor], Tensor] | None,
    logits: Callable[..., Tensor] | None,
) -> Evaluated:
    """Evaluate a model on batches of inputs; its mode, buffers and gradients stay as they are.

    Raises:
        ValueError: if the output for an example depends on others in its batch.
    """
    if model is None:
        found = Evaluated(_whole([features(x) for x in inputs] if features else [], inputs, "features"))
        if features:
            _compare(features, inputs, [])
        return found
    root = bare(model)
    phi, out = [], []
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    with gradients.isolated(model, features, logits) as kept, torch.no_grad(), gradients.noted_calls(root) as calls:

        def output(x: Tensor) -> Tensor:
            return gradients.read_output(kept.call(gradients.forward, root, (x,)), logits, x.to(device))

        for x in inputs:
            calls.clear()
            out.append(output(x))
            if features or calls:
                phi.append(features(x.to(device)) if features else calls[-1][1])
        last = calls[-1][0] if calls else None
        columns = _whole(phi, inputs, "features" if features else ""), _whole(out, inputs, "logits" if logits else "")
        found = Evaluated(*columns, None if last is None else last.weight.cpu().double())
        _compare(output, inputs, root.parameters())
        if features:
            _compare(lambda x: features(x.to(device)), inputs, root.parameters())
    return found


def _compare(run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
    """Refuse a function whose rows depend on other examples; the first batch of several examples shows it."""
    x = next((x for x in inputs if len(x) > 1), None)
    if x is not None:
        gradients.refuse_dependence(run, x, [*parameters, x])


def _whole(parts: list[Tensor], inputs: Sequence[Tensor], asked: str) -> Tensor | None:
    """Join batches of rows; None if they are no rows, except that a function of the user's, `asked`, is refused then."""
    strange = [part.shape for part, x in zip(parts, inputs, strict=False) if part.dim() != 2 or len(part) != len(x)]
    if strange and asked:
        came = f"`{asked}` returned shape {tuple(strange[0])} for a batch of inputs of shape {tuple(inputs[0].shape)}"
        raise ValueError(f"{came}; it has to return one row for each example.")
    return torch.cat(parts).cpu().double() if parts and not strange else None
