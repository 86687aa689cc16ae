"""Batches of texts for models that tokenise them, and models that take one mapping of features, as sentence-transformers do."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from rwalk._parameters import bare
from rwalk.gradients.batches import read_batch, tensors

MAPPINGS = ("dict", "Dict", "Mapping")
"""What annotations of a mapping begin with, without their module."""


def readable(root: nn.Module, raw: Any) -> Any:
    """Return a batch as `examples` reads it: texts become what the model makes of them, a mapping its argument if it takes one.

    Args:
        root: the model; `preprocess` or else `tokenize` turns a list of texts into a mapping of tensors.
        raw: a batch: texts, a pair of texts and targets, or anything else, which stays as it is.

    Raises:
        TypeError: for texts that the model cannot tokenise, and for a single text.
    """
    if isinstance(raw, str):
        raise TypeError(
            "The data yield single texts, of type `str`. Let each batch be a list of texts; a list of one batch is `[texts]`."
        )
    if isinstance(raw, Mapping) and _takes_mapping(root, raw, certain=True):
        return (raw,), raw.get("labels")
    if _texts(raw):
        return (_features(root, raw),)
    if isinstance(raw, tuple | list) and len(raw) in (1, 2):
        if _texts(raw[0]):
            return (_features(root, raw[0]), *raw[1:])
        if isinstance(raw[0], Mapping) and _takes_mapping(root, raw[0], certain=True):
            return ((raw[0],), *raw[1:])
    return raw


def _texts(value: Any) -> bool:
    """Return whether a value is a list of texts, or of mappings without tensors, such as texts with a role."""
    if not isinstance(value, tuple | list) or not value:
        return False
    return all(isinstance(v, str) for v in value) or (
        all(isinstance(v, Mapping) for v in value) and next(tensors(value), None) is None
    )


def _features(root: nn.Module, texts: Any) -> Any:
    """Tokenise texts, and return the model's inputs."""
    tokenise: Callable[[Any], Any] | None = next(
        (found for name in ("preprocess", "tokenize") if callable(found := getattr(root, name, None))), None
    )
    if tokenise is None:
        raise TypeError(
            f"The data yield texts, and a `{type(root).__name__}` has no method `tokenize` or `preprocess` that takes them. "
            "Let the DataLoader's `collate_fn` tokenise them and return a mapping of the model's arguments."
        )
    features = tokenise(list(texts))
    return (dict(features),) if _takes_mapping(root, features, certain=False) else features


def _takes_mapping(root: nn.Module, features: Mapping[str, Any], certain: bool) -> bool:
    """Return whether a model takes features as one mapping, and not as keywords.

    Args:
        root: the model.
        features: the features.
        certain: whether its first argument has to say so by its name or annotation; else it is enough that the keywords do
            not fit.
    """
    try:
        arguments = [*signature(root.forward).parameters.values()]
    except (TypeError, ValueError):  # a forward that is no Python function
        return False
    names, first = {a.name for a in arguments}, arguments[0] if arguments else None
    if first is None or first.name in features or first.kind is Parameter.VAR_KEYWORD:
        return False
    if first.name == "features" or _written(first.annotation).startswith(MAPPINGS):
        return True
    anything = any(a.kind is Parameter.VAR_KEYWORD for a in arguments)
    return not certain and not anything and not features.keys() <= names


def _written(annotation: Any) -> str:
    """Write an annotation without modules in front."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None) or str(annotation)
    return text.partition("[")[0].rpartition(".")[2]


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on the inputs of a batch, of any kind that `per_example_over` takes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    read = read_batch(readable(bare(model), batch), device)
    return model(*read.args, **read.kwargs)
