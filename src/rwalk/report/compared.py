"""Two sets of records side by side, as tables in a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.report.contrast import Contrast, Effect, Match
from rwalk.report.plain import plain, say, shown

WIDE = 76
"""Characters that the table of figures needs."""
NOTE = (
    "Mean ± standard deviation over seeds; accuracy and forgetting in %. Intervals are at 95 %, each for itself: where nothing "
    "differs, one in twenty leaves out 0 by chance. g: difference over the spread of seeds, Hedges' g_av (paired) or g* (not "
    "paired). Times compare only on one machine, equally busy."
)


def show(contrast: Contrast, a: str, b: str, console: Console) -> None:
    """Print what differs between A and B, and what has no partner; `a` and `b` say where they come from."""
    say(console, f"A: {plain(a, 200)}")
    say(console, f"B: {plain(b, 200)}")
    for match in contrast.matches:
        _match(match, console)
    for side, names in (("A", contrast.only_a), ("B", contrast.only_b)):
        if names:
            say(console, "")
            say(console, f"Only in {side}, with no partner: {', '.join(plain(name, 100) for name in names)}")
    if any(match.effects for match in contrast.matches):
        console.print(shown(console, f"\n{NOTE}", "dim"))


def _match(match: Match, console: Console) -> None:
    names = dict.fromkeys(plain(name, 100) for name in (match.a, match.b))
    console.print(shown(console, "\n" + " against ".join(names), "bold"))
    if match.differences:
        console.print(_settings(match, console))
    else:
        say(console, "No setting differs.")
    if not match.comparable:
        say(console, "Not comparable: the streams differ, so the figures mean different things.")
    elif match.effects:
        _figures(match.effects, console)
        for line in _verdicts(match.effects):
            say(console, line)
        say(console, _seeds(match))
    else:
        say(console, "No figure that both have.")


def _settings(match: Match, console: Console) -> Table:
    table = _grid("setting", "A", "B")
    for one in match.differences:
        table.add_row(*(shown(console, text) for text in (plain(one.setting), _values(one.a), _values(one.b))))
    return table


def _values(values: Iterable[Any]) -> str:
    return " | ".join(plain(value) for value in values) or "not recorded"


def _figures(effects: Sequence[Effect], console: Console) -> None:
    """Print a line for each figure, as a table where it fits."""
    rows = [_row(one) for one in effects]
    if console.width >= WIDE:
        table = _grid("", *rows[0])
        for column in table.columns[1:]:
            column.justify = "right"
        for one, row in zip(effects, rows, strict=True):
            table.add_row(one.figure, *(shown(console, cell) for cell in row.values()))
        console.print(table)
        return
    for one, row in zip(effects, rows, strict=True):
        console.print(shown(console, f"{one.figure}: " + ", ".join(f"{name} {value}" for name, value in row.items())))


def _row(one: Effect) -> dict[str, str]:
    factor, digits = (1, 2) if one.figure == "ms a step" else (100, 1)
    a, b = (_mean([factor * value for value in side], digits) for side in (one.a, one.b))
    interval = "-" if one.interval is None else " to ".join(f"{factor * end:+.2f}" for end in one.interval)
    g = "-" if one.effect is None else f"{one.effect:+.1f}"
    return {"A": a, "B": b, "B - A": f"{factor * one.difference:+.2f}", "interval": interval, "g": g}


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _verdicts(effects: Sequence[Effect]) -> Iterator[str]:
    """Say for each verdict which figures have it."""
    for verdict in dict.fromkeys(one.verdict for one in effects):
        yield f"{verdict[0].upper()}{verdict[1:]}: {', '.join(one.figure for one in effects if one.verdict == verdict)}."


def _seeds(match: Match) -> str:
    """Say which seeds were used, and which were not."""
    first = match.effects[0]
    words = f"Paired over seeds {_list(first.seeds[0])}"
    if not first.paired:
        words = f"Not paired: seeds {_list(first.seeds[0])} of A, {_list(first.seeds[1])} of B"
    left = [f"{_list(seeds)} of {side}" for side, seeds in zip("AB", match.alone, strict=True) if seeds]
    return words + (f"; left out: {', '.join(left)}." if first.paired and left else ".")


def _list(seeds: Sequence[int]) -> str:
    return plain(", ".join(map(str, seeds)), 40)


def _grid(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
