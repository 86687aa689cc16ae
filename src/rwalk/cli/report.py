"""The report and compare commands."""

import re
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from rwalk import report
from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.record import Record
from rwalk.cli.options import UNSET
from rwalk.report import terminal
from rwalk.report.charts import charts
from rwalk.report.drawing import KINDS
from rwalk.report.plain import complain, print_plain

REFRESH = 5
"""Seconds after which a browser loads the page again while runs are unfinished."""


@dataclass(frozen=True)
class Report:
    """Write all records in a folder as an HTML page and as Markdown, and print their tables.

    The first of these lines shows the folder that `rwalk run` writes if nothing is said, the second writes a page elsewhere:
      rwalk report --open
      rwalk report runs/mnist --out mnist.html
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER]")] = Path("runs")
    """Folder written by `rwalk run --out`."""
    out: Annotated[Path | None, UNSET, tyro.conf.DisallowNone] = None
    """The HTML file; the Markdown is written beside it. Default: report.html in the folder."""
    open: bool = False
    """Show it in a browser."""
    csv: bool = False
    """Also write a row for each record, and one for each of its scores, as report.csv and report-scores.csv beside the page."""
    latex: bool = False
    """Also write the tables for LaTeX, as report.tex beside the page."""
    figures: str = ""
    """Also write each chart as a file of these kinds, with commas between: svg, pdf, png."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Write the page of a folder, print its tables, and name files that are no records."""
        kinds = list(filter(None, self.figures.split(",")))
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"--figures {printable(unknown[0], '')} is no kind of file; pass some of {', '.join(KINDS)}.")
        records, problems = report.read(self.folder)
        _complain(problems)
        if records:
            try:
                place = report.write(self.folder, self.out, found=(records, problems))
            finally:
                report.show(report.summarise(records), console)
            for file in self._write_others(place, records, kinds):
                print_plain(console, f"Written: {file}")
            show_page(place, self.open, console)
        return 0

    def _write_others(self, place: Path, records: list[Record], kinds: list[str]) -> Iterator[Path]:
        """Write what was asked for beside the page, and yield each file."""
        comparisons = report.summarise(records)
        texts = {".csv": report.as_csv(records), "-scores.csv": report.as_csv(records, "scores")} if self.csv else {}
        texts |= {".tex": report.latex(comparisons)} if self.latex else {}
        for ending, text in texts.items():
            file = place.with_name(place.stem + ending)
            files.write(file, text.encode())
            yield file
        for number, comparison in enumerate(comparisons, start=1):
            for chart in charts(comparison) if kinds else ():
                words = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
                for kind in kinds:
                    yield report.Drawing(chart).save(place.with_name(f"{place.stem}-{number}-{words}.{kind}"))


@dataclass(frozen=True)
class Compare:
    """Print whether results differ beyond seed noise: of two sets of records, or of the methods in one.

    Methods of two sets are matched by their settings, as far as they go, and the settings that differ are printed, too. The
    methods of one set are compared with the best of them, or another. Runs are paired by their seeds.

    To find out what a setting does:
      rwalk run permuted-digits --methods rwalk --tasks 3 --out runs/none
      rwalk run permuted-digits --methods rwalk --tasks 3 --average tail --out runs/tail
      rwalk compare runs/none runs/tail
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A folder written by `rwalk run --out`, or the file of one record."""
    b: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[B]", help_behavior_hint="")] = None
    """Another one; without it the methods of the first are compared."""
    against: Annotated[str | None, UNSET, tyro.conf.DisallowNone] = None
    """For one folder: the method to compare with, such as finetune; default: the best of each stream."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Print the comparison."""
        if self.b is None:
            for ranking in report.between(_records(self.a), self.against):
                terminal.show_ranking(ranking, console)
            return 0
        if self.against is not None:
            raise ValueError("--against is for the methods of one folder. Leave it out, or the second folder.")
        sides = [_records(place) for place in (self.a, self.b)]
        terminal.show_contrast(report.compare(*sides), str(self.a), str(self.b), console)
        return 0


class LivePage:
    """The report of a folder, written anew as records come, and reloading itself. Writing takes at most a fifth of the time.

    Args:
        folder: where the records are; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.due = 0.0
        self.stale = False

    def changed(self) -> None:
        """Write the page, now or soon, as there is another record."""
        self.stale = True
        self.look()

    def look(self) -> None:
        """Write the page if it is time."""
        start = time.monotonic()
        if self.stale and start >= self.due:
            self._write(REFRESH)
            self.stale, now = False, time.monotonic()
            self.due = now + 4 * (now - start)

    def close(self) -> None:
        """Write the page as one that reloads no more, if there is one."""
        if self.stale or self.due:
            self._write(None)

    def _write(self, refresh: int | None) -> None:
        if self.folder is not None:
            with suppress(ValueError, OSError, ImportError):  # the last page raises what is wrong
                report.write(self.folder, refresh=refresh)


def show_page(place: Path, in_browser: bool, console: Console) -> None:
    """Print where a page is, and show it in a browser if asked to."""
    print_plain(console, f"Report: {place}")
    if in_browser:
        webbrowser.open(place.resolve().as_uri())


def _records(place: Path) -> list[Record]:
    """Return the records in a folder or a file, and name files that are none."""
    records, problems = ([Record.load(place)], []) if place.is_file() else report.read(place)
    _complain(problems)
    if not records:
        raise ValueError(printable(f"`{place}` has no record that can be read; name a folder of `rwalk run --out`."))
    return records


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        complain(problem)
