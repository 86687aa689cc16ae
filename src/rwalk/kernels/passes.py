"""What is done to each protected parameter at an optimiser step: one pass over its memory before the step, and one after.

The pass before the step is a table: its columns are lists that run parallel to the parameters, or None for a column that is not
needed. Single entries may be None too; then that part of the work is left out for that parameter. `reference` has the formulas.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Column = Sequence[Tensor | None] | None


class PreStepRow(NamedTuple):
    """The tensors of one parameter in a `PreStepPass`, all of one shape, and its numbers."""

    theta: Tensor
    grad: Tensor | None = None
    path: Tensor | None = None
    mark: Tensor | None = None
    previous: Tensor | None = None
    score: Tensor | None = None
    fisher: Tensor | None = None
    squares: Tensor | None = None
    point: Tensor | None = None
    omega: Tensor | None = None
    weight: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether columns that work together are all there or all missing; fused backends leave other rows to the next one."""
        path = (self.path is None) == (self.mark is None)
        previous = (self.path is None) == (self.previous is None)
        score = self.score is None or self.fisher is not None
        return path and previous and score and (self.point is None) == (self.omega is None)


class PreStepPass(NamedTuple):
    """Before the optimiser moves: end a stretch of the path, extend the path, update the Fisher information, add the pull.

    Args:
        theta: the parameters.
        grad: their gradients, multiplied by `scale`; None at a task's end or where a parameter takes no part in the step.
        path: the path integral of the current stretch.
        mark: the parameters at its start.
        previous: the gradient of the step before, 0 at its start.
        score: where the path of a finished stretch goes as a score; without it the path stays and only its mark moves on.
        fisher: running Fisher information.
        squares: what to average in `fisher`, multiplied by the square of `scale`; None for the square of `grad`.
        point: where the pull leads.
        omega: how strongly, in state precision or lower.
        weight: the new square's share in `fisher`, one number for each parameter.
        close: whether a stretch ends here, before anything else is done.
        eps: damping in the score's denominator.
        strength: factor of the penalty.
        scale: what a loss scaler has multiplied the gradients by: one element, on their device; None for 1.
        skip: one element, not 0 if the optimiser is going to leave out this step, and so shall the pass; None for 0.
        ascends: for each parameter, whether the optimiser goes up along `grad`; None for down everywhere.
    """

    theta: Sequence[Tensor]
    grad: Column = None
    path: Column = None
    mark: Column = None
    previous: Column = None
    score: Column = None
    fisher: Column = None
    squares: Column = None
    point: Column = None
    omega: Column = None
    weight: Sequence[float] | None = None
    close: bool = False
    eps: float = 0.0
    strength: float = 0.0
    scale: Tensor | None = None
    skip: Tensor | None = None
    ascends: Sequence[bool] | None = None

    @property
    def left_out(self) -> bool:
        """Whether `skip` is set, for backends that ask on the host; where it lies on a GPU, this waits for it."""
        return self.skip is not None and bool(self.skip)

    def rows(self) -> list[PreStepRow]:
        """List the parameters for which there is something to do."""
        missing = [None] * len(self.theta)
        found = [getattr(self, name) for name in PreStepRow._fields]
        columns = [missing if column is None else column for column in found[:-1]]
        weights = [0.0] * len(self.theta) if self.weight is None else self.weight
        rows = [PreStepRow._make(values) for values in zip(*columns, weights, strict=True)]
        return rows if self.close else [row for row in rows if row.grad is not None]

    def directions(self) -> Iterator[tuple["PreStepPass", list[PreStepRow]]]:
        """Yield a pass for the rows that are minimised, and one, with -1 as a loss scale, for those that are maximised."""
        if self.ascends is None:
            yield self, self.rows()
            return
        for up in (False, True):
            mine = [i for i, way in enumerate(self.ascends) if way == up]
            pick: dict[str, Any] = {
                key: [c[i] for i in mine] for key, c in self._asdict().items() if isinstance(c, Sequence) and key != "ascends"
            }
            scale = torch.ones((), device=self.theta[0].device) if self.scale is None else self.scale
            one = self._replace(**pick, ascends=None, scale=-scale if up else self.scale)
            yield one, one.rows()


class PostStepRow(NamedTuple):
    """One parameter after the optimiser's step: draw it towards the anchor, then average it.

    Args:
        theta: the parameter.
        point: where the proximal pull leads; None for no pull.
        omega: how strongly, parallel to `point`.
        second: the optimiser's running mean of squared gradients, for the metric of Adam; None for `step` alone.
        average: the running average of the parameter; None for no average.
        step: 2 * strength * learning rate, or what takes its place.
        correction: what `second` is divided by.
        eps: what Adam adds to the root of `second`.
        weight: the share of the parameter in `average`.
        made: how many steps the optimiser has made, a scalar, where a GPU has it: then `correction` is Adam's second beta, and
            `second` is divided by 1 - correction ** made.
    """

    theta: Tensor
    point: Tensor | None = None
    omega: Tensor | None = None
    second: Tensor | None = None
    average: Tensor | None = None
    step: float = 0.0
    correction: float = 1.0
    eps: float = 0.0
    weight: float = 0.0
    made: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether columns that work together are all there or all missing; fused backends leave other rows to the next one."""
        return (self.point is None) == (self.omega is None)


def counted(rows: Iterable[PostStepRow]) -> list[PostStepRow]:
    """Return rows with Adam's bias correction as a number in place of the steps made; this waits for a GPU that counts them."""
    rows = list(rows)
    counts = [row.made for row in rows if row.made is not None]
    if not counts:
        return rows
    numbers = iter(torch.stack([count.to(counts[0].device) for count in counts]).tolist())
    return [
        row if row.made is None else row._replace(correction=1 - row.correction ** next(numbers), made=None) for row in rows
    ]
