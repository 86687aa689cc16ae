"""Charts that stand alone: in notebooks, papers and slides, in the colours of the page."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.record import Record
from rwalk.report import charts, svg
from rwalk.report.charts import Chart, Point, Series, Style
from rwalk.report.metric import ScoreMetric
from rwalk.report.names import clean
from rwalk.report.summary import MethodComparison, Spread, summarise

STYLES = Path(__file__).parent / "templates" / "page.css"
VARIABLE = re.compile(r"--([\w-]+):\s*(?:light-dark\((#[0-9a-f]+), (#[0-9a-f]+)\)|var\(--([\w-]+)\))")
KINDS = ("svg", "pdf", "png")
"""Formats in which a drawing is saved."""


@dataclass(frozen=True)
class Drawing:
    """A chart as notebooks show it; `save` writes it as a file.

    Args:
        chart: what it shows.
        dark: whether it has the colours for a dark ground.
    """

    chart: Chart
    dark: bool = False

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The chart as Vega-Lite describes it, for Altair and other programs."""
        found: dict[str, Any] = _coloured(svg.spec(self.chart, legend=True), _colours(self.dark))
        return found

    def save(self, path: str | Path) -> Path:
        """Write an SVG, PDF or PNG file, by its suffix, and return its path.

        Raises:
            ImportError: if the extra `bench` is not installed.
            ValueError: if the suffix is another one.
        """
        kind = Path(path).suffix.removeprefix(".").lower()
        if kind not in KINDS:
            came = printable(f"`{Path(path).name}` ends with `{Path(path).suffix}`", "")
            raise ValueError(f"{came}, and drawings are saved as {', '.join(f'.{one}' for one in KINDS)}.")
        files.write(path, svg.converted(self.spec, kind))
        return Path(path)

    def _repr_svg_(self) -> str:
        """Show it on its own ground, whatever the notebook's, and with its title, which papers print below."""
        colours = _colours(self.dark)
        title = {"text": self.chart.title, "anchor": "start", "color": colours["ink"], "fontSize": 14}
        return svg.converted(self.spec | {"title": title, "background": colours["paper"]}, "svg").decode()


def plot(records: Record | Iterable[Record] | MethodComparison, chart: str = "") -> Drawing:
    """Draw records: of one the score on each task over the run, of several each method's average score, with its spread.

    Args:
        records: one record, some of one stream and setting, or what `summarise` made of them.
        chart: which of the charts of a report, by its title, such as "Forgetting of each task"; the first one if empty.

    Raises:
        ValueError: if there is nothing to draw, if records are of several streams or settings, or there is no such chart.
    """
    if isinstance(records, Record):
        return Drawing(_of_one(records))
    comparisons = [records] if isinstance(records, MethodComparison) else summarise(records)
    if len(comparisons) != 1:
        came = f"There are records of {len(comparisons)} different streams, metrics or settings"
        raise ValueError(f"{came}, and a plot shows one. Write `for comparison in summarise(records): plot(comparison)`.")
    found = {one.title: one for one in charts.charts(comparisons[0])}
    if not found or chart not in ("", *found):
        known = ", ".join(found) or "none, as they have a single task or no scores"
        raise ValueError(printable(f"There is no chart `{chart}` of these records; there is {known}.", ""))
    return Drawing(found[chart] if chart else next(iter(found.values())))


def _of_one(record: Record) -> Chart:
    """Return a chart of a record's scores, with a line for each task."""
    metric, series = ScoreMetric.of([record]), []
    for j, name in enumerate(record.task_names):
        column = [(k + 1, row[j]) for k, row in enumerate(record.scores)]
        points = [Point(k, Spread(metric.factor * score, None)) for k, score in column if score is not None]
        look = Style(
            f"c{j % charts.COLOURS + 1}", list(charts.SHAPES)[j % len(charts.SHAPES)], charts.DASHES[j % len(charts.DASHES)]
        )
        series += [Series(j, clean(name) if record.tasks else f"task {name}", look, points)] if points else []
    if not series:
        raise ValueError("This record has no scores to draw.")
    about = f"{record.method} on {record.stream}, seed {record.seed}"
    most = 100.0 if metric.percent else float("inf")
    names = tuple(map(clean, record.tasks))
    return Chart(
        clean(about), "", "tasks learned", f"{metric.name}{metric.unit}", series, digits=metric.digits, most=most, names=names
    )


def _colours(dark: bool) -> dict[str, str]:
    """Return the colours of the page, by the names of its variables."""
    variables = VARIABLE.findall(STYLES.read_text(encoding="utf-8"))
    found = {name: (night if dark else day) or f"var(--{other})" for name, day, night, other in variables}
    return {name: found[value[6:-1]] if value.startswith("var(") else value for name, value in found.items()}


def _coloured(content: Any, colours: dict[str, str]) -> Any:
    """Return a specification with colours in place of the page's variables."""
    if isinstance(content, dict):
        return {key: _coloured(value, colours) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_coloured(value, colours) for value in content]
    is_variable = isinstance(content, str) and content.startswith("var(--")
    return colours[content[6:-1]] if is_variable else content
