"""What `compare` has found, as tables in a terminal."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.report.compare import Contrast, Effect, Pair, comparable
from rwalk.report.plain import plain, print_plain, shown

WIDE = 76
"""Characters that the table of figures needs."""
NOTE = (
    "Mean ± standard deviation over common seeds; accuracy and forgetting in %. Each interval is at 95 % by itself: where "
    "nothing differs, one in twenty excludes 0 by chance. g: Hedges' g_av, the difference over the spread of seeds. Times "
    "compare only on one machine, equally busy."
)


def show(contrast: Contrast, a: str, b: str, console: Console) -> None:
    """Print what differs between A and B, and what has no partner; `a` and `b` name their sources."""
    print_plain(console, f"A: {plain(a, 200)}")
    print_plain(console, f"B: {plain(b, 200)}")
    for pair in contrast.pairs:
        _show_pair(pair, console)
    for side, names in (("A", contrast.only_a), ("B", contrast.only_b)):
        if names:
            print_plain(console, "")
            print_plain(console, f"Only in {side}, with no partner: {', '.join(plain(name, 100) for name in names)}")
    if any(pair.effects for pair in contrast.pairs):
        console.print(shown(console, f"\n{NOTE}", "dim"))


def _show_pair(pair: Pair, console: Console) -> None:
    names = dict.fromkeys(plain(name, 100) for name in (pair.a, pair.b))
    console.print(shown(console, "\n" + " against ".join(names), "bold"))
    if pair.differences:
        rows = [[plain(key), *map(_values, values)] for key, values in pair.differences.items()]
        console.print(_table(["setting", "A", "B"], rows, console))
    else:
        print_plain(console, "No setting differs.")
    if not comparable(pair.differences):
        print_plain(console, "Not comparable: the streams differ.")
    elif pair.effects:
        _show_effects(pair.effects, console)
        print_plain(console, f"Paired over seeds {plain(', '.join(map(str, pair.effects[0].seeds)))}.")
    else:
        print_plain(console, "No figure that both have for a common seed.")


def _values(values: Sequence[Any]) -> str:
    return " | ".join(plain(value) for value in values) or "not recorded"


def _show_effects(effects: Sequence[Effect], console: Console) -> None:
    """Print a line for each figure, as a table where it fits, and the figures of each verdict."""
    rows = [_cells(one) for one in effects]
    if console.width >= WIDE:
        console.print(
            _table(["", *rows[0]], [[e.figure, *row.values()] for e, row in zip(effects, rows, strict=True)], console)
        )
    else:
        for one, row in zip(effects, rows, strict=True):
            console.print(shown(console, f"{one.figure}: " + ", ".join(f"{name} {value}" for name, value in row.items())))
    for verdict in dict.fromkeys(one.verdict for one in effects):
        figures = ", ".join(one.figure for one in effects if one.verdict == verdict)
        print_plain(console, f"{verdict[0].upper()}{verdict[1:]}: {figures}.")


def _cells(one: Effect) -> dict[str, str]:
    factor, digits = (1, 2) if one.figure == "ms a step" else (100, 1)
    a, b = (_mean([factor * value for value in side], digits) for side in (one.a, one.b))
    interval = "-" if one.interval is None else " to ".join(f"{factor * end:+.2f}" for end in one.interval)
    g = "-" if one.g is None else f"{one.g:+.1f}"
    return {"A": a, "B": b, "B - A": f"{factor * one.difference:+.2f}", "interval": interval, "g": g}


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if place and headings[0] == "" else "left")
    for row in rows:
        table.add_row(*(shown(console, cell) for cell in row))
    return table
