"""The figures that every table of methods shows, in terminals, pages and Markdown alike.

A new column is one entry of `COLUMNS`, or of `columns` if it has the unit of the scores: its heading, what it means, and a
function of a `Line`, such as `lambda line: line.over_seeds(lambda record: record.timings.get("train_seconds"))`. Nothing else
has to be changed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rwalk.report.names import names
from rwalk.report.summary import REFERENCES, Line, MethodComparison, Spread, ratio


@dataclass(frozen=True)
class Column:
    """One figure of a line.

    Args:
        name: its heading.
        about: what it is, in a sentence.
        value: returns it for a line, None where it is not defined.
        short: its heading in a terminal; without one it is not shown there.
        factor: it is multiplied by this to be shown, 100 for percent.
        digits: decimals.
        deviation: whether the deviation over seeds is shown.
        better: whether the highest or the lowest is the best; None for figures that are not of how well a method learns.
        wide: whether narrow terminals leave it out.
    """

    name: str
    about: str
    value: Callable[[Line], Spread | None]
    short: str = ""
    factor: float = 1
    digits: int = 1
    deviation: bool = True
    better: Literal["higher", "lower"] | None = None
    wide: bool = False

    def text(self, line: Line) -> str:
        """Return the figure of a line as text."""
        return with_deviation(self.value(line), self.factor, self.digits, self.deviation)

    def best(self, comparison: MethodComparison) -> set[int]:
        """Return the places of the best line and of those within its deviation; none if these are all lines."""
        lines = enumerate(comparison.lines)
        values = {i: value for i, line in lines if line.method not in REFERENCES and (value := self.value(line))}
        if self.better is None or not values:
            return set()
        sign = 1 if self.better == "higher" else -1
        best = max(values.values(), key=lambda value: sign * value.mean)
        near = {i for i, value in values.items() if abs(value.mean - best.mean) <= (best.deviation or 0.0)}
        return near if len(near) < len(values) else set()


def columns(comparison: MethodComparison) -> tuple[Column, ...]:
    """Return all columns for a comparison; those of scores have the unit of its metric."""
    metric = comparison.metric
    name, points = metric.name, metric.points
    score: dict[str, Any] = {"factor": metric.factor, "digits": metric.digits}
    direction = "" if metric.higher else "; lower is better"
    return (
        Column(f"Average {name}", f"over all tasks after the last one{metric.unit}{direction}", lambda line: line.average, name,
               better=metric.better, **score),
        Column("Kept", "share of the best accuracies on earlier tasks that is left in the end, %", lambda line: line.kept, "",
               100, better="higher"),
        Column("Forgetting", f"by how much earlier tasks are worse than at their best{points}",
               lambda line: line.forgetting, "forgetting", better="lower", **score),
        Column("Intransigence", f"by how much joint training is better on the last task{points}",
               lambda line: line.beside("joint", lambda mine, joint: mine.intransigence(joint)), "intrans.", better="lower",
               **score),
        Column("BWT", f"backward transfer: gain on earlier tasks since they were learned{points}",
               lambda line: line.over_seeds(lambda r: None if r.method == "joint" else r.backward_transfer), "BWT",
               better="higher", wide=True, **score),
        Column("FWT", f"forward transfer: gain on later tasks before they are learned{points}",
               lambda line: line.over_seeds(lambda r: None if r.method == "joint" else r.forward_transfer), "FWT",
               better="higher", wide=True, **score),
        *COLUMNS,
    )  # fmt: skip


COLUMNS = (
    Column("Bits", "per character, over all tasks after the last one",
           lambda line: line.over_seeds(lambda r: r.final_bits), "", digits=3, better="lower"),
    Column("Neighbours kept", "of a pretrained model's features, share of nearest neighbours that is left in the end, %",
           lambda line: line.over_seeds(lambda r: r.neighbours), "", 100, better="higher"),
    Column("Training,\u00a0s", "seconds of training in a run, and of starting up in the first of a process",
           lambda line: line.over_seeds(lambda r: r.timings.get("train_seconds")), "time s", deviation=False),
    Column("Step time", "CPU time of a step over that of fine-tuning", lambda line: line.step_ratio, "step", digits=2,
           deviation=False),
    Column("State,\u00a0P", "bytes held beside the model, over those of its parameters (P)",
           lambda line: line.over_seeds(lambda r: ratio(r.memory.get("state_bytes"), r.memory.get("model_bytes"))), "state",
           deviation=False),
    Column("Stored examples", "of earlier tasks", lambda line: line.stored_examples, "stored", digits=0, deviation=False,
           wide=True),
)  # fmt: skip


def contenders(comparison: MethodComparison) -> list[Line]:
    """Return the lines that learn one task after another; those that train on all data are references."""
    return [line for line in comparison.lines if line.method not in REFERENCES]


def best_of_each_method(comparison: MethodComparison) -> set[int]:
    """Return the place of each method's best line."""
    top: dict[str, tuple[float, int]] = {}
    for i, line in enumerate(comparison.lines):
        score = comparison.metric.gain(line.average.mean, 0.0) if line.average else -math.inf
        top[line.method] = max(top.get(line.method, (-math.inf, i)), (score, i))
    return {i for _, i in top.values()}


def filled(comparison: MethodComparison) -> list[Column]:
    """Return the columns that have a figure in some line."""
    return [column for column in columns(comparison) if any(column.value(line) for line in comparison.lines)]


class Table(NamedTuple):
    """A comparison as text: headings, rows, and whether each cell is among the best of its column."""

    head: list[str]
    rows: list[list[str]]
    best: list[list[bool]]


def table(comparison: MethodComparison) -> Table:
    """Return the table of the methods, as documents show it."""
    columns, strengths = filled(comparison), comparison.has_strengths
    head = ["method", *["strength"] * strengths, "seeds", *(column.name for column in columns)]
    tops = [column.best(comparison) for column in columns]
    rows, best = [], []
    for place, (line, name) in enumerate(zip(comparison.lines, names(comparison), strict=True)):
        about = [name, *[strength(line)] * strengths, str(len(line.seeds))]
        rows.append(about + [column.text(line) for column in columns])
        best.append([False] * len(about) + [place in top for top in tops])
    return Table(head, rows, best)


def strength(line: Line) -> str:
    """Return the strength of a line as text."""
    return "–" if line.strength is None else f"{line.strength:g}"


def with_deviation(value: Spread | None, factor: float = 1, digits: int = 1, deviation: bool = True) -> str:
    """Return a mean as text, with its deviation over seeds if there is one."""
    if value is None:
        return "–"
    text = _number(value.mean * factor, digits)
    return f"{text} ± {_number(value.deviation * factor, digits)}" if deviation and value.deviation is not None else text


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")
