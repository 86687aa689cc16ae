"""Two sets of records side by side: in which settings they differ, and whether results differ by more than seeds do."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from rwalk.bench.record import Record
from rwalk.bench.sealed import is_number
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
ROUNDING = ("versions", "threads", "device")
"""Settings that change results by rounding alone: runs that differ in them are runs of one method."""

Differences = dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]
"""For each setting that differs, its values in A and in B; none where it is not recorded."""


@dataclass(frozen=True)
class Effect:
    """How much higher one of `FIGURES` is in B than in A, over the seeds that both have."""

    figure: str
    seeds: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def difference(self) -> float:
        """The difference of the means."""
        return fmean(self.b) - fmean(self.a)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The difference at 95 %, by Student's t over the paired differences; None for one seed."""
        from scipy.special import stdtrit

        if len(self.seeds) < 2:
            return None
        spread = stdev(b - a for a, b in zip(self.a, self.b, strict=True))
        width = float(stdtrit(len(self.seeds) - 1, 0.975)) * spread / math.sqrt(len(self.seeds))
        return self.difference - width, self.difference + width

    @property
    def g(self) -> float | None:
        """Hedges' g_av (Cumming 2012), None below three seeds: the difference over the root mean square of both deviations.

        With n - 1 degrees of freedom; the gamma functions take out the bias of few seeds (Hedges 1981).
        """
        freedom = len(self.seeds) - 1
        spread = math.sqrt((variance(self.a) + variance(self.b)) / 2) if len(self.seeds) >= FEWEST else 0.0
        if spread < 1e-50:
            return None
        bias = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
        return bias * self.difference / spread

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
    ours, theirs = _grouped(records_a), _grouped(records_b)
    partners = {a: b for a in ours if (b := _nearest(a, theirs)) and _nearest(b, ours) is a}
    pairs = [Pair(_name(a, ours), _name(b, theirs), _differences(a, b), _effects(a, b)) for a, b in partners.items()]
    only_a = [_name(a, ours) for a in ours if a not in partners]
    only_b = [_name(b, theirs) for b in theirs if b not in partners.values()]
    return Contrast(tuple(pairs), tuple(only_a), tuple(only_b))


def comparable(differences: Differences) -> bool:
    """Return whether both are of one stream: no setting of it that both have recorded differs."""
    return not any(a and b for key, (a, b) in differences.items() if key.split(".")[0] == "stream")


def _grouped(records: Iterable[Record]) -> list[_Runs]:
    found: dict[str, _Runs] = {}
    for record in records:
        settings = _settings(record)
        same = canonical({key: value for key, value in settings.items() if key.split(".")[0] not in ROUNDING})
        runs = found.setdefault(same, _Runs(record.method, {}, {}))
        runs.by_seed.setdefault(record.seed, record)
        for key, value in settings.items():
            runs.settings.setdefault(key, {})[canonical(value)] = value
    return list(found.values())


def _settings(record: Record) -> dict[str, Any]:
    """Return each setting under its place, such as `training.lr`, except for the seed."""
    found: dict[str, Any] = {"method": record.method, "stream": record.stream}
    for part, value in (record.config | {"versions": record.versions}).items():
        found |= {f"{part}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {part: value}
    found.pop("stream.seed", None)
    return found | {"threads": record.threads, "ranks": record.ranks, "device": record.device}


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


def _effects(a: _Runs, b: _Runs) -> tuple[Effect, ...]:
    """Return the effect on each figure that both have for a common seed."""
    if not comparable(_differences(a, b)):
        return ()
    found = []
    for figure, read in FIGURES.items():
        values = {seed: (read(a.by_seed[seed]), read(b.by_seed[seed])) for seed in sorted(a.by_seed.keys() & b.by_seed.keys())}
        known = [(seed, float(x), float(y)) for seed, (x, y) in values.items() if _is_known(x) and _is_known(y)]
        if known:
            found.append(Effect(figure, *zip(*known, strict=True)))
    return tuple(found)


def _is_known(value: Any) -> bool:
    """Return whether a value is a number that can be squared; a file may hold anything."""
    return value is not None and is_number(value) and abs(value) < 1e100
