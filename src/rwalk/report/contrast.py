"""Two sets of records side by side: what differs in their settings, and whether results differ beyond what seeds do."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any, Literal

from rwalk.bench.record import Record
from rwalk.report.differences import Difference, differences, same_stream, settings
from rwalk.report.plain import plain
from rwalk.report.summary import canonical

LEVEL = 0.95
"""Of all intervals."""
FEWEST = 3
"""Seeds below which nothing is said: two give one degree of freedom, with which the quantile of t is 12.7 (with three: 4.3),
and the normality that it rests on cannot show."""
TINY = 1e-100
"""A variance that is none: its square would be lost."""
FIGURES: dict[str, Callable[[Record], Any]] = {
    "average accuracy": lambda record: record.average_accuracy,
    "forgetting": lambda record: None if record.method == "joint" else record.forgetting,
    "ms a step": lambda record: record.timings.get("step_ms"),
}
"""What is compared: fractions, and milliseconds of CPU time."""

Verdict = Literal["differs beyond seed noise", "within seed noise", "the same with every seed", "too few seeds to say"]


@dataclass(frozen=True)
class Effect:
    """By how much a figure of B is above that of A.

    Args:
        figure: one of `FIGURES`.
        paired: whether values of equal seeds were held against each other; else all of A against all of B.
        seeds: the seeds of A and of B that were used; the same ones where paired.
        a, b: the figure of each of those runs.
        difference: mean of B less mean of A.
        interval: of the difference at level 0.95, by Student's t over the paired differences, or by Welch (1947) for seeds that
            are not paired; None with one seed.
        effect: the difference over the root of the mean of both variances over seeds, corrected for few seeds: Hedges' g_av
            where paired (Cumming 2012), Hedges' g* where not (Delacre et al. 2021); None below three seeds, or without spread.
    """

    figure: str
    paired: bool
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    a: tuple[float, ...]
    b: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None
    effect: float | None

    @property
    def verdict(self) -> Verdict:
        """What the interval says."""
        if self.paired and self.a == self.b:
            return "the same with every seed"
        if self.interval is None or min(len(self.a), len(self.b)) < FEWEST:
            return "too few seeds to say"
        return "within seed noise" if self.interval[0] <= 0 <= self.interval[1] else "differs beyond seed noise"

    @property
    def measure(self) -> str:
        """The name of the effect size."""
        return "Hedges' g_av" if self.paired else "Hedges' g*"


@dataclass(frozen=True)
class Match:
    """A method of A and the one of B that it is held against.

    Args:
        a, b: their names, with what tells them from others of the same side.
        differences: settings in which they differ.
        comparable: whether both are of the same stream; else there are no effects.
        effects: one for each figure that both have.
        alone: seeds that only A has, and that only B has.
    """

    a: str
    b: str
    differences: tuple[Difference, ...]
    comparable: bool
    effects: tuple[Effect, ...]
    alone: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Contrast:
    """All that `compare` finds: matches, and the methods of A and of B without a partner."""

    matches: tuple[Match, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def compare(records_a: Iterable[Record], records_b: Iterable[Record]) -> Contrast:
    """Hold the methods of two sets of records against each other.

    Methods are matched if they are one of a kind on both sides: first by all settings, then by stream, method, strength and
    fields, by stream and method, by method, strength and fields, and by method. Two sets of one method each are matched
    whatever these are.

    Args:
        records_a: for example those that `rwalk.report.read` returns; where a seed comes twice, the first one counts.
        records_b: the others.
    """
    ours, theirs = _Group.all(records_a), _Group.all(records_b)
    pairs = list(_matched(ours, theirs))
    left = [[g for g in groups if all(g is not pair[i] for pair in pairs)] for i, groups in enumerate((ours, theirs))]
    names = [_names(groups) for groups in (ours, theirs)]
    matches = tuple(_match(a, b, names[0][id(a)], names[1][id(b)]) for a, b in pairs)
    only_a, only_b = (tuple(names[i][id(g)] for g in groups) for i, groups in enumerate(left))
    return Contrast(matches, only_a, only_b)


HOW = ("versions", "threads", "device")
"""Settings that change results by rounding alone."""


@dataclass(frozen=True)
class _Group:
    """The runs of one method with one configuration, by seed."""

    runs: dict[int, Record]
    settings: dict[str, Any]

    @classmethod
    def all(cls, records: Iterable[Record]) -> list["_Group"]:
        found: dict[str, _Group] = {}
        for record in records:
            about = {key: value for key, value in settings(record).items() if key.split(".")[0] not in HOW}
            found.setdefault(canonical(about), cls({}, about)).runs.setdefault(record.seed, record)
        return list(found.values())

    def part(self, *left_out: str) -> str:
        return canonical({key: value for key, value in self.settings.items() if key.split(".")[0] not in left_out})

    @property
    def method(self) -> Any:
        return self.settings["method"]

    @property
    def records(self) -> list[Record]:
        return list(self.runs.values())


KEYS: tuple[Callable[[_Group], Any], ...] = (
    lambda g: g.part(),
    lambda g: g.part("training", "ranks"),
    lambda g: (g.settings.get("stream"), g.method),
    lambda g: g.part("training", "ranks", "stream"),
    lambda g: g.method,
)
"""By what methods are matched: the strictest comes first."""


def _matched(ours: list[_Group], theirs: list[_Group]) -> Iterator[tuple[_Group, _Group]]:
    if len(ours) == len(theirs) == 1:
        yield ours[0], theirs[0]
        return
    left, right = list(ours), list(theirs)
    for key in KEYS:
        sides = [_unique(groups, key) for groups in (left, right)]
        for found in [k for k in sides[0] if k in sides[1]]:
            a, b = (side[found] for side in sides)
            left.remove(a)
            right.remove(b)
            yield a, b


def _unique(groups: list[_Group], key: Callable[[_Group], Any]) -> dict[Any, _Group]:
    """Return those groups that have a key for themselves."""
    keys = [key(group) for group in groups]
    return {k: group for k, group in zip(keys, groups, strict=True) if keys.count(k) == 1}


def _names(groups: list[_Group]) -> dict[int, str]:
    """Name groups by method and strength, and by what else tells those of the same method apart."""
    names = {}
    for group in groups:
        others = [g for g in groups if g is not group and g.method == group.method]
        telling = [key for key, value in group.settings.items() if any(g.settings.get(key) != value for g in others)]
        strength = ["strength"] if "strength" in group.settings and "strength" not in telling else []
        words = [f"{key} {plain(group.settings[key])}" for key in strength + telling]
        names[id(group)] = str(group.method) + (f" ({', '.join(words)})" if words else "")
    return names


def _match(a: _Group, b: _Group, name_a: str, name_b: str) -> Match:
    comparable = same_stream(a.records, b.records)
    effects = [_effect(figure, value, a.runs, b.runs) for figure, value in FIGURES.items()] if comparable else []
    alone = tuple(sorted(a.runs.keys() - b.runs.keys())), tuple(sorted(b.runs.keys() - a.runs.keys()))
    return Match(name_a, name_b, differences(a.records, b.records), comparable, tuple(e for e in effects if e), alone)


def _effect(figure: str, value: Callable[[Record], Any], a: Mapping[int, Record], b: Mapping[int, Record]) -> Effect | None:
    """Compare a figure, paired over seeds if enough are common, or if no other way has enough."""
    ours, theirs = ({s: v for s, r in sorted(runs.items()) if (v := _number(value(r))) is not None} for runs in (a, b))
    common = tuple(seed for seed in ours if seed in theirs)
    paired = len(common) >= FEWEST or (bool(common) and min(len(ours), len(theirs)) < FEWEST)
    seeds = (common, common) if paired else (tuple(ours), tuple(theirs))
    if not all(seeds):
        return None
    x, y = tuple(ours[s] for s in seeds[0]), tuple(theirs[s] for s in seeds[1])
    difference = fmean(y) - fmean(x)
    error, freedom = _paired(x, y) if paired else _welch(x, y)
    width = None if error is None else _quantile(freedom) * error if error else 0.0
    interval = None if width is None else (difference - width, difference + width)
    return Effect(figure, paired, seeds, x, y, difference, interval, _hedges(x, y, paired))


def _number(value: Any) -> float | None:
    """Return a number of a size that can be squared; None for all else that a file may hold."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if real else None


def _paired(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float]:
    """Return the standard error of the mean of paired differences, and its degrees of freedom."""
    apart = [b - a for a, b in zip(x, y, strict=True)]
    return (stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None), len(apart) - 1


def _welch(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float]:
    """Return the standard error of a difference of means, and its degrees of freedom (Welch 1947)."""
    if min(len(x), len(y)) < 2:
        return None, 0
    u, v = variance(x) / len(x), variance(y) / len(y)
    if u + v < TINY:
        return math.sqrt(u + v), len(x) + len(y) - 2
    return math.sqrt(u + v), (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))


def _quantile(freedom: float) -> float:
    """Return that of Student's t at which half of the rest lies beyond."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _hedges(x: Sequence[float], y: Sequence[float], paired: bool) -> float | None:
    """Standardise a difference of means by the root of the mean variance, and take out the bias of few seeds (Hedges 1981).

    The degrees of freedom are n - 1 for n pairs, else those of Delacre et al. (2021).
    """
    if min(len(x), len(y)) < FEWEST or (u := variance(x)) + (v := variance(y)) < TINY:
        return None
    n, m = len(x) - 1, len(y) - 1
    freedom = n if paired else n * m * (u + v) ** 2 / (m * u**2 + n * v**2)
    bias = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return bias * (fmean(y) - fmean(x)) / math.sqrt((u + v) / 2)
