"""What tuning has tried and chosen, as a table in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk.bench.tuned import Tuned
from rwalk.report.plain import plain, print_plain, shown


def show(chosen: Tuned, command: str, console: Console) -> None:
    """Print all trials, the chosen one, and the command that runs it."""
    tasks = f"{plain(chosen.stream, 200)}, first {chosen.tasks} tasks"
    about = f" on {tasks}, accuracy in % on training examples that were held out"
    console.print()
    console.print(shown(console, plain(chosen.method, 200), "bold").append_text(shown(console, about, "not bold")))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("strength", "lr", "accuracy", "by seed"):
        table.add_column(heading, justify="right")
    for trial in chosen.trials:
        best = (trial["strength"], trial["lr"]) == (chosen.strength, chosen.lr)
        by_seed = ", ".join(_percent(a) for a in trial["seeds"].values())
        cells = f"{trial['strength']:.6g}", f"{trial['lr']:.6g}", _percent(trial["accuracy"]), by_seed
        table.add_row(*cells, style="bold" if best else None)
    console.print(table)
    print_plain(console, f"Chosen: strength {chosen.strength:.6g}, learning rate {chosen.lr:.6g}.")
    for name in chosen.edge:
        print_plain(console, f"This {name} lies at an end of what was tried: try further ones.")
    print_plain(console, f"Run: {command}")


def _percent(accuracy: float | None) -> str:
    return "failed" if accuracy is None else f"{100 * accuracy:.1f}"
