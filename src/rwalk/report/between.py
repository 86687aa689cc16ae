"""The methods of one set of records against one of them, with a correction for how many there are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rwalk._errors import printable
from rwalk.bench.record import Record
from rwalk.report.compare import Effect, Runs, effects, grouped
from rwalk.report.metric import ScoreMetric
from rwalk.report.names import method_name
from rwalk.report.summary import REFERENCES, MethodComparison, summarise

LEVEL = 0.05
"""Chance of any false finding in a ranking."""


@dataclass(frozen=True)
class Rival:
    """A method and how its average score differs from the reference's.

    `p` is that of the paired t-test over common seeds, adjusted for the number of rivals (Holm 1979); None below three seeds.
    """

    name: str
    effect: Effect
    p: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference is larger than seeds explain, over all rivals together."""
        if self.effect.a == self.effect.b:
            return "the same"
        if self.p is None:
            return "too few seeds"
        return "differs" if self.p < LEVEL else "seed noise"


@dataclass(frozen=True)
class Ranking:
    """The methods of one stream against a reference, from the best average score to the worst.

    Args:
        stream: name of the stream.
        about: the settings that all share.
        metric: what the scores are.
        reference: the method that the others are compared to.
        rivals: the others that share seeds with it.
    """

    stream: str
    about: str
    metric: ScoreMetric
    reference: str
    rivals: tuple[Rival, ...]


def between(records: Iterable[Record], against: str | None = None) -> list[Ranking]:
    """Compare the methods of each stream with one of them, over common seeds.

    Args:
        records: for example what `rwalk.report.read` returns.
        against: the method to compare with, such as "finetune"; None for the one with the best average score of each stream; a
            method that trains on all data only if there is no other.

    Raises:
        ValueError: if no stream has a method of that name.
    """
    comparisons = summarise(records)
    found = [_ranking(comparison, against) for comparison in comparisons]
    if against is not None and not any(found):
        known = ", ".join(sorted({line.method for comparison in comparisons for line in comparison.lines}))
        raise ValueError(printable(f"There are no records of `{against}` to compare with; there are some of {known}.", ""))
    return [ranking for ranking in found if ranking is not None]


def _ranking(comparison: MethodComparison, against: str | None) -> Ranking | None:
    metric = comparison.metric
    runs = grouped(record for line in comparison.lines for record in line.records)
    known = [(score, one) for one in runs if (score := _score(one, metric)) is not None]
    ordered = [one for _, one in sorted(known, key=lambda each: -each[0])]
    best = sorted(ordered, key=lambda one: one.method in REFERENCES)  # which keeps the order otherwise
    first = next((one for one in best if against in (None, one.method)), None)
    if first is None:
        return None
    pairs = [(one.name(runs), effect) for one in ordered if one is not first and (effect := _effect(first, one)) is not None]
    adjusted = holm([effect.p for _, effect in pairs])
    rivals = tuple(Rival(_named(name), effect, p) for (name, effect), p in zip(pairs, adjusted, strict=True))
    return Ranking(comparison.stream, comparison.describe(), metric, _named(first.name(runs)), rivals)


def _named(name: str) -> str:
    """Return the name of runs, with the method's usual one."""
    method, _, rest = name.partition(" ")
    return " ".join(filter(None, [method_name(method), rest]))


def _score(runs: Runs, metric: ScoreMetric) -> float | None:
    """Return the mean over seeds of the average score, signed so that higher is better."""
    averages = [record.average for record in runs.by_seed.values() if record.average is not None]
    return metric.gain(sum(averages) / len(averages), 0.0) if averages else None


def _effect(reference: Runs, other: Runs) -> Effect | None:
    return next((effect for effect in effects(reference, other) if effect.figure.startswith("average ")), None)


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for their number by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979)."""
    known = sorted((p, place) for place, p in enumerate(chances) if p is not None)
    found: list[float | None] = [None] * len(chances)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        found[place] = largest
    return found
