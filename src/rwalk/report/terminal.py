"""Tables in a terminal: the methods of a report, what `compare` has found, and what tuning has tried."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.bench.record import ACCURACY
from rwalk.bench.tuned import Tuned
from rwalk.report.between import Ranking
from rwalk.report.compare import Contrast, Effect, Pair, comparable
from rwalk.report.figures import columns
from rwalk.report.metric import decimals
from rwalk.report.plain import plain, print_plain, shown
from rwalk.report.remarks import single_labels
from rwalk.report.summary import Line, MethodComparison

WIDE = 120
"""Width from which all columns are shown; narrower terminals leave out those marked `wide`."""
WIDE_EFFECTS = 76
"""Characters that the table of a comparison's figures needs."""
NAME = 200
"""Characters of a name that are shown at most."""
NOTE = (
    "Mean ± standard deviation over seeds; accuracies in %. Lower is better for errors, forgetting, intransigence and time. "
    "step: CPU time of a step over that of finetune. state: bytes held over those of the model."
)
NOTE_EFFECTS = (
    "Mean ± standard deviation over common seeds; accuracy and forgetting in %. Each interval is at 95 % by itself: where "
    "nothing differs, one in twenty excludes 0 by chance. g: Hedges' g_av, the difference over the spread of seeds. Times "
    "compare only on one machine, equally busy."
)


NOTE_RANKING = (
    "Mean ± standard deviation and differences over common seeds. Each interval is at 95 % by itself. p: paired t-test, "
    "adjusted for the number of methods (Holm), so that all verdicts together hold at 95 %."
)


def show(comparisons: list[MethodComparison], console: Console) -> None:
    """Print a table for each comparison, with the settings that its numbers depend on."""
    for comparison in comparisons:
        _show_heading(comparison.stream, plain(f": {comparison.describe()}", 10 * NAME), console)
        lines = comparison.lines
        rows = [_cells(line, comparison, console.width >= WIDE) for line in lines]
        bold = [line.strength is not None for line in lines]
        _show_table(rows[0], [row.values() for row in rows], console, bold=bold, space=0)
        for remark in single_labels(comparison):
            console.print(shown(console, remark))
    console.print(shown(console, NOTE, "dim"))


def _cells(line: Line, comparison: MethodComparison, wide: bool) -> dict[str, str]:
    """Return the cells of a line under their headings."""
    fields = comparison.varying(line)
    about = {
        "method": "\n  ".join([plain(line.method, NAME), *(plain(f"{key}={value}", NAME) for key, value in fields.items())]),
        "strength": "" if line.strength is None else f"{line.strength:g}",
        "seeds": str(len(line.seeds)),
    }
    shown = [column for column in columns(comparison) if column.short and (wide or not column.wide)]
    return about | {plain(column.short): column.text(line) for column in shown}


def show_contrast(contrast: Contrast, a: str, b: str, console: Console) -> None:
    """Print what differs between A and B, and what has no partner; `a` and `b` name their sources."""
    print_plain(console, f"A: {plain(a, NAME)}")
    print_plain(console, f"B: {plain(b, NAME)}")
    for pair in contrast.pairs:
        _show_pair(pair, console)
    for side, names in (("A", contrast.only_a), ("B", contrast.only_b)):
        if names:
            print_plain(console, "")
            print_plain(console, f"Only in {side}, with no partner: {', '.join(plain(name, 100) for name in names)}")
    if any(pair.effects for pair in contrast.pairs):
        console.print(shown(console, f"\n{NOTE_EFFECTS}", "dim"))


def _show_pair(pair: Pair, console: Console) -> None:
    names = dict.fromkeys(plain(name, 100) for name in (pair.a, pair.b))
    console.print(shown(console, "\n" + " against ".join(names), "bold"))
    if pair.differences:
        rows = [[plain(key), *map(_values, values)] for key, values in pair.differences.items()]
        _show_table(["setting", "A", "B"], rows, console, figures="left")
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
    rows = {one.figure: _effect(one) for one in effects}
    if console.width >= WIDE_EFFECTS:
        _show_table(["", *rows[effects[0].figure]], [[figure, *row.values()] for figure, row in rows.items()], console)
    else:
        for figure, row in rows.items():
            console.print(shown(console, f"{figure}: " + ", ".join(f"{name} {value}" for name, value in row.items())))
    for verdict in dict.fromkeys(one.verdict for one in effects):
        figures = ", ".join(one.figure for one in effects if one.verdict == verdict)
        print_plain(console, f"{verdict[0].upper()}{verdict[1:]}: {figures}.")


def _effect(one: Effect) -> dict[str, str]:
    factor, digits = (100, 1) if one.percent else (1, decimals((*one.a, *one.b)))
    a, b = (_mean([factor * value for value in side], digits) for side in (one.a, one.b))
    interval = "-" if one.interval is None else " to ".join(f"{factor * end:+.{digits + 1}f}" for end in one.interval)
    g = "-" if one.g is None else f"{one.g:+.1f}"
    return {"A": a, "B": b, "B - A": f"{factor * one.difference:+.{digits + 1}f}", "interval": interval, "g": g}


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def show_ranking(ranking: Ranking, console: Console) -> None:
    """Print how the methods of a stream differ from one of them."""
    _show_heading(ranking.stream, plain(f": {ranking.about}", 10 * NAME), console)
    metric = ranking.metric
    what = f"average {metric.name}{', %' if metric.percent else ''}, {metric.better} is better"
    print_plain(console, f"{plain(ranking.reference, NAME)} against the others ({plain(what, NAME)}):")
    rows = []
    for rival in ranking.rivals:
        cells = _effect(rival.effect)
        p = "-" if rival.p is None else f"{rival.p:.4f}" if rival.p >= 0.0001 else "<.0001"
        rows.append([plain(rival.name, NAME), cells["B"], cells["B - A"], cells["interval"], p, rival.verdict])
    if not rows:
        print_plain(console, "No other method has scores for a common seed.")
        return
    _show_table(["method", "mean", "difference", "interval", "p", ""], rows, console)
    console.print(shown(console, NOTE_RANKING, "dim"))


def show_tuned(chosen: Tuned, command: str, console: Console) -> None:
    """Print all trials, the chosen one, and the command that runs it."""
    tasks = f"{plain(chosen.stream, NAME)}, first {chosen.tasks} tasks"
    unit = " in %" if chosen.metric == ACCURACY else ""
    _show_heading(chosen.method, f" on {tasks}, {chosen.metric}{unit} on training examples that were held out", console)
    rows = [
        [f"{trial['strength']:.6g}", f"{trial['lr']:.6g}", _score(trial["accuracy"], chosen.metric),
         ", ".join(_score(score, chosen.metric) for score in trial["seeds"].values())]
        for trial in chosen.trials
    ]  # fmt: skip
    bold = [(trial["strength"], trial["lr"]) == (chosen.strength, chosen.lr) for trial in chosen.trials]
    _show_table(["strength", "lr", chosen.metric, "by seed"], rows, console, bold=bold, space=2)
    print_plain(console, f"Chosen: strength {chosen.strength:.6g}, learning rate {chosen.lr:.6g}.")
    for name in chosen.edge:
        print_plain(console, f"This {name} lies at an end of what was tried: try further ones.")
    print_plain(console, f"Run: {command}")


def _score(score: float | None, metric: str) -> str:
    return "failed" if score is None else f"{100 * score:.1f}" if metric == ACCURACY else f"{score:.3f}"


def _show_heading(name: str, about: str, console: Console) -> None:
    console.print()
    console.print(shown(console, plain(name, NAME), "bold").append_text(shown(console, about, "not bold")))


def _show_table(
    headings: Iterable[str],
    rows: Sequence[Iterable[str]],
    console: Console,
    *,
    figures: Literal["left", "right"] = "right",
    bold: Sequence[bool] = (),
    space: int = 1,
) -> None:
    """Print a table whose first column is to the left; `space` is that between columns, and `bold` is for rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, space), pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify=figures if place else "left")
    for place, row in enumerate(rows):
        table.add_row(*(shown(console, cell) for cell in row), style="bold" if bold and bold[place] else None)
    console.print(table)
