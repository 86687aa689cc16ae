"""Tables whose cells are shaded by their value: scores by task, and importance and drift of each layer."""

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from rwalk.report.charts import drawn, known
from rwalk.report.metric import ScoreMetric
from rwalk.report.names import clean, names
from rwalk.report.summary import Line, MethodComparison

SHADES = 10
"""Shades in `page.css`, beside no shade."""
MOST = 12
"""How many layers are shown: those with the largest share in the end."""


class Cell(NamedTuple):
    """A figure and its shade, from 0 to `SHADES`; empty if it is not known."""

    text: str = ""
    shade: int = 0


@dataclass(frozen=True)
class Heatmap:
    """A shaded table.

    Args:
        key: number of the line in its comparison.
        title: the line's name and the figure.
        corner: what rows and columns are.
        columns: headings.
        rows: a heading and the cells of each row.
        note: layers that are not shown.
    """

    key: int
    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""


def scores(comparison: MethodComparison) -> list[Heatmap]:
    """Return the matrix of scores of each line, as means over its seeds."""
    lines = [(key, line, name) for key, line, name in _lines(comparison) if any(r.scores for r in line.records)]
    return [_scores(key, line, name, comparison) for key, line, name in lines]


def _scores(key: int, line: Line, name: str, comparison: MethodComparison) -> Heatmap:
    metric, tasks = comparison.metric, [clean(task) for task in comparison.tasks]
    found = [known(rows, 1) for rows in zip(*(record.scores for record in line.records), strict=False)]
    rows = [(task, [_score(values, metric) for values in row]) for task, row in zip(tasks, found, strict=False)]
    return Heatmap(key, name, "after ↓ on →", tasks[: max(map(len, found), default=0)], rows)


def _score(values: list[float], metric: ScoreMetric) -> Cell:
    if not values:
        return Cell()
    mean, digits = fmean(values), 0 if metric.percent else metric.digits
    return Cell(f"{metric.factor * mean:.{digits}f}", round(SHADES * metric.shade(mean)))


def layers(comparison: MethodComparison) -> list[Heatmap]:
    """Return the share of importance and the drift of the layers, for each line that protects any."""
    return [found for key, line, name in _lines(comparison) for found in _layers(key, line, name)]


def _layers(key: int, line: Line, name: str) -> list[Heatmap]:
    shares = _by_layer(line, "share", 100)
    last = {layer: next((fmean(values) for values in reversed(row) if values), 0.0) for layer, row in shares.items()}
    top = sorted(sorted(shares, key=lambda layer: -last[layer])[:MOST], key=list(shares).index)
    if not top:
        return []
    rest = sum(last.values()) - sum(last[layer] for layer in top)
    note = f"{len(shares) - len(top)} more layers have {rest:.0f} %." if len(shares) > len(top) else ""
    drift = {layer: row for layer, row in _by_layer(line, "drift", 1).items() if layer in top}
    most = max((fmean(values) for row in drift.values() for values in row if values), default=0.0)
    columns = [str(task) for task in range(1, max(map(len, shares.values())) + 1)]
    return [
        Heatmap(key, f"{name}: share of importance, %", "layer ↓ task →", columns, _rows(shares, top, ".0f", 100), note),
        Heatmap(key, f"{name}: distance from the anchor", "layer ↓ task →", columns, _rows(drift, top, ".2f", most)),
    ]


def _rows(found: dict[str, list[list[float]]], top: list[str], form: str, most: float) -> list[tuple[str, list[Cell]]]:
    return [(layer, [_cell(values, form, most) for values in found[layer]]) for layer in top]


def _by_layer(line: Line, figure: str, factor: float) -> dict[str, list[list[float]]]:
    """Return a figure of each layer at each task's end, as the values over seeds."""
    seeds: list[list[dict[str, float | None]]] = [
        [{clean(layer["name"]): layer.get(figure) for layer in task.get("layers", [])} for task in record.diagnostics]
        for record in line.records
    ]
    there = dict.fromkeys(layer for tasks in seeds for task in tasks for layer in task)
    return {layer: known([[task.get(layer) for task in tasks] for tasks in seeds], factor) for layer in there}


def _cell(values: list[float], form: str, most: float) -> Cell:
    if not values:
        return Cell()
    mean = fmean(values)
    return Cell(f"{mean:{form}}", max(0, min(SHADES, round(SHADES * mean / most))) if most else 0)


def _lines(comparison: MethodComparison) -> list[tuple[int, Line, str]]:
    named = names(comparison)
    return [(key, comparison.lines[key], named[key]) for key in drawn(comparison)]
