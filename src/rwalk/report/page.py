"""The report as one HTML file that needs no other file and no network."""

import base64
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.record import Record
from rwalk.bench.tuned import SUFFIX, Tuned
from rwalk.report import charts, heatmaps, remarks, reproduce, svg
from rwalk.report.figures import filled, strength
from rwalk.report.markdown import markdown
from rwalk.report.names import clean, names
from rwalk.report.summary import Line, MethodComparison, read, summarise

NAME = "report.html"
TEMPLATES = Path(__file__).parent / "templates"


def write(
    folder: str | Path,
    out: str | Path | None = None,
    refresh: int | None = None,
    found: tuple[Sequence[Record], Sequence[str]] | None = None,
) -> Path:
    """Write the report on all records below a folder as HTML, and as Markdown beside it, and return the HTML file's path.

    Args:
        folder: where the records are.
        out: the HTML file; default: `report.html` in the folder.
        refresh: seconds after which a browser loads the page again; None for a page that is finished.
        found: records and problems as `read` returns them for the folder; read from it when None.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no JSON file.
        ImportError: if the extra `bench` is not installed.
        ValueError: if `out` is a folder.
        OSError: if a file cannot be written.
    """
    place = Path(folder) / NAME if out is None else Path(out)
    if place.is_dir() or place.suffix == ".md":
        came = "a folder" if place.is_dir() else "the name of the Markdown file"
        raise ValueError(printable(f"`{place}` is {came}; name a file for the HTML, such as report.html."))
    records, problems = read(folder) if found is None else found
    comparisons = summarise(records)
    html = render(comparisons, problems, _tunings(folder), refresh)
    files.write(place, html.encode(errors="replace"))
    files.write(place.with_suffix(".md"), markdown(comparisons).encode(errors="replace"))
    return place


def _tunings(folder: str | Path) -> list[Tuned]:
    """Return the results of tuning below a folder."""
    found = []
    for file in sorted(Path(folder).rglob(f"*{SUFFIX}")):
        with suppress(ValueError, OSError):  # `rwalk.report.read` names it
            found.append(Tuned.load(file, exact=True))
    return found


def render(
    comparisons: Sequence[MethodComparison],
    problems: Sequence[str] = (),
    tunings: Sequence[Tuned] = (),
    refresh: int | None = None,
) -> str:
    """Return the page of some comparisons.

    Args:
        comparisons: a section of the page for each.
        problems: messages about files that could not be read.
        tunings: results of tuning, from which strengths may come.
        refresh: seconds after which a browser loads the page again.
    """
    environment, markup = _templates()
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    most = max([len(comparison.lines) for comparison in comparisons], default=0)
    style += "\n".join(f".part:has(.switch{i}:not(:checked)) .s{i} {{ display: none; }}" for i in range(most))
    text: str = environment.get_template("page.html").render(
        sections=[_section(i, comparison, tunings) for i, comparison in enumerate(comparisons)],
        runs=sum(len(line.records) for comparison in comparisons for line in comparison.lines),
        problems=problems,
        refresh=refresh,
        style=markup(style),
        script=markup(script),
        policy=f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        strength=strength,
        draw=lambda chart: markup(svg.draw(chart)),
    )
    return text


def _templates() -> tuple[Any, Any]:
    """Return the environment of the templates, which escapes all text, and the type for text that is markup already."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise svg.missing("write pages", error) from None
    rules: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    rules["finalize"] = lambda value: clean(value) if type(value) is str else value  # markup is of another type
    return Environment(loader=FileSystemLoader(TEMPLATES), **rules), Markup


def _section(number: int, comparison: MethodComparison, tunings: Sequence[Tuned]) -> dict[str, Any]:
    """Return the variables of the template for one comparison."""
    columns = filled(comparison)
    how = [_how_chosen(line, comparison, tunings) for line in comparison.lines]
    return {
        "id": f"part{number}",
        "stream": comparison.stream,
        "facts": comparison.facts(),
        "about": comparison.describe(),
        "sentence": remarks.sentence(comparison),
        "remarks": remarks.remarks(comparison),
        "columns": columns,
        "best": [column.best(comparison) for column in columns],
        "strengths": comparison.has_strengths,
        "rows": list(zip(comparison.lines, names(comparison), charts.styles(comparison), how, strict=True)),
        "drawn": charts.drawn(comparison),
        "top": remarks.best(comparison),
        "charts": charts.charts(comparison),
        "scores": heatmaps.scores(comparison),
        "metric": comparison.metric,
        "layers": heatmaps.layers(comparison),
        "commands": reproduce.commands(comparison),
        "versions": reproduce.versions(comparison),
    }


def _how_chosen(line: Line, comparison: MethodComparison, tunings: Sequence[Tuned]) -> str:
    """Return how the strength of a line was chosen, as far as a folder tells; empty for methods without one."""
    if line.strength is None:
        return ""
    mine = (comparison.stream, line.method, line.strength, comparison.setting.get("training", {}).get("lr"))
    for found in tunings:
        if (found.stream, found.method, found.strength, found.lr) == mine:
            return f"tuned on the first {found.tasks} tasks, {len(found.trials)} trials"
    strengths = {other.strength for other in comparison.lines if other.method == line.method}
    return f"one of {len(strengths)} that were run" if len(strengths) > 1 else "given, or the default"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
