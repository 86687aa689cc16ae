"""Two sets of records side by side: in which settings they differ, and whether results differ by more than seeds do."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from rwalk.bench.record import Record
from rwalk.report.plain import plain
from rwalk.report.summary import canonical

FEWEST = 3
"""Common seeds below which there is no verdict: with two, the 95 % quantile of Student's t is 12.7, with three 4.3."""
FIGURES: dict[str, Callable[[Record], Any]] = {
    "average accuracy": lambda record: record.average_accuracy,
    "forgetting": lambda record: None if record.method == "joint" else record.forgetting,
    "ms a step": lambda record: record.timings.get("step_ms"),
}
"""What is compared: fractions, and milliseconds of CPU time."""
SETTINGS = ("method", "stream", "config", "versions", "threads", "ranks", "device")
"""The parts of a record that are settings, not results."""
ROUNDING = ("versions", "threads", "device")
"""Settings that change results by rounding alone: runs that differ in them are runs of one method."""
DEEPEST = 20
"""Levels of a configuration that are listed one by one; anything deeper is one value."""

Differences = dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]
"""For each setting that differs, its values in A and in B; none where it is not recorded."""


@dataclass(frozen=True)
class Effect:
    """How much higher one of `FIGURES` is in B than in A, over the seeds that both have.

    `interval` is the difference's at 95 %, by Student's t over the paired differences, None for one seed. `g` is the difference
    over the root mean square of both deviations, corrected for few seeds: Hedges' g_av (Cumming 2012), None below three seeds.
    """

    figure: str
    seeds: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None
    g: float | None

    @property
    def verdict(self) -> str:
        """What the interval shows."""
        if self.a == self.b:
            return "the same with every seed"
        if self.interval is None or len(self.seeds) < FEWEST:
            return "too few common seeds for a verdict"
        return "within seed noise" if self.interval[0] <= 0 <= self.interval[1] else "differs beyond seed noise"


@dataclass(frozen=True)
class Pair:
    """A method of A and its partner in B: names, settings that differ, and effects, none if the streams differ."""

    a: str
    b: str
    differences: Differences
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Contrast:
    """The result of `compare`: pairs, and the methods of A and of B without a partner."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of one method with one configuration, by seed, and the values of each setting under their canonical text."""

    method: str
    by_seed: dict[int, Record]
    settings: dict[str, dict[str, Any]]


def compare(records_a: Iterable[Record], records_b: Iterable[Record]) -> Contrast:
    """Compare the methods of two sets of records, paired over the seeds that both have.

    Two methods are partners if each is the nearest to the other: of the same name if there is one, with the fewest settings
    that differ, and with no other as near.

    Args:
        records_a: for example what `rwalk.report.read` returns; of several records of one seed the first counts.
        records_b: the others.
    """
    ours, theirs = sides = _grouped(records_a), _grouped(records_b)
    pairs = [(a, b) for a in ours if (b := _nearest(a, theirs)) and _nearest(b, ours) is a]
    found = (_pair(a, b, _name(a, ours), _name(b, theirs)) for a, b in pairs)
    left = ([runs for runs in side if not any(runs in pair for pair in pairs)] for side in sides)
    return Contrast(tuple(found), *(tuple(_name(r, side) for r in some) for side, some in zip(sides, left, strict=True)))


def comparable(differences: Differences) -> bool:
    """Return whether both are of one stream: no setting of it that both have recorded differs."""
    return not any(a and b for key, (a, b) in differences.items() if key.split(".")[0] == "stream")


def _grouped(records: Iterable[Record]) -> list[_Runs]:
    found: dict[str, _Runs] = {}
    for record in records:
        flat = dict(_flat({key: getattr(record, key) for key in SETTINGS}))
        flat.pop("stream.seed", None)  # that of the run
        same = canonical({key: value for key, value in flat.items() if key.split(".")[0] not in ROUNDING})
        runs = found.setdefault(same, _Runs(record.method, {}, {}))
        runs.by_seed.setdefault(record.seed, record)
        for key, value in flat.items():
            runs.settings.setdefault(key, {})[canonical(value)] = value
    return list(found.values())


def _flat(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield each setting under its place, such as `training.lr`."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            yield from _flat(value, f"{prefix}{key}.".removeprefix("config."), depth + 1)
        elif value != {}:
            yield f"{prefix}{key}", value


def _nearest(one: _Runs, others: Sequence[_Runs]) -> _Runs | None:
    far = [(one.method != other.method, len(_differences(one, other))) for other in others]
    return others[far.index(min(far))] if far and far.count(min(far)) == 1 else None


def _differences(a: _Runs, b: _Runs) -> Differences:
    both = {key: (a.settings.get(key, {}), b.settings.get(key, {})) for key in {**a.settings, **b.settings}}
    return {key: (tuple(x.values()), tuple(y.values())) for key, (x, y) in both.items() if x.keys() != y.keys()}


def _name(runs: _Runs, side: Sequence[_Runs]) -> str:
    """Return the method and its strength, and the settings that distinguish it from others of the same method."""
    telling = {key for other in side if other.method == runs.method for key in _differences(runs, other)} | {"strength"}
    words = [f"{key} {plain(value)}" for key in runs.settings if key in telling for value in runs.settings[key].values()]
    return f"{runs.method} ({', '.join(words)})" if words else str(runs.method)


def _pair(a: _Runs, b: _Runs, name_a: str, name_b: str) -> Pair:
    differences, x, y = _differences(a, b), a.by_seed, b.by_seed
    common = [(seed, x[seed], y[seed]) for seed in sorted(x.keys() & y.keys())] if comparable(differences) else []
    effects = (_effect(figure, read, common) for figure, read in FIGURES.items())
    return Pair(name_a, name_b, differences, tuple(filter(None, effects)))


def _effect(figure: str, read: Callable[[Record], Any], common: Sequence[tuple[int, Record, Record]]) -> Effect | None:
    values = ((seed, read(a), read(b)) for seed, a, b in common)
    known = [(seed, float(a), float(b)) for seed, a, b in values if _is_number(a) and _is_number(b)]
    if not known:
        return None
    seeds, a, b = zip(*known, strict=True)
    return Effect(figure, seeds, a, b, fmean(b) - fmean(a), _interval(a, b), _hedges(a, b))


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that can be squared; a file may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    from scipy.special import stdtrit

    apart = [y - x for x, y in zip(a, b, strict=True)]
    if len(apart) < 2:
        return None
    width = float(stdtrit(len(apart) - 1, 0.975)) * stdev(apart) / math.sqrt(len(apart))
    return fmean(b) - fmean(a) - width, fmean(b) - fmean(a) + width


def _hedges(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Hedges' g_av with n - 1 degrees of freedom; the gamma functions take out the bias of few seeds (Hedges 1981)."""
    freedom = len(a) - 1
    spread = math.sqrt((variance(a) + variance(b)) / 2) if len(a) >= FEWEST else 0.0
    if spread < 1e-50:
        return None
    bias = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return bias * (fmean(b) - fmean(a)) / spread
