"""What a model's outputs mean: where the logits are, and which distribution of targets they describe."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from rwalk.gradients.batches import tensors
from rwalk.gradients.likelihood import IGNORED, REMEDY, Likelihood, counted, described, is_whole

RESHAPING = frozenset(
    f"{name}Backward{variant}"
    for variant in range(3)
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Transpose", "Permute", "T"),
        *("Squeeze", "Unsqueeze", "Select", "Slice", "Split", "Unbind"),
    )
)
"""Operations that change no value, by their names in autograd."""

READ = ("logits", "sentence_embedding")
"""What is read from an output of several parts: the first of these that it has."""


def read_output(output: Any, logits: Callable[..., Tensor] | None, inputs: Any = None) -> Tensor:
    """Find the logits in a model's output, or another tensor that is asked for.

    Args:
        output: the output.
        logits: reads them, from the output alone or, if it has two arguments, from the output and the inputs.
        inputs: what the model was given.

    Raises:
        TypeError: if there are none.
    """
    if logits is not None:
        output = logits(output, inputs) if _takes_inputs(logits) else logits(output)
    elif not isinstance(output, Tensor):
        output = next((found for name in READ if (found := entry(output, name)) is not None), output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The model's output is a `{type(output).__name__}`, and not a tensor or an object or mapping with `logits`. "
            "Pass `logits=`, a function that reads the logits from the output."
        )
    return output


def entry(output: Any, name: str) -> Any:
    """Return the part of a model's output that has a name, in a mapping or an object; None if there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _takes_inputs(logits: Callable[..., Tensor]) -> bool:
    """Return whether a function has two arguments that have to be passed by place; one without a signature has one."""
    try:
        arguments = signature(logits.forward if isinstance(logits, nn.Module) else logits).parameters.values()
    except (TypeError, ValueError):
        return False
    places = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) and a.default is a.empty]
    return len(places) > 1


def attention_mask(inputs: Any) -> Tensor | None:
    """Return which tokens of a batch are no padding, None where it does not tell."""
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return found if isinstance(found, Tensor) else None


def without_padding(z: Tensor, inputs: Any) -> Tensor:
    """Return an output for each token with 0, which has no gradient, at the places of padding, which `attention_mask` names."""
    mask = attention_mask(inputs)
    if mask is None or z.dim() != 3 or mask.shape != z.shape[:2] or "decoder_input_ids" in inputs:
        return z
    return torch.where(mask.bool().unsqueeze(2), z, 0)


def given_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a model's arguments as a batch holds them: a mapping of keywords, a tuple, or the only one."""
    return kwargs or (args[0] if len(args) == 1 else args)


def own_loss(output: Any) -> Tensor | None:
    """Return the loss that a model has computed itself, if its output has one."""
    if isinstance(output, Tensor):
        return None
    found = entry(output, "loss")
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def find_likelihood(
    z: Tensor, size: int, target: Any, every: Any, own: Tensor | None, given: Likelihood | None, inputs: Any = ()
) -> Likelihood:
    """Find out which distribution the outputs of a model describe.

    Args:
        z: logits of a few examples, the rows of each in turn along the first dimension.
        size: how many examples these are.
        target: their targets.
        every: the targets of these and more examples.
        own: the loss that the model has computed itself for these few examples.
        given: the distribution that the user has named.
        inputs: the model's inputs for these few examples; the shape of tokens is that of the rows.

    Raises:
        ValueError: if outputs and targets can be read in no way, or in several.
    """
    if not z.is_floating_point():
        raise ValueError(f"The logits are of type {z.dtype}, and not floating-point numbers. Pass `logits=`.")
    if given is not None:
        found = _as_classes(z, size, every, given, inputs) if given.family == "categorical" else [given]
    else:
        found = _as_single_outputs(z, size, every) or _as_classes(z, size, every, Likelihood("categorical"), inputs)
    if own is None or len(found) == 1:
        return found[0]
    fitting = _with_loss(found, z, size, target, own)
    if len(fitting) == 1 or found[0].family != "categorical":
        return fitting[0] if len(fitting) == 1 else found[0]
    raise ValueError(
        f"The model's own loss of {own.item():.4g} is not the mean cross-entropy of its logits at the labels, or at the labels "
        "after them: it is a loss whose labels cannot be found out. Pass pairs of inputs and labels, which then count at the "
        'logits of their own place, or `loss=lambda output, target: output.loss` with `labels="true"`.'
    )


def _with_loss(found: list[Likelihood], z: Tensor, size: int, target: Tensor, own: Tensor) -> list[Likelihood]:
    """Return the distributions under which the model's own loss is what it is."""
    value = own.item()
    limit = max(1e-4, 4 * torch.finfo(z.dtype).eps) * max(1.0, abs(value))
    fitting = [one for one in found if abs(_mean_loss(one, z.detach(), size, target).item() - value) <= limit]
    return _with_gradient_of(fitting, z, size, target, own) if len(fitting) > 1 else fitting


def _as_single_outputs(z: Tensor, size: int, target: Any) -> list[Likelihood]:
    """Return the possible distributions of outputs with one logit a row; none if there are several logits a row."""
    one = z.dim() < 2 or 1 in (z.shape[-1], z.shape[1] if z.dim() > 3 else 0)
    matched = isinstance(target, Tensor) and len(target) and target[0].numel() * size == z.numel()
    if not one or (z.dim() > 2 and isinstance(target, Tensor) and not matched) or (z.dim() < 2 and z.numel() != size):
        return []
    if not isinstance(target, Tensor) or target.is_complex():
        raise ValueError(
            f"The model has one logit for each row, of shape {tuple(z.shape)}, and no targets to show what it means: 0 and 1 "
            f"for a probability, or numbers for a regression. {REMEDY}"
        )
    Likelihood("gaussian").refuse_shape(target[:size], size, z.numel() // size)
    values = target[target.long() != IGNORED] if is_whole(target) else target
    binary = bool(((values == 0) | (values == 1)).all())
    return [Likelihood("bernoulli"), Likelihood("gaussian")] if binary else [Likelihood("gaussian")]


def _as_classes(z: Tensor, size: int, target: Any, like: Likelihood, inputs: Any) -> list[Likelihood]:
    """Return the possible distributions of class logits: where the classes are, and which target a row predicts."""
    _refuse_as_classes(z, target, like.named)
    if z.dim() == 2 and not z.shape[0] % size and isinstance(target, Tensor):
        replace(like, classes=z.shape[1]).refuse_shape(target[:size], size, z.shape[0] // size)
    dims = _class_dims(z, size, target, like.named) if is_whole(target) else _free_dims(z, size, like.named, inputs)
    if len(dims) != 1:
        where = "in the second dimension as well as in the last" if dims else "in neither the second nor the last dimension"
        raise ValueError(
            f"With logits of shape {tuple(z.shape)} and {described(target)} for {counted(size, 'example')}, classes with an "
            f"index for each row fit {where}. Pass `logits=`, which returns a row of class logits for each target: "
            "`lambda o: o.flatten(0, 1)` if classes come last, `lambda o: o.movedim(1, -1).flatten(0, -2)` if they are in the "
            "second dimension."
        )
    plain = replace(like, dim=dims[0], classes=z.shape[dims[0]])
    several = z.numel() // size > plain.classes and is_whole(target) and dims[0] == -1
    return [plain, replace(plain, shifted=True)] if several else [plain]


def _refuse_as_classes(z: Tensor, target: Any, named: bool) -> None:
    """Raise a ValueError for logits and targets that are not those of a classification."""
    if isinstance(target, Tensor) and not is_whole(target) and not named:
        raise ValueError(
            f"There are targets of type {target.dtype} for outputs of shape {tuple(z.shape)}, and not one class index for each "
            f"row of logits. {REMEDY}"
        )
    if named and (z.dim() < 2 or (z.dim() == 2 and z.shape[1] == 1)):
        raise ValueError(
            f"Cross-entropy takes two classes or more in the second dimension, and the logits have shape {tuple(z.shape)}. "
            "For one logit pass `loss=torch.nn.functional.binary_cross_entropy_with_logits`."
        )


def _free_dims(z: Tensor, size: int, named: bool, inputs: Any) -> list[int]:
    """Return in which dimensions the classes may be if there are no targets: with tokens, the one that tokens do not have."""
    if z.dim() < 2 or z.shape[0] % size or z.dim() > 3 or (z.dim() == 3 and named):
        return []
    if z.dim() == 2:
        return [-1]
    dims = [d for d in (-1, 1) if z.shape[d] > 1]
    tokens = {t.shape for t in tensors(inputs) if is_whole(t)}
    return [d for d in dims if z.movedim(d, -1).shape[:-1] in tokens] or dims


def _class_dims(z: Tensor, size: int, target: Tensor, named: bool) -> list[int]:
    """Return in which dimensions of logits the classes may be; for a named loss the second if possible."""
    if z.dim() < 2 or z.shape[0] % size:
        return []
    if z.dim() == 2:
        return [-1]
    each, dims = target.shape[1:], [d for d in (-1, 1) if z.shape[d] > 1]
    alike = [d for d in dims if z.movedim(d, -1).shape[1:-1] == each]
    found = alike or [d for d in dims if math.prod(each) * size * z.shape[d] == z.numel()]
    return [1] if named and 1 in found else found


def refuse_probabilities(likelihood: Likelihood, z: Tensor) -> None:
    """Raise a ValueError for outputs that are probabilities already, and would be taken for logits."""
    if likelihood.family == "categorical":
        rows = z.detach().movedim(likelihood.dim, -1)
        found = bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 1e-3).all())
        why, last, inverse = "they add up to 1 in each row", "softmax", "log"
    else:
        found = likelihood.family == "bernoulli" and _made_by(z).startswith(("Sigmoid", "Hardsigmoid", "Softmax"))
        why, last, inverse = "a sigmoid or a softmax makes them", "sigmoid", "logit"
    if found:
        raise ValueError(
            f"The model has outputs that are probabilities, as {why}, and not logits, which come before the {last}. "
            f"Pass `logits=lambda output: output.{inverse}()`, or `logits=lambda output: output` if they are logits anyway."
        )


def _made_by(z: Tensor) -> str:
    """Return the name of the operation that has computed a tensor's values, before changes of its shape or type."""
    node = z.grad_fn
    while node is not None and node.name() in RESHAPING and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def _with_gradient_of(found: list[Likelihood], z: Tensor, size: int, target: Tensor, own: Tensor) -> list[Likelihood]:
    """Return the distribution whose loss has the gradient of the model's own loss; all if that one has none.

    Under a head of zeros, for example, all labels have the same loss, and the gradient tells which labels are used.
    """
    if not (own.requires_grad and z.requires_grad):
        return found
    gradient = torch.autograd.grad(own, z, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return found

    def distance(likelihood: Likelihood) -> float:
        leaf = z.detach().requires_grad_()
        return float((torch.autograd.grad(_mean_loss(likelihood, leaf, size, target), leaf)[0] - gradient).abs().max())

    return [min(found, key=distance)]


def _mean_loss(likelihood: Likelihood, z: Tensor, size: int, target: Tensor) -> Tensor:
    """Return the loss that models of Hugging Face compute: a mean over rows."""
    score, _ = likelihood.scores("true", z.float(), target, size)
    y = target.reshape(size, -1)[:, int(likelihood.shifted) :]
    may_ignore = likelihood.family != "gaussian" and is_whole(y)
    count = int((y.long() != likelihood.ignored).sum()) if may_ignore else y.numel()
    return -score.sum() * (2 if likelihood.family == "gaussian" else 1) / (count or math.nan)
