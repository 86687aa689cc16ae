"""Parameters that are worked on row by row, with nothing laid out: what every backend leaves to plain PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rwalk.kernels import reference
from rwalk.kernels.foreach import differ
from rwalk.kernels.passes import AfterRow, AfterStep, BeforeRow, BeforeStep, Part, StepGradients

FETCH = 2**26
"""Bytes that are brought to a device at a time."""
BEFORE = ("previous", "fisher", "point", "omega")
AFTER = ("point", "omega", "average", "previous", "path", "last", "fisher", "mark", "score")
"""The columns that the pass before a step works on, and those of the pass after it."""


def prepare(
    theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]
) -> tuple[list[Part], list[int]]:
    """Lay out all parameters, for the slow truth: see `passes.Prepare`."""
    return [RowByRow(theta, columns, places, iter)], []


class RowByRow:
    """Parameters of any device, layout and precision.

    Args:
        theta: all parameters.
        columns: what belongs to each, by name.
        places: which of them these are.
        pieces: cuts rows into pieces, or joins them.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        columns: dict[str, list[Tensor | None]],
        places: list[int],
        pieces: Callable[[Iterable[Any]], Iterable[Any]],
    ) -> None:
        self.places, self._theta, self._columns, self._pieces = places, theta, columns, pieces

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each of the places a number that is 0 unless an element of its gradient, or its square, is not finite."""
        return nonfinite([grad[i] for i in self.places])

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        if step.skip is not None and bool(step.skip):
            return self.moved() if step.compare else []
        if step.compare:
            return [i for i in self.places if self._compared(self._before(i, step), step)]
        for batch in fetched([self._before(i, step) for i in self.places if step.grad[i] is not None]):
            for piece in self._pieces(batch):
                reference.before_row_(piece, step.scale)
        return []

    def _compared(self, row: BeforeRow, step: BeforeStep) -> bool:
        """Update one row; return whether something has moved it."""
        found = [reference.before_row_(piece, step.scale) for batch in fetched([row]) for piece in self._pieces(batch)]
        return True in found

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""
        places = [i for i in self.places if step.moved[i]]
        if not places or (step.skip is not None and bool(step.skip)):
            return
        step = step if step.metric is None else step._replace(metric=step.metric.counted())
        for batch in fetched([self._after(i, step) for i in places]):
            for piece in self._pieces(batch):
                beyond_eps = reference.after_row_(piece, step.close, step.scale)
                if beyond_eps is not None and step.beyond_eps is not None:
                    step.beyond_eps.add_(beyond_eps.to(step.beyond_eps.device))

    def moved(self) -> list[int]:
        """List the places of parameters that are not where the last step left them; this waits for a device."""
        pairs = [(i, self._theta[i], last) for i in self.places if (last := self._columns["last"][i]) is not None]
        return [i for i, theta, last in pairs if differ(theta, last)]

    def _held(self, i: int, names: Sequence[str]) -> dict[str, Any]:
        return {name: self._columns[name][i] for name in names if name in self._columns}

    def _before(self, i: int, step: BeforeStep) -> BeforeRow:
        weight = step.weight[i] if step.weight is not None else 0.0
        squares = step.squares[i] if step.squares is not None else None
        held = self._held(i, (*BEFORE, "last") if step.compare else BEFORE)
        return BeforeRow(self._theta[i], step.grad[i], **held, squares=squares, weight=weight, strength=step.strength)

    def _after(self, i: int, step: AfterStep) -> AfterRow:
        numbers: dict[str, Any] = {"eps": step.eps}
        if step.metric is not None:
            m = step.metric
            numbers |= {"second": m.second[i], "step": m.step[i], "adam_eps": m.eps[i], "correction": m.correction[i]}
        if step.share is not None:
            numbers["share"] = step.share[i]
        if step.weight is not None:
            numbers["weight"] = step.weight[i]
        if step.squares is not None:
            numbers["squares"] = step.squares[i]
        return AfterRow(self._theta[i], **self._held(i, AFTER), **numbers)


def nonfinite(grads: Sequence[Tensor | None]) -> Tensor:
    """Return for each gradient a number that is 0 unless an element of it, or its square, is not finite."""
    norms = norms_of([g for g in grads if g is not None])
    if not norms:
        return torch.zeros(len(grads), device="cpu")
    device = next((n.device for n in norms if n.device.type != "cpu"), norms[0].device)
    norms = [n if n.device == device else n.to(device) for n in norms]
    if len(norms) < len(grads):
        left, nothing = iter(norms), torch.zeros((), device=device)
        norms = [nothing if g is None else next(left) for g in grads]
    stacked = torch.stack(norms)
    return stacked - stacked


def norms_of(grads: list[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient: infinite or no number if an element or its square is. One pass, nothing kept.

    A sum of squares may overflow where no single one does, from elements of 1e18 on; such a gradient is refused too.
    """
    if any(g.dtype is torch.float16 for g in grads):  # norms may exceed its range
        return [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    return list(torch._foreach_norm(grads)) if grads else []


def fetched(rows: Iterable[Any], limit: int = FETCH) -> Iterator[list[Any]]:
    """Yield rows with the anchor beside the parameter; if it lies elsewhere, it comes over a few rows at a time.

    From pinned memory the copies are queued and nothing waits for them; what they bring is freed before the next ones come.
    """
    batch: list[Any] = []
    brought = 0
    for row in rows:
        if row.omega is None or row.omega.device == row.theta.device:
            batch.append(row)
            continue
        size = row.omega.nbytes + row.point.nbytes
        if batch and brought + size > limit:
            yield batch
            batch, brought = [], 0
        point, omega = (t.to(row.theta.device, non_blocking=True) for t in (row.point, row.omega))
        batch.append(row._replace(point=point, omega=omega))
        brought += size
    if batch:
        yield batch
