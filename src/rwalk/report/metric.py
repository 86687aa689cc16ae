"""How scores are shown: accuracies in percent, and those of any other metric in its own unit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rwalk.bench.record import ACCURACY, Record


def decimals(values: Iterable[float]) -> int:
    """Return how many decimals show three digits of the largest of some values."""
    size = max(map(abs, values), default=0.0)
    return max(0, 2 - math.floor(math.log10(size))) if size else 2


@dataclass(frozen=True)
class ScoreMetric:
    """What the scores of a comparison are.

    Args:
        name: such as "accuracy" or "RMSE".
        higher: whether a higher score is better.
        lowest, highest: of all scores; 0 and 1 for accuracies.
    """

    name: str = ACCURACY
    higher: bool = True
    lowest: float = 0.0
    highest: float = 1.0

    @classmethod
    def of(cls, records: Iterable[Record]) -> "ScoreMetric":
        """Return the metric of some records, which is the same in all."""
        records = list(records)
        first = records[0]
        if first.metric == ACCURACY:
            return cls()
        scores = [score for r in records for row in r.scores for score in row if score is not None] or [0.0]
        return cls(first.metric, first.higher, min(scores), max(scores))

    @property
    def percent(self) -> bool:
        """Whether scores are fractions, shown in percent."""
        return self.name == ACCURACY

    @property
    def factor(self) -> float:
        """What scores are multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def unit(self) -> str:
        """The unit behind a score, with a comma before it."""
        return ", %" if self.percent else ""

    @property
    def points(self) -> str:
        """The unit behind a difference of scores, with a comma before it."""
        return ", points" if self.percent else ""

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which scores are better."""
        return "higher" if self.higher else "lower"

    @cached_property
    def digits(self) -> int:
        """Decimals that are shown: three significant ones of the largest score."""
        return 1 if self.percent else decimals((self.lowest, self.highest))

    @property
    def clear(self) -> float:
        """Difference of scores from which it counts for remarks: 0.02 for accuracies, else that share of their range."""
        return 0.02 * (self.highest - self.lowest)

    def gain(self, a: float, b: float) -> float:
        """Return by how much a score is better than another."""
        return a - b if self.higher else b - a

    def shade(self, score: float) -> float:
        """Return how good a score is, from 0 to 1, among all scores."""
        width = self.highest - self.lowest
        share = (score - self.lowest) / width if width else 1.0
        return share if self.higher else 1.0 - share if width else 1.0


def score_in_words(score: float, metric: str, digits: int = 1) -> str:
    """Write one score: an accuracy in percent with some decimals, any other with two more of them."""
    return f"{score:.{digits}%}" if metric == ACCURACY else f"{score:.{digits + 2}f}"
