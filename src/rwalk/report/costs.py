"""What a run will cost, as tables in a terminal."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from rwalk import plan

SIZES = ("1M", "10M", "100M", "1B", "7B", "70B")
"""The rows of the table over sizes."""
NOTE = (
    "P: bytes of the parameters that a device updates. moved: read and written in its memory. A step is arithmetic at the rate "
    "times the utilisation, and what is moved at the bandwidth; left out are activations and what devices send each other."
)


def costs(setup: plan.Setup, machine: plan.Machine, console: Console) -> None:
    """Print the state, the traffic and the time of one setup."""
    weights, part = setup.weights, setup.part
    parts = "sharded over" if setup.sharded else "a copy on each of"
    where = f", {parts} {setup.devices} devices" if setup.devices > 1 else ""
    tensors = f" in {weights.tensors} tensors" if weights.tensors else ""
    console.print(f"{weights.number:,} parameters{tensors}{where}: P = {_gib(part.bytes)} GiB on a device", highlight=False)
    console.print(
        f"rule {setup.rule}, optimiser {setup.optimizer}, {setup.tokens} tokens or examples a step on a device", highlight=False
    )
    console.print()
    console.print(_state(setup), _moved(setup), _time(setup, machine))
    console.print(NOTE, style="dim", highlight=False)


def sizes(setup: Callable[[str], plan.Setup], machine: plan.Machine, console: Console) -> None:
    """Print one line for each size."""
    title = f"{machine.name}: a device, later tasks"
    table = _grid(title, "P GiB", "state P", "state GiB", "moved by us", "by optimiser", "plain ms", "with us", "ratio")
    for size in SIZES:
        one = setup(size)
        unit, held, moved = one.part.bytes, plan.state(one).device, plan.traffic(one).total
        plain, ours = plan.seconds(one, machine, ours=False).total, plan.seconds(one, machine).total
        optimizer = f"{plan.OPTIMIZERS[one.optimizer].moves} P"
        cells = (_gib(unit), f"{held / unit:.2f}", _gib(held), f"{moved / unit:.2f} P", optimizer)
        table.add_row(size, *cells, _ms(plain), _ms(ours), f"{ours / plain:.3f}")
    console.print(table)
    console.print(NOTE, style="dim", highlight=False)


def _state(setup: plan.Setup) -> Table:
    first, later = plan.state(setup, later=False), plan.state(setup)
    table = _grid("State for us on a device", "first task", "GiB", "later", "GiB")
    rows = {
        "the rule's columns": "rule",
        "anchor": "anchor",
        "average": "average",
        "together": "total",
        "of this on the host": "host",
    }
    for label, field in rows.items():
        values = getattr(first, field), getattr(later, field)
        if any(values):
            table.add_row(label, *(cell for value in values for cell in _both(value, setup)))
    own = (2 + plan.OPTIMIZERS[setup.optimizer].holds) * setup.part.bytes
    table.add_row("plain: weights, gradients, optimiser", *_both(own, setup), *_both(own, setup), style="dim")
    return table


def _moved(setup: plan.Setup) -> Table:
    ours = plan.traffic(setup)
    optimizer = plan.OPTIMIZERS[setup.optimizer].moves * setup.part.bytes
    table = _grid("Moved at a step of a later task", "P", "GiB")
    rows = {
        "are the gradients finite?": ours.check,
        "visit before the step": ours.visit,
        "visit after the step": ours.after,
        "whose moves they are": ours.rest,
        "us together": ours.total,
        "optimiser": optimizer,
        "us and optimiser": ours.total + optimizer,
        "also from the host": ours.link,
    }
    for label, value in rows.items():
        if value:
            table.add_row(label, *_both(value, setup))
    return table


def _time(setup: plan.Setup, machine: plan.Machine) -> Table:
    plain, whole = plan.seconds(setup, machine, ours=False), plan.seconds(setup, machine)
    table = _grid(f"A step of a later task on {machine.name}", "plain ms", "with us")
    labels = {"arithmetic": "compute", "weights, gradients, optimiser": "memory", "overhead": "overhead", "us": "ours"}
    for label, field in labels.items():
        if getattr(whole, field):
            table.add_row(label, _ms(getattr(plain, field)), _ms(getattr(whole, field)))
    table.add_row("together", _ms(plain.total), _ms(whole.total), style="bold")
    table.add_row("ratio", "1", f"{whole.total / plain.total:.3f}")
    table.add_row("our share of the step", "", f"{1 - plain.total / whole.total:.1%}")
    return table


def _grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _both(value: float, setup: plan.Setup) -> tuple[str, str]:
    return f"{value / setup.part.bytes:.2f} P", _gib(value)


def _gib(value: float) -> str:
    gib = value / 2**30
    return f"{gib:.2f}" if gib >= 1 or not gib else f"{gib:.4f}"


def _ms(value: float) -> str:
    return f"{1e3 * value:.4g}"
