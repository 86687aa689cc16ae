"""Two sets of records side by side: in which settings they differ, and whether results differ by more than seeds do."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from rwalk.bench.record import ACCURACY, Record
from rwalk.bench.sealed import is_number
from rwalk.report.plain import plain
from rwalk.report.summary import canonical

FEWEST = 3
"""Common seeds below which there is no verdict: with two, the 95 % quantile of Student's t is 12.7, with three 4.3."""
FIGURES: dict[str, Callable[[Record], Any]] = {
    "average": lambda record: record.average,
    "forgetting": lambda record: None if record.method == "joint" else record.forgetting,
    "ms a step": lambda record: record.timings.get("step_ms"),
}
"""What is compared: the average score, what is lost of it, and milliseconds of CPU time."""
ROUNDING = ("versions", "threads", "device")
"""Settings that change results by rounding alone: runs that differ in them are runs of one method."""

Differences = dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]
"""For each setting that differs, its values in A and in B; none where it is not recorded."""


@dataclass(frozen=True)
class Effect:
    """How much higher one of `FIGURES` is in B than in A, over the seeds that both have; "average" has the name of the metric.

    `interval` is the difference's at 95 %, None for one seed, and `p` its chance if nothing differs, both by Student's t over
    the paired differences. `g` is the difference over the root mean square of both deviations, corrected for few seeds: Hedges'
    g_av (Cumming 2012). `p` and `g` are None below three seeds. `percent` says that figures are fractions.
    """

    figure: str
    seeds: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None
    g: float | None
    p: float | None = None
    percent: bool = False

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
class Runs:
    """The runs of one method with one configuration, by seed, and the values of each setting under their canonical text."""

    method: str
    by_seed: dict[int, Record]
    settings: dict[str, dict[str, Any]]

    def differences(self, other: "Runs") -> Differences:
        """Return the settings in which another method's runs differ from these."""
        both = {key: (self.settings.get(key, {}), other.settings.get(key, {})) for key in {**self.settings, **other.settings}}
        return {key: (tuple(x.values()), tuple(y.values())) for key, (x, y) in both.items() if x.keys() != y.keys()}

    def nearest(self, others: Sequence["Runs"]) -> "Runs | None":
        """Return the runs of the same name, if there are any, with the fewest settings that differ; None if several are."""
        far = [(self.method != other.method, len(self.differences(other))) for other in others]
        return others[far.index(min(far))] if far and far.count(min(far)) == 1 else None

    def name(self, side: Sequence["Runs"]) -> str:
        """Return the method and its strength, and the settings that distinguish it from others of the same method."""
        telling = {key for other in side if other.method == self.method for key in self.differences(other)} | {"strength"}
        words = [f"{key} {plain(value)}" for key in self.settings if key in telling for value in self.settings[key].values()]
        return f"{self.method} ({', '.join(words)})" if words else self.method


def compare(records_a: Iterable[Record], records_b: Iterable[Record]) -> Contrast:
    """Compare the methods of two sets of records, paired over the seeds that both have.

    Two methods are partners if each is the nearest to the other: of the same name if there is one, with the fewest settings
    that differ, and with no other as near.

    Args:
        records_a: for example what `rwalk.report.read` returns; of several records of one seed the first counts.
        records_b: the others.
    """
    ours, theirs = grouped(records_a), grouped(records_b)
    partners = {a: b for a in ours if (b := a.nearest(theirs)) and b.nearest(ours) is a}
    pairs = [Pair(a.name(ours), b.name(theirs), a.differences(b), tuple(effects(a, b))) for a, b in partners.items()]
    only_a = [a.name(ours) for a in ours if a not in partners]
    only_b = [b.name(theirs) for b in theirs if b not in partners.values()]
    return Contrast(tuple(pairs), tuple(only_a), tuple(only_b))


def comparable(differences: Differences) -> bool:
    """Return whether both are of one stream and metric: no setting of them that both have recorded differs."""
    return not any(a and b for key, (a, b) in differences.items() if key.split(".")[0] in ("stream", "metric"))


def grouped(records: Iterable[Record]) -> list[Runs]:
    """Return the runs of each method with one configuration, whatever the seed."""
    found: dict[str, Runs] = {}
    for record in records:
        settings = _settings(record)
        same = canonical({key: value for key, value in settings.items() if key.split(".")[0] not in ROUNDING})
        runs = found.setdefault(same, Runs(record.method, {}, {}))
        runs.by_seed.setdefault(record.seed, record)
        for key, value in settings.items():
            runs.settings.setdefault(key, {})[canonical(value)] = value
    return list(found.values())


def _settings(record: Record) -> dict[str, Any]:
    """Return each setting under its place, such as `training.lr`, except for the seed."""
    found: dict[str, Any] = {"method": record.method, "stream": record.stream, "metric": record.metric}
    for part, value in (record.config | {"versions": record.versions}).items():
        found |= {f"{part}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {part: value}
    found.pop("stream.seed", None)
    return found | {"threads": record.threads, "ranks": record.ranks, "device": record.device}


def effects(a: Runs, b: Runs) -> Iterator[Effect]:
    """Yield the effect on each figure that both have for a common seed, if they are of one stream."""
    common = sorted(a.by_seed.keys() & b.by_seed.keys()) if comparable(a.differences(b)) else []
    for name, read in FIGURES.items():
        figure = f"average {a.by_seed[common[0]].metric}" if common and name == "average" else name
        values = [(seed, read(a.by_seed[seed]), read(b.by_seed[seed])) for seed in common]
        known = [(seed, float(x), float(y)) for seed, x, y in values if _is_known(x) and _is_known(y)]
        if known:
            percent = name != "ms a step" and a.by_seed[common[0]].metric == ACCURACY
            yield _effect(figure, percent, *zip(*known, strict=True))


def _is_known(value: Any) -> bool:
    """Return whether a value is a number that can be squared; a file may hold anything."""
    return value is not None and is_number(value) and abs(value) < 1e100


def _effect(figure: str, percent: bool, seeds: tuple[int, ...], a: tuple[float, ...], b: tuple[float, ...]) -> Effect:
    from scipy.special import stdtr, stdtrit

    freedom, difference, interval, g, p = len(seeds) - 1, fmean(b) - fmean(a), None, None, None
    error = stdev(y - x for x, y in zip(a, b, strict=True)) / math.sqrt(len(seeds)) if freedom >= 1 else 0.0
    if freedom >= 1:
        width = float(stdtrit(freedom, 0.975)) * error
        interval = difference - width, difference + width
    if len(seeds) >= FEWEST:
        p = 2 * float(stdtr(freedom, -abs(difference) / error)) if error else float(difference == 0)
        if (spread := math.sqrt((variance(a) + variance(b)) / 2)) > 1e-50:
            bias = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)  # Hedges 1981
            g = bias * difference / spread
    return Effect(figure, seeds, a, b, difference, interval, g, p, percent)
