"""The report as tables in a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.report.figures import COLUMNS
from rwalk.report.plain import plain, shown
from rwalk.report.remarks import single_labels
from rwalk.report.summary import Line, MethodComparison

WIDE = 120
"""Width from which all columns are shown; narrower terminals leave out those marked `wide`."""
NAME = 200
"""Characters of a name that are shown at most."""
NOTE = (
    "Mean ± standard deviation over seeds; accuracies in %. Lower is better for forgetting, intransigence and time. "
    "step: CPU time of a step over that of finetune. state: bytes held over those of the model."
)


def show(comparisons: list[MethodComparison], console: Console) -> None:
    """Print a table for each comparison, with the settings that its numbers depend on."""
    for comparison in comparisons:
        console.print()
        settings = plain(f": {comparison.describe()}", 10 * NAME)
        console.print(shown(console, plain(comparison.stream, NAME), "bold").append_text(shown(console, settings, "not bold")))
        console.print(_table(comparison, console))
        for remark in single_labels(comparison):
            console.print(shown(console, remark))
    console.print(shown(console, NOTE, "dim"))


def _table(comparison: MethodComparison, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    rows = [_cells(line, comparison.varying(line), console.width >= WIDE) for line in comparison.lines]
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line, row in zip(comparison.lines, rows, strict=True):
        table.add_row(*(shown(console, cell) for cell in row.values()), style=None if line.strength is None else "bold")
    return table


def _cells(line: Line, fields: dict[str, Any], wide: bool) -> dict[str, str]:
    """Return the cells of a line under their headings."""
    about = {
        "method": "\n  ".join([plain(line.method, NAME), *(plain(f"{key}={value}", NAME) for key, value in fields.items())]),
        "strength": "" if line.strength is None else f"{line.strength:g}",
        "seeds": str(len(line.seeds)),
    }
    return about | {column.short: column.text(line) for column in COLUMNS if column.short and (wide or not column.wide)}
