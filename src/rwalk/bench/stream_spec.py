"""A stream as a small description, which goes to workers in place of the data, and from which each makes the same tasks."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rwalk.bench import builtin
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.holdout import early, later
from rwalk.bench.streams import Experience, Scenario
from rwalk.bench.variations import limit, scored


@dataclass(frozen=True)
class StreamSpec:
    """A stream as a small description, from which any process makes the same tasks.

    Args:
        kind: as in `rwalk.bench.builtin.STREAMS`.
        data: name or folder of the data set.
        root, label, by, target: as for `rwalk.bench.data.load`.
        seed: of what is random about the tasks, such as permutations.
        scenario, tasks: as for the stream's function; None for its default.
        skip: how many of the first tasks to leave out.
        limit, metric: as for `rwalk.bench.limit` and `scored`; None for all examples, and for accuracy or R².
        lower: whether a lower score of the metric is better.
        tuning: how many of the first tasks to tune on, and which share of their training examples to hold out; None for runs.
    """

    kind: str
    data: str
    root: Path | None = None
    label: str | None = None
    by: str | None = None
    seed: int = 0
    scenario: Scenario | None = None
    tasks: int | None = None
    skip: int = 0
    tuning: tuple[int, float] | None = None
    target: str | None = None
    limit: int | None = None
    metric: str | None = None
    lower: bool = False

    def make(self) -> list[Experience]:
        """Return the tasks; those made last are remembered."""
        return _made(self)


@lru_cache(maxsize=1)
def _loaded(*arguments: Any, **options: Any) -> DataSet:
    return load(*arguments, **options)


@lru_cache(maxsize=2)
def _made(spec: StreamSpec) -> list[Experience]:
    by = {"by": spec.by or "domain"} if builtin.takes(spec.kind, "by") else {}
    data = _loaded(spec.data, spec.root, spec.label, **by, target=spec.target)
    whole = builtin.make(spec.kind, data, spec.seed, spec.scenario, tasks=spec.tasks, **by)
    some = whole if spec.limit is None else limit(whole, spec.limit)
    some = some if spec.metric is None else scored(some, spec.metric, higher=not spec.lower)
    return later(some, spec.skip) if spec.tuning is None else early(some, *spec.tuning)


def forget_data() -> None:
    """Load data sets anew from here on, as files may have changed."""
    _loaded.cache_clear()
    _made.cache_clear()
