"""Whether a model's examples lie along the first dimension and do not depend on one another."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from rwalk._errors import explain
from rwalk.gradients.batches import EXAMPLES_FIRST, Batch

FEW = 3
"""How many examples are looked at."""


def looked_at(
    run: Callable[[Batch], Any], read: Callable[[Any], Tensor | None], batch: Batch, exact: float
) -> tuple[Batch, Any, Any]:
    """Run a model on a few examples together and on one of them alone, and compare.

    Args:
        run: runs the model.
        read: finds the tensor to compare in an output, None if there is none.
        batch: the examples.
        exact: the relative precision of the model's arithmetic; its square root is what outputs may differ by.

    Returns:
        The examples that were run together, or one of them where the model takes no more, the model's output for them, and that
        for the first example alone.

    Raises:
        ValueError: if the output for an example depends on the others.
    """
    size = min(FEW, batch.size)
    single = batch.cut(0, 1)
    alone = run(single)
    read(alone)
    if size == 1:
        return single, alone, alone
    few = batch.cut(0, size)
    try:
        together = run(few)
    except Exception:  # a model that takes one example at a time
        return single, alone, alone
    whole = read(together)
    for place in (0, 1) if size == 2 else (1,):  # with neighbours on both sides, one example is enough
        mine = read(run(batch.cut(place, place + 1)))
        if mine is None or whole is None or not (mine.dim() or whole.dim()):
            continue
        part = _part(whole, mine, size, place)
        if _differ(part, mine, whole, exact) and not _differ(cast(Tensor, read(run(few))), whole, whole, exact):
            came = "a model whose output for an example depends on the other examples of the batch"
            raise ValueError(explain(came, "examples along the first dimension, each by itself", EXAMPLES_FIRST))
    return few, together, alone


def _part(whole: Tensor, mine: Tensor, size: int, place: int) -> Tensor:
    """Return the rows of one example among those of several, or raise a ValueError if they cannot be told apart."""
    rows = mine.shape[0] if mine.dim() else 1
    if whole.dim() != max(mine.dim(), 1) or whole.shape[0] != size * rows:
        came = f"outputs of shape {tuple(whole.shape)} for {size} examples, and of shape {tuple(mine.shape)} for one"
        raise ValueError(explain(came, "one row for each example, or the same number of them, in order", EXAMPLES_FIRST))
    return whole[place * rows : (place + 1) * rows]


def _differ(a: Tensor, b: Tensor, scale: Tensor, exact: float) -> bool:
    """Tell whether two tensors differ where both are finite, and where both have places."""
    b = b.reshape(1) if not b.dim() else b
    common = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape, strict=True))
    a, b, scale = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a[common], b[common], scale))
    both = a.isfinite() & b.isfinite()
    largest = scale[scale.isfinite()].abs()
    limit = max(exact, 2.0**-23) ** 0.5 * (largest.max() if largest.numel() else 0)
    return bool(((a - b)[both].abs() > limit).any())


def refuse_constant(score: Tensor, parameters: Iterable[Tensor]) -> None:
    """Raise a ValueError if no gradient of a score comes to any parameter by `torch.autograd.grad`."""
    left, known, ids = [score.grad_fn], set[Any](), {id(p) for p in parameters}
    reached = False
    while left:
        node = left.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if node.name() == "CheckpointFunctionBackward":
            came = "a model with a reentrant checkpoint, through which gradients reach parameters in `backward()` alone"
            remedy = "Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint`."
            raise ValueError(explain(came, "a model that `torch.autograd.grad` can go through", remedy))
        reached = reached or id(getattr(node, "variable", None)) in ids
        left += [following for following, _ in node.next_functions]
    if ids and not reached:
        came = "outputs or a loss without a graph that leads to the parameters"
        remedy = "Look for `torch.no_grad`, `detach` and NumPy in the model's `forward`, in `logits` and in `loss`."
        raise ValueError(explain(came, "outputs and a loss that can be differentiated", remedy))


def refuse_dependence(run: Callable[[Tensor], Tensor], x: Tensor, tensors: Iterable[Tensor]) -> None:
    """Raise a ValueError if what comes for an example of a tensor depends on the others; `tensors` are calculated with."""
    looked_at(
        lambda batch: run(*batch.args), lambda found: found, Batch((x,), {}, None, len(x), frozenset()), precision(tensors)
    )


def precision(tensors: Iterable[Tensor]) -> float:
    """Return the relative precision of arithmetic with these tensors."""
    dtypes = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    coarse = {"highest": 0.0, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7)
    return max([coarse if torch.float32 in dtypes else 0.0, *(torch.finfo(dtype).eps for dtype in dtypes)])
