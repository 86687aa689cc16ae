"""Commands about records that are there: `rwalk report`, `rwalk watch` and `rwalk compare`, typed and done."""

import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from rwalk import report
from rwalk._errors import explain
from rwalk.bench.record import Record
from rwalk.report import compared, watch
from rwalk.report.plain import complain, say


@dataclass(frozen=True)
class Report:
    """Write all records in a folder as an HTML page and as Markdown, and print their tables."""

    folder: tyro.conf.Positional[Path]
    """Folder written by `rwalk run --out`."""
    out: Path | None = None
    """The HTML file; the Markdown is written beside it. Default: report.html in the folder."""
    open: bool = False
    """Show it in a browser."""


@dataclass(frozen=True)
class Watch:
    """Write the report of a folder anew whenever its records change, while runs go on; the page reloads itself.

    Ends with Ctrl-C, and status 0. Waits for a folder that is not there yet.
    """

    folder: tyro.conf.Positional[Path]
    """Folder that `rwalk run --out` writes."""
    every: float = 5.0
    """Seconds between two looks at the folder."""
    out: Path | None = None
    """The HTML file; the Markdown is written beside it. Default: report.html in the folder."""
    open: bool = False
    """Show it in a browser, once there is one."""


@dataclass(frozen=True)
class Compare:
    """Say in what settings two sets of records differ, and whether their results differ beyond seed noise.

    Methods are matched by their settings, as far as they go; runs are paired by their seeds if three or more are common.
    """

    a: tyro.conf.Positional[Path]
    """A folder written by `rwalk run --out`, or the file of one record."""
    b: tyro.conf.Positional[Path]
    """Another one."""


NAMES = {"report", "watch", "compare"}
COMMANDS: Any = (
    Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Watch, tyro.conf.subcommand("watch")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def parsed(words: Sequence[str]) -> Any:
    """Return the command that words say, as one of the classes above; exit with a message where they say none."""
    return tyro.cli(COMMANDS, prog="rwalk", description=__doc__, args=words)


def do(command: Any, console: Console) -> int:
    """Do one of these commands, and return the exit status."""
    if isinstance(command, Watch):
        _watch(command, console)
    elif isinstance(command, Compare):
        sides = [_records(place) for place in (command.a, command.b)]
        compared.show(report.compare(*sides), str(command.a), str(command.b), console)
    else:
        _report(command, console)
    return 0


def _report(command: Report, console: Console) -> None:
    """Write the page of a folder, print its tables, and name files that are no records."""
    records, problems = report.read(command.folder)
    _complain(problems)
    if records:
        try:
            place = report.write(command.folder, command.out, found=(records, problems))
        finally:
            report.show(report.summarise(records), console)
        show_page(place, command.open, console)


def show_page(place: Path, in_browser: bool, console: Console) -> None:
    """Say where a page is, and show it in a browser if asked to."""
    say(console, f"Report: {place}")
    if in_browser:
        webbrowser.open(place.resolve().as_uri())


def _records(place: Path) -> list[Record]:
    """Return the records in a folder or a file, and name files that are none."""
    records, problems = ([Record.load(place)], []) if place.is_file() else report.read(place)
    _complain(problems)
    if not records:
        raise ValueError(explain(f"`{place}` without a record that can be read", "a folder of `rwalk run --out`", "Run again."))
    return records


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        complain(problem)


def _watch(command: Watch, console: Console) -> None:
    """Write the page anew at each change, and say so, until Ctrl-C; then write it as one that is finished."""
    if not 0.1 <= command.every <= 86400:
        raise ValueError(explain(f"--every {command.every}", "0.1 to 86400 seconds", "Pass such a number."))
    if command.folder.is_file():
        raise ValueError(explain(f"`{command.folder}`, which is a file", "a folder", "Name the folder of `rwalk run --out`."))
    say(console, f"Watching {command.folder}. Ctrl-C ends it.")
    seen, opened, named = False, False, set[str]()
    try:
        for found in watch.news(command.folder, command.every):
            seen = seen or bool(found.records)  # before a page is written: Ctrl-C may come at any moment
            place = _written(command, max(1, round(command.every))) if found.records and found.changed else None
            say(console, f"{time.strftime('%H:%M:%S')}  {found}" + (f"; wrote {place}" if place else ""))
            _complain([problem for problem in found.broken if problem not in named])
            named.update(found.broken)
            if command.open and place and not opened:
                webbrowser.open(place.resolve().as_uri())
                opened = True
    except KeyboardInterrupt:
        place = _written(command, None) if seen else None
        say(console, "No longer watching." + (f" Report: {place}" if place else ""))


def _written(command: Watch, refresh: int | None) -> Path | None:
    """Write the page; what is wrong with a file now may be right at the next change."""
    try:
        return report.write(command.folder, command.out, refresh)
    except (ValueError, OSError) as error:
        _complain([str(error)])
        return None
