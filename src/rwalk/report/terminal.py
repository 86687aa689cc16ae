"""The report as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.report.summary import Comparison, Line, Spread

WIDE = 120
"""Characters from which all columns are shown; narrower terminals leave out transfer and stored examples."""


def show(comparisons: list[Comparison], console: Console) -> None:
    """Print one table for each comparison, with the settings that its numbers depend on."""
    for comparison in comparisons:
        console.print(f"\n[bold]{comparison.stream}[/bold]: {comparison.describe()}", highlight=False)
        console.print(_table(comparison, console.width >= WIDE))
    console.print(
        "Mean ± standard deviation over seeds; accuracies in %. Lower is better for forgetting, intransigence and time. "
        "step: CPU time of a step over that of finetune. state: bytes held over those of the model.",
        style="dim",
        highlight=False,
    )


def _table(comparison: Comparison, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    used = _varying(comparison)
    rows = [_cells(line, used[id(line)], wide) for line in comparison.lines]
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line, row in zip(comparison.lines, rows, strict=True):
        table.add_row(*row.values(), style=None if line.strength is None else "bold")
    return table


def _varying(comparison: Comparison) -> dict[int, str]:
    """Say which fields tell lines of the same method apart."""
    words = {}
    for line in comparison.lines:
        others = [o for o in comparison.lines if o.method == line.method and o.fields != line.fields]
        keys = [k for k in line.fields if any(o.fields.get(k) != line.fields[k] for o in others)]
        words[id(line)] = "".join(f"\n  {k}={line.fields[k]}" for k in keys)
    return words


def _cells(line: Line, fields: str, wide: bool) -> dict[str, str]:
    """Return the cells of a line under their headings."""
    cells = {
        "method": line.method + fields,
        "strength": "" if line.strength is None else f"{line.strength:g}",
        "seeds": str(len(line.seeds)),
        "accuracy": _number(line.average_accuracy, 100),
        "forgetting": _number(line.forgetting, 100),
        "intrans.": _number(line.intransigence, 100),
        "BWT": _number(line.backward_transfer, 100),
        "FWT": _number(line.forward_transfer, 100),
        "time s": _number(line.seconds, 1, digits=1, spread=False),
        "step": _number(line.step_ratio, 1, digits=2, spread=False),
        "state": _number(line.state, 1, digits=1, spread=False),
        "stored": "–" if line.stored_examples is None else f"{line.stored_examples.mean:.0f}",
    }
    return cells if wide else {key: value for key, value in cells.items() if key not in ("BWT", "FWT", "stored")}


def _number(value: Spread | None, factor: float, digits: int = 1, spread: bool = True) -> str:
    if value is None:
        return "–"
    text = f"{value.mean * factor:.{digits}f}"
    return f"{text} ± {value.deviation * factor:.{digits}f}" if spread and value.deviation is not None else text
