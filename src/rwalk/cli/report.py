"""The report and compare commands."""

import time
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from rwalk import report
from rwalk._errors import printable
from rwalk.bench.record import Record
from rwalk.report import terminal
from rwalk.report.plain import complain, print_plain

REFRESH = 5
"""Seconds after which a browser loads the page again while runs are unfinished."""


@dataclass(frozen=True)
class Report:
    """Write all records in a folder as an HTML page and as Markdown, and print their tables."""

    folder: tyro.conf.Positional[Path]
    """Folder written by `rwalk run --out`."""
    out: Path | None = None
    """The HTML file; the Markdown is written beside it. Default: report.html in the folder."""
    open: bool = False
    """Show it in a browser."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Write the page of a folder, print its tables, and name files that are no records."""
        records, problems = report.read(self.folder)
        _complain(problems)
        if records:
            try:
                place = report.write(self.folder, self.out, found=(records, problems))
            finally:
                report.show(report.summarise(records), console)
            show_page(place, self.open, console)
        return 0


@dataclass(frozen=True)
class Compare:
    """Print in which settings two sets of records differ, and whether their results differ beyond seed noise.

    Methods are matched by their settings, as far as they go; runs are paired by their seeds if three or more are common.
    """

    a: tyro.conf.Positional[Path]
    """A folder written by `rwalk run --out`, or the file of one record."""
    b: tyro.conf.Positional[Path]
    """Another one."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Print the comparison."""
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
