"""Checks that a model's examples lie along the first dimension, do not depend on one another, and that it has gradients."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from rwalk.gradients.batches import EXAMPLES_FIRST, ExampleBatch

COMPARED = 3
"""How many examples are run together."""


def compare_examples(
    run: Callable[[ExampleBatch], Any], read: Callable[[Any], Tensor | None], batch: ExampleBatch, exact: float
) -> tuple[ExampleBatch, Any, Any]:
    """Run a model on a few examples together and on one of them alone, and compare the outputs.

    Args:
        run: runs the model.
        read: finds the tensor to compare in an output, None if there is none.
        batch: the examples.
        exact: the relative precision of the model's arithmetic; outputs may differ by its square root.

    Returns:
        The examples that were run together, or a single one if the model takes no more, the model's output for them, and its
        output for the first example alone.

    Raises:
        ValueError: if the output for an example depends on the others.
    """
    size = min(COMPARED, batch.size)
    single = batch.cut(0, 1)
    alone = run(single)
    read(alone)
    if size == 1:
        return single, alone, alone
    few = batch.cut(0, size)
    try:
        together = run(few)
    except Exception:  # some models take one example at a time
        return single, alone, alone
    whole = read(together)
    for index in (0, 1) if size == 2 else (1,):  # with neighbours on both sides, one example is enough
        own = read(run(batch.cut(index, index + 1)))
        if own is None or whole is None or not (own.dim() or whole.dim()):
            continue
        rows = _rows(whole, own, size, index)
        if _differ(rows, own, whole, exact) and not _differ(cast(Tensor, read(run(few))), whole, whole, exact):
            raise ValueError(
                f"The model's output for an example depends on the other examples of the batch. {EXAMPLES_FIRST} Each example "
                "has to be independent of the others."
            )
    return few, together, alone


def _rows(whole: Tensor, own: Tensor, size: int, index: int) -> Tensor:
    """Return the rows of one example in the output for several; raise a ValueError if they cannot be told apart."""
    rows = own.shape[0] if own.dim() else 1
    if whole.dim() != max(own.dim(), 1) or whole.shape[0] != size * rows:
        raise ValueError(
            f"The model's output has shape {tuple(whole.shape)} for {size} examples, and shape {tuple(own.shape)} for one. "
            f"It needs the same number of rows for each example, in order. {EXAMPLES_FIRST}"
        )
    return whole[index * rows : (index + 1) * rows]


def _differ(a: Tensor, b: Tensor, scale: Tensor, exact: float) -> bool:
    """Return whether two tensors differ in their common part, wherever both are finite."""
    b = b.reshape(1) if not b.dim() else b
    common = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape, strict=True))
    a, b, scale = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a[common], b[common], scale))
    both = a.isfinite() & b.isfinite()
    largest = scale[scale.isfinite()].abs()
    limit = max(exact, 2.0**-23) ** 0.5 * (largest.max() if largest.numel() else 0)
    return bool(((a - b)[both].abs() > limit).any())


def refuse_dependence(run: Callable[[Tensor], Tensor], x: Tensor, tensors: Iterable[Tensor]) -> None:
    """Raise a ValueError if the result for an example of `x` depends on the others.

    Args:
        run: takes examples, and returns one row for each.
        x: the examples.
        tensors: what `run` computes with, which tells its precision.
    """
    batch = ExampleBatch((x,), {}, None, len(x), frozenset())
    compare_examples(lambda part: run(*part.args), lambda found: found, batch, precision(tensors))


def refuse_without_gradient(score: Tensor, parameters: Iterable[Tensor]) -> None:
    """Raise a ValueError if `torch.autograd.grad` finds no gradient of a score for any parameter."""
    waiting, known, ids = [score.grad_fn], set[Any](), {id(p) for p in parameters}
    reached = False
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "The model has a reentrant checkpoint, through which gradients reach the parameters in `backward()` only, and "
                "not in `torch.autograd.grad`. Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint`."
            )
        reached = reached or id(getattr(node, "variable", None)) in ids
        waiting += [following for following, _ in node.next_functions]
    if ids and not reached:
        raise ValueError(
            "The model has outputs or a loss without a graph that leads to the parameters, so they cannot be differentiated. "
            "Look for `torch.no_grad`, `detach` and NumPy in the model's `forward`, in `logits` and in `loss`."
        )


def precision(tensors: Iterable[Tensor]) -> float:
    """Return the relative precision of arithmetic with these tensors."""
    dtypes = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    coarse = {"highest": 0.0, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7)
    return max([coarse if torch.float32 in dtypes else 0.0, *(torch.finfo(dtype).eps for dtype in dtypes)])
