"""Part of the way back from what a task has learned to where it began, which keeps more of what the model could do before.

Interpolation of weights: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv 2109.01903.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare, state_dtype
from rwalk.anchors.kronecker import KroneckerAnchor
from rwalk.consolidation.batchnorm import renew_statistics
from rwalk.consolidation.ended_weights import ended, restoring
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.scope import Named, fits, patterns
from rwalk.consolidation.step import StepObserver
from rwalk.distributed.shards import sharded
from rwalk.rules.base import number

By = Literal["uniform", "importance"]
"""Whether all weights go the same part of the way back, or the more the more important they are to earlier tasks."""


class Way(NamedTuple):
    """How to go back.

    Args:
        by: "uniform", theta = point + (1 - share) * D for D = theta - point; or "importance", theta = point + D / (1 + l w) for
            l = share / (1 - share) and the importance w over its mean, in the eigenbases of layers that are held as a whole.
        exclude: what stays as it is, such as the head of the new task.
        data: batches to renew the statistics of BatchNorm on.
    """

    by: By = "uniform"
    exclude: Named | None = None
    data: Any = None


@dataclass(frozen=True)
class Curve:
    """What models on the way back are worth.

    Args:
        shares: how far back each of them is: 0 is the model as it was trained, 1 the anchor.
        values: what `evaluate` returned for each.
        metrics: the names of these values.
    """

    shares: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    metrics: tuple[str, ...] = ("value",)

    def best(self, within: float = 1.0, metric: str | None = None, higher: bool = True) -> float:
        """Return the largest share whose value is at most `within` worse than the best: it keeps most. A nan is never best.

        Args:
            within: in the unit of the values.
            metric: which value; the first if there are several.
            higher: whether larger values are better.

        Raises:
            ValueError: if there is no such metric, or no value that is a number; if `within` is negative, or in percent where
                the values are fractions.
        """
        if not within >= 0:
            raise ValueError(f"`within` says how much worse a value may be, 0 or more, but is {within!r}.")
        if not self.shares:
            raise ValueError("The curve has no shares, so that none is the best. Pass some to `path`.")
        name = self.metrics[0] if metric is None else metric
        if name not in self.metrics:
            raise ValueError(f"The curve has the values {', '.join(self.metrics)}, and no {name!r}. Pass one of these names.")
        place = self.metrics.index(name)
        pairs = [(share, row[place] * (1 if higher else -1)) for share, row in zip(self.shares, self.values, strict=True)]
        known = {share: value for share, value in pairs if not math.isnan(value)}
        if not known:
            raise ValueError(f"All values of {name} are nan, so that no share is the best. Look at what `evaluate` returns.")
        if within >= 1 and all(0 <= abs(value) <= 1 for value in known.values()):
            raise ValueError(
                f"All values lie between 0 and 1, so that `within={within}` accepts every share. For one point of an accuracy "
                "that is a fraction pass `within=0.01`."
            )
        return max(share for share, value in known.items() if value >= max(known.values()) - within)

    def __str__(self) -> str:
        """Lay the curve out as a table of plain text."""
        lines = ["  ".join(["back", *(f"{name:>10}" for name in self.metrics)])]
        rows = zip(self.shares, self.values, strict=True)
        return "\n".join(lines + ["  ".join([f"{share:4.2f}", *(f"{v:10.4g}" for v in row)]) for share, row in rows])


class EvenSteps(NamedTuple):
    """Steps of a pull that are the same for all weights."""

    length: float

    def each(self, name: str) -> float:  # noqa: ARG002
        """Return the step of each element of a parameter."""
        return self.length

    def mean(self, name: str) -> float:  # noqa: ARG002
        """Return one number for all of a parameter."""
        return self.length


def evaluated(memory: Memory, evaluate: Callable[[nn.Module], Any], shares: Sequence[float], way: Way) -> Curve:
    """Evaluate models on the way back, and restore every bit of the one there is; see `Consolidator.path`."""
    shares = tuple(map(check_share, shares))
    modes = [(module, module.training) for module in memory.model.modules()]
    rows = []
    for share in shares:
        with weights_kept(memory, always=True):
            go_back(memory, share, way)
            memory.lent = True
            try:
                rows.append(_numbers(evaluate(memory.model)))
            finally:
                memory.lent = False
                for module, mode in modes:
                    module.training = mode
    metrics = tuple(rows[0]) if rows else ()
    if any(tuple(row) != metrics for row in rows):
        raise ValueError("`evaluate` returned values of different names for different shares. Return the same names each time.")
    return Curve(shares, tuple(tuple(row.values()) for row in rows), metrics)


def _numbers(found: Any) -> dict[str, float]:
    """Return what `evaluate` has returned as numbers by name."""
    try:
        return {name: float(value) for name, value in (found if isinstance(found, Mapping) else {"value": found}).items()}
    except (TypeError, ValueError, RuntimeError):
        kind = type(found).__name__
        raise TypeError(f"`evaluate` must return a number, or several by name, but returned a `{kind}`.") from None


def check_share(value: Any) -> float:
    """Return a share as a float, or raise a ValueError if it is not from 0 to 1."""
    plain = number(value)
    if plain is None or not 0 <= plain <= 1:
        raise ValueError(f"A share of the way back must be a number from 0 (stay) to 1 (all of it), but is {value!r}.")
    return float(plain)


@torch.no_grad()
def go_back(memory: Memory, share: float, way: Way) -> None:
    """Go a share of the way back, from the average of the task where there is one, and continue from there."""
    names, theta = _going(memory, way), memory.protected.theta
    with ended(memory):
        pass
    if share:
        _move({name: theta[name].detach() for name in names}, memory, share, way.by)
    if share or memory.tail.known:
        renew_statistics(memory.model, way.data, gradients.forward, near=False)
    memory.tail.restart()
    memory.moves.note_all(theta)


def _going(memory: Memory, way: Way) -> list[str]:
    """Name the parameters that go back.

    Raises:
        RuntimeError: if there is nothing to go back to, or no way to go.
        ValueError: for another `by`, or one that is not known yet.
    """
    theta, point = memory.theta(), memory.anchor.point
    if way.by not in ("uniform", "importance"):
        raise ValueError(f'`by` must be "uniform" or "importance", but is {way.by!r}.')
    if not point:
        raise RuntimeError(
            "There is nothing to go back to before the end of a first task. To go back towards a pretrained model, call "
            "`mark()` or `estimate(loader)` before training."
        )
    if not memory.steps:
        raise RuntimeError(
            "No step was made since the last task's end, so there is no way back. Call this before `consolidate`."
        )
    excluded = () if way.exclude is None else patterns(memory.model, way.exclude, "exclude")
    return [name for name in theta if name in point and not any(fits(name, pattern) for pattern in excluded)]


def _move(theta: Mapping[str, Tensor], memory: Memory, share: float, by: By) -> None:
    """Move parameters towards the anchor, in place."""
    anchor = memory.anchor
    if by == "uniform" or share == 1:
        for name, p in theta.items():
            point = anchor.point[name].to(p.device)
            p.copy_(point if share == 1 else p.to(state_dtype(p)).lerp(point.to(state_dtype(p)), share))
        return
    group = memory.protected.shard_group
    total = sum(anchor.totals(group).values())
    if not total:
        raise ValueError(
            'The anchor has no importance yet, as no task has ended. Use by="uniform", or call '
            "`estimate(loader)` before training."
        )
    (elements,) = group.sums([float(sum(point.numel() for point in anchor.point.values()))])
    steps = EvenSteps(share / (1 - share) * elements / total)
    KroneckerAnchor.of(anchor).draw(theta, steps, memory.protected.parameters)


@contextmanager
@torch.no_grad()
def weights_kept(memory: Memory, always: bool = False) -> Iterator[None]:
    """Restore the model, the average and what has been counted if an error comes, or always."""
    model, theta = bare(memory.model), memory.theta()
    ids = {id(t) for t in theta.values()}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in ids and not sharded(t)]
    with restoring(memory, [*theta.values(), *memory.tail.average.values(), *others], always):
        yield


class GoingBack:
    """The part of the consolidator's face that goes back."""

    _memory: Memory
    _observer: StepObserver

    def mark(self) -> None:
        """Remember where the weights are, of all parameters without an anchor, as what `path` and `blend` go back to.

        Call it before the first task of a pretrained model; nothing is held by it. Parameters that are trained only later in
        that task, such as frozen ones, begin where they are then.
        """
        self._observer.resolve()
        self._memory.mark()

    @torch.inference_mode(False)
    def path(
        self,
        evaluate: Callable[[nn.Module], Any],
        shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        *,
        by: By = "uniform",
        exclude: Named | None = None,
        data: Iterable[Any] | None = None,
    ) -> Curve:
        """Evaluate models between the weights as they are and the anchor, and restore every bit and mode; see `blend`.

        Inside `evaluate`, a step of the watched optimiser is refused, and so is what changes, saves or copies the memory.

        Args:
            evaluate: called with the model at each share; returns a number, or several by name. It may refit a head.
            shares: how far back each model is, from 0 to 1.
            by: as in `blend`.
            exclude: as in `blend`.
            data: as in `blend`.

        Returns:
            The values. `memory.blend(curve.best(within=1.0))` keeps most at the price of one point of the first value.
        """
        self._observer.resolve()
        return evaluated(self._memory, evaluate, shares, Way(by, exclude, data))

    @torch.inference_mode(False)
    def blend(
        self, share: float, *, by: By = "uniform", exclude: Named | None = None, data: Iterable[Any] | None = None
    ) -> None:
        """Go part of the way back to the anchor, which keeps more of what the model could do before; then `consolidate`.

        It starts from the average of the task, where there is one (Wortsman et al. 2022, arXiv 2109.01903).

        Args:
            share: from 0, stay, to 1, all of the way.
            by: "uniform", or "importance": the more important a weight is to earlier tasks, the further it goes.
            exclude: what stays as it is, as in `Consolidator`, such as the head of the new task.
            data: batches of the task, for models with BatchNorm.

        Raises:
            RuntimeError: if there is no anchor, or no step was made since the last task.
        """
        share = check_share(share)
        self._observer.resolve()
        with weights_kept(self._memory):
            go_back(self._memory, share, Way(by, exclude, data))
