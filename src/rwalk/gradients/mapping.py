"""Functions of one example for all examples at once, with `vmap`; models may ask the values of their inputs for yes or no."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from rwalk.gradients.batches import ExampleBatch

UNMAPPED = (RuntimeError, NotImplementedError, ValueError, TypeError)
"""Errors of models that cannot be mapped over examples; a model's own errors may be among them."""

Result = TypeVar("Result")


class DividedExamplesError(Exception):
    """A model takes one way for some examples and another way for others.

    Args:
        rows: which examples take the same way as the first, of shape (examples,).
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__("the model takes different ways for different examples")
        self.rows = rows


def mapped(function: Callable[..., Any], size: int, in_dims: Any, *args: Any) -> Any:
    """Call a function for all of `size` examples at once with `vmap`; it gets a tensor that tells them apart, and one example.

    A condition such as `if mask.all():`, which `vmap` alone refuses, is answered if the answer is the same for all examples.

    Raises:
        DividedExamplesError: if it is not; see `in_agreement`.
    """

    def marked(mark: Tensor, *args: Any) -> Any:
        with _SharedConditions(mark):
            return function(mark, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # where an operator is looped over
        return vmap(marked, in_dims=(0, *in_dims), randomness="different")(torch.arange(size), *args)


def in_agreement(batch: ExampleBatch, use: Callable[[ExampleBatch], Result]) -> Iterator[Result]:
    """Call a function that maps a model over the examples of a batch, once for each group that takes the same way."""
    waiting = [batch]
    while waiting:
        group = waiting.pop()
        try:
            yield use(group)
        except DividedExamplesError as divided:
            waiting += [group.keep(~divided.rows), group.keep(divided.rows)]


def reaches(score: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return whether scores depend on parameters that were replaced: something else than the model holds them, too."""
    if not score.requires_grad:
        return False
    found = torch.autograd.grad(score.sum(), list(parameters), retain_graph=True, allow_unused=True)
    return any(g is not None for g in found)


class _SharedConditions(TorchFunctionMode):
    """Answers conditions on tensors for all examples of a `vmap`; `mark` is a tensor that it maps."""

    def __init__(self, mark: Tensor) -> None:
        super().__init__()
        self._mark = mark

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what asks for yes or no, and call everything else."""
        if func is not Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        condition = _Condition()
        _Values.apply(self._mark, args[0].detach(), condition)  # type: ignore[no-untyped-call]
        return condition.answer()


class _Condition:
    """The values of a condition for all examples, in the first dimension."""

    def __init__(self) -> None:
        self.values = torch.empty(0)

    def answer(self) -> bool:
        first = bool(self.values[0])  # raises an error for several values
        same = self.values.reshape(-1).bool() == first
        if not bool(same.all()):
            raise DividedExamplesError(same)
        return first


class OnlyMapped(torch.autograd.Function):
    """A function that is called under `vmap` alone, and that no gradient goes through."""

    @staticmethod
    def forward(*_: Any) -> NoReturn:
        """Never called, as there is always a `vmap`."""
        raise NotImplementedError

    @staticmethod
    def setup_context(*_: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        """Refuse gradients that the model itself takes."""
        raise NotImplementedError


class _Values(OnlyMapped):
    """Notes the values of a tensor under `vmap`, where those of all examples are known."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, mark: Tensor, x: Tensor, condition: _Condition) -> tuple[Tensor, int]:  # noqa: ARG004
        """Note the values."""
        if in_dims[0] is None:
            raise RuntimeError("the model asks for a condition under a `vmap` of its own")
        x = x.expand(info.batch_size, *x.shape) if in_dims[1] is None else x.movedim(in_dims[1], 0)
        condition.values = x
        return x, 0
