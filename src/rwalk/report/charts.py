"""What the charts of a comparison show: the points of each line, and a style that distinguishes it from the others."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from rwalk.bench import metrics
from rwalk.bench.record import Record
from rwalk.report.figures import best_of_each_method, contenders, with_deviation
from rwalk.report.names import bracketed, clean, method_name, names
from rwalk.report.summary import REFERENCES, Line, MethodComparison, Spread, spread

MANY = 8
"""Up to this many lines all are drawn; with more, only the best of each method."""
SHAPES = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "triangle-down": "▼", "cross": "✚"}
"""Vega's name of each marker, and the letter that looks like it."""
DASHES: tuple[list[int], ...] = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3])
COLOURS = 6
"""Colours for methods in `page.css`, beside those of fine-tuning and of references."""


@dataclass(frozen=True)
class Style:
    """The colour of a line (one of `page.css`), and the shape and dash that distinguish it without colour."""

    colour: str
    shape: str
    dash: list[int]

    @property
    def glyph(self) -> str:
        """The letter that looks like the marker."""
        return SHAPES[self.shape]


class Point(NamedTuple):
    """A mean over seeds, with its deviation."""

    x: float
    value: Spread
    label: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        key: number of the line in its comparison, the same in all charts; a larger number for a series of several lines.
        name: its name.
        style: how it is drawn.
        points: from left to right.
    """

    key: int
    name: str
    style: Style
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """What one chart shows, as numbers.

    Args:
        title: its subject.
        about: how to read it, in a sentence.
        x, y: the titles of the axes.
        series: the lines.
        log: whether the values are of many magnitudes.
        labelled: whether each point's label stands beside it.
        whole: whether x is a whole number, such as a task's.
        most: the highest possible value.
        digits: decimals of the values.
        names: of the tasks on the axis below, where they have any.
    """

    title: str
    about: str
    x: str
    y: str
    series: list[Series]
    log: bool = False
    labelled: bool = False
    whole: bool = True
    most: float = math.inf
    digits: int = 1
    names: tuple[str, ...] = ()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings and rows of the table behind the chart."""
        if not self.whole:
            rows = [[s.name, p.label, f"{p.x:.1f}", with_deviation(p.value)] for s in self.series for p in s.points]
            return ["method", "strength", self.x, self.y], rows
        xs = sorted({p.x for s in self.series for p in s.points})
        at = [{p.x: with_deviation(p.value, digits=self.digits) for p in s.points} for s in self.series]
        return [self.x, *(s.name for s in self.series)], [[self.label(x), *(values.get(x, "–") for values in at)] for x in xs]

    def label(self, x: float) -> str:
        """Return what stands for a place on the axis below: the name of a task, or a number."""
        return self.names[int(x) - 1] if 0 < x <= len(self.names) else f"{x:g}"


def styles(comparison: MethodComparison) -> list[Style]:
    """Give each method a colour, and each of its lines a marker and a dash."""
    every = [*comparison.methods, *(line.method for line in comparison.lines)]
    methods = [m for m in dict.fromkeys(every) if m not in ("finetune", *REFERENCES)]
    count: dict[str, int] = {}
    found = []
    for line in comparison.lines:
        order = count[line.method] = count.get(line.method, -1) + 1
        if line.method in methods:
            rank = methods.index(line.method)
            shape, dash, colour = rank + order, order + rank // COLOURS, f"c{rank % COLOURS + 1}"
        else:
            shape, dash, colour = {"finetune": (1, 1, "plain")}.get(line.method, (3, 2, "reference"))
        found.append(Style(colour, list(SHAPES)[shape % len(SHAPES)], DASHES[dash % len(DASHES)]))
    return found


def drawn(comparison: MethodComparison) -> list[int]:
    """Return the places of the lines that are drawn: all of up to `MANY`, otherwise the best of each method."""
    everything = range(len(comparison.lines))
    return sorted(best_of_each_method(comparison)) if len(everything) > MANY else list(everything)


def charts(comparison: MethodComparison) -> list[Chart]:
    """Return the charts of a comparison, except those without two points in a line or with zeros alone."""
    metric = comparison.metric
    most = 100 if metric.percent else math.inf
    scale: dict[str, Any] = {"digits": metric.digits, "names": _task_names(comparison), "most": most}
    course, forgotten = (
        _over_tasks(comparison, lines, values, metric.factor)
        for lines, values in (
            (comparison.lines, lambda r: metrics.course(r.scores)),
            (contenders(comparison), lambda r: r.forgotten),
        )
    )
    made = [
        Chart(f"Average {metric.name}", "Over the tasks so far, after each one; the band is the standard deviation over seeds.",
              "tasks learned", f"average {metric.name}{metric.unit}", course, **scale),
        Chart("Forgetting of each task", "By how much it is worse at the end than at its best; lower is better.", "task",
              f"forgetting{metric.points}", forgotten, **scale),
        *_sweep(comparison),
        *_figures(comparison),
    ]  # fmt: skip
    return [
        chart
        for chart in made
        if any(
            len(s.points) > 1 and any(round(p.value.mean, 1 if chart.log else chart.digits) for p in s.points)
            for s in chart.series
        )
    ]


def _task_names(comparison: MethodComparison) -> tuple[str, ...]:
    """Return the names of the tasks, if they have any beside their numbers."""
    named = any(record.tasks for line in comparison.lines for record in line.records)
    return tuple(map(clean, comparison.tasks)) if named else ()


def known(rows: Iterable[Sequence[float | None]], factor: float = 100) -> list[list[float]]:
    """Return the defined values at each place of rows, which may be of several lengths."""
    return [[factor * value for value in column if value is not None] for column in zip_longest(*rows)]


def _over_tasks(
    comparison: MethodComparison,
    lines: Sequence[Line],
    values: Callable[[Record], Sequence[float | None]],
    factor: float = 100,
    positive: bool = False,
) -> list[Series]:
    """Return a series for each line, with a point for each task."""
    wanted, named, styled = set(map(id, lines)), names(comparison), styles(comparison)
    found = []
    for key in drawn(comparison):
        line = comparison.lines[key]
        spreads = enumerate(map(spread, known(map(values, line.records), factor)), start=1)
        points = [Point(task, value) for task, value in spreads if value and (value.mean > 0 or not positive)]
        if id(line) in wanted and points:
            found.append(Series(key, named[key], styled[key], points))
    return found


def _sweep(comparison: MethodComparison) -> list[Chart]:
    """Return stability against plasticity for each method that was run with several strengths."""
    lines: dict[str, list[tuple[int, Line]]] = {}
    for key, line in enumerate(comparison.lines):
        if line.strength is not None and line.learned and line.kept:
            fields = method_name(line.method) + bracketed([f"{k} {v}" for k, v in comparison.varying(line).items()])
            lines.setdefault(fields, []).append((key, line))
    styled = styles(comparison)
    series = [
        Series(unswitched, name, styled[group[0][0]], [_trade(line) for _, line in group])
        for unswitched, (name, group) in enumerate(lines.items(), start=len(comparison.lines)) if len(group) > 1
    ]  # fmt: skip
    about = "Each point is a strength: to the right new tasks are learned better, upwards old ones are kept better."
    titles = "accuracy right after learning, %", "kept of earlier tasks, %"
    return [Chart("Stability and plasticity", about, *titles, series, labelled=True, whole=False, most=100)]


def _trade(line: Line) -> Point:
    learned, kept = line.learned or Spread(0, None), line.kept or Spread(0, None)
    deviation = None if kept.deviation is None else 100 * kept.deviation
    return Point(100 * learned.mean, Spread(100 * kept.mean, deviation), f"{line.strength:g}")


FIGURES = {
    "penalty / loss": ("Penalty over loss", "At each task's end, before it is consolidated: how hard the memory pulls.", 1.0),
    "windows beyond eps": (
        "Riemannian share", "Windows whose squared Riemannian distance exceeded eps; at 0 the score is the path integral.",
        100.0,
    ),
    "penalty from score": (
        "Score's share of the penalty", "What the score along the path brings; the rest comes from Fisher information.", 100.0,
    ),
}  # fmt: skip
"""Figures of a memory that are charted: title, how to read it, and a factor."""


def _figures(comparison: MethodComparison) -> list[Chart]:
    return [_figure(comparison, figure, *words) for figure, words in FIGURES.items()]


def _figure(comparison: MethodComparison, figure: str, title: str, about: str, factor: float) -> Chart:
    def values(record: Record) -> list[float | None]:
        return [task.get("figures", {}).get(figure) for task in record.diagnostics]

    log = factor == 1
    series = _over_tasks(comparison, comparison.lines, values, factor, positive=log)
    form: dict[str, Any] = {"digits": 3, "log": True} if log else {"most": 100}
    return Chart(title, about, "task", figure if log else "%", series, names=_task_names(comparison), **form)
