"""A record of benchmarks as tables in a terminal, targets beside figures."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.models import CASES

NOTE = """\
ms: {clock} of a training step, median over rounds of {steps} steps on one thread. ratio: to the plain step of the same time
round, median and quartiles. to Naive: to Avalanche's own loop without a plugin. Every method is in its second task and pulls,
unless it says how many tasks lie behind."""

MEMORY_NOTE = """\
In units of P, the bytes of the parameters, above the same loop without the method, each in a fresh process. state: what the
method says it holds. tensors: all live tensors. resident: memory of the process. peak: highest memory of the process, while
training in the second task and at that task's end."""


def show(record: dict[str, Any], console: Console) -> None:
    """Print everything that a record holds."""
    settings = [(row["model"], row["optimizer"]) for row in record["speed"]]
    gpu = record["machine"].get("gpu")
    clock = f"time on {gpu}, waited for," if gpu else "CPU time"
    for name, optimizer in dict.fromkeys(settings):
        rows = [row for row, at in zip(record["speed"], settings, strict=True) if at == (name, optimizer)]
        console.print(speed(f"{CASES[name].about}, {optimizer}", rows))
    if record["speed"]:
        note = NOTE.format(steps=record["settings"]["steps_per_round"], clock=clock)
        console.print(flowing(note), style="dim", highlight=False)
    if record["memory"]:
        console.print(memory(record["memory"]))
        console.print(flowing(MEMORY_NOTE), style="dim", highlight=False)
    for reason in record["left_out"]:
        console.print(f"Left out: {reason}.", style="yellow", highlight=False)
    machine = record["machine"]
    console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}; {record['date']}", style="dim")


def flowing(text: str) -> str:
    """Leave the breaks of lines to the terminal."""
    return text.replace("\n", " ")


def speed(title: str, rows: list[dict[str, Any]]) -> Table:
    table = grid(title, "ms", "ratio", "quartiles", "target", "to Naive", "rounds")
    for row in rows:
        low, middle, high = row["ratio"]
        naive = f"{row['ratio_to_base'][1]:.2f}" if row["base"] != "plain" else ""
        figures = f"{row['ms'][1]:.2f}", f"{middle:.2f}", f"{low:.2f}–{high:.2f}"
        table.add_row(row["about"], *figures, target(row, middle), naive, str(row["rounds"]))
    return table


def memory(rows: list[dict[str, Any]]) -> Table:
    unit = rows[0]["parameter_bytes"] / 1e6
    about = CASES[rows[0]["model"]].about
    table = grid(
        f"Memory: {about}, P = {unit:.0f} MB, adam", "state", "tensors", "resident", "peak training", "target", "peak at end"
    )
    for row in rows:
        state = "–" if row["state"] is None else f"{row['state']:.2f}"
        cells = [f"{row[key]:.2f}" for key in ("tensors", "resident", "peak_training", "peak_task_end")]
        table.add_row(row["about"], state, *cells[:3], target(row, row["peak_training"]), cells[3])
    return table


def grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def target(row: dict[str, Any], value: float) -> str:
    if row["target"] is None:
        return ""
    return f"[{'green' if value <= row['target'] else 'red'}]{row['target']}[/]"
