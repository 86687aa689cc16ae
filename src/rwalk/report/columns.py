"""The figures that every table of methods shows, for terminals, pages and Markdown alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rwalk.report.summary import REFERENCES, Comparison, Line, Spread


@dataclass(frozen=True)
class Column:
    """One figure of a line.

    Args:
        name: its heading.
        about: what it is, in a sentence.
        value: where it is in a line.
        short: its heading in a terminal; without one it is not shown there.
        factor: what it is multiplied with to be shown, 100 for percent.
        digits: decimals.
        deviation: whether the deviation over seeds is shown.
        better: which of several is the best, for figures of how well a method learns.
    """

    name: str
    about: str
    value: Callable[[Line], Spread | None]
    short: str = ""
    factor: float = 1
    digits: int = 1
    deviation: bool = True
    better: Literal["higher", "lower"] | None = None

    def text(self, line: Line) -> str:
        """Write the figure of a line."""
        return write(self.value(line), self.factor, self.digits, self.deviation)

    def best(self, comparison: Comparison) -> set[int]:
        """Return the places of the best line, and of those within its deviation; none where that tells nothing apart."""
        lines = enumerate(comparison.lines)
        values = {i: value for i, line in lines if line.method not in REFERENCES and (value := self.value(line))}
        if self.better is None or not values:
            return set()
        sign = 1 if self.better == "higher" else -1
        best = max(values.values(), key=lambda value: sign * value.mean)
        near = {i for i, value in values.items() if abs(value.mean - best.mean) <= (best.deviation or 0.0)}
        return near if len(near) < len(values) else set()


COLUMNS = (
    Column("Average accuracy", "over all tasks after the last one, %", lambda line: line.average_accuracy, "accuracy", 100,
           better="higher"),
    Column("Kept", "share of the best accuracies on earlier tasks that is left in the end, %", lambda line: line.kept, "", 100,
           better="higher"),
    Column("Forgetting", "accuracy lost on earlier tasks since their best, points", lambda line: line.forgetting, "forgetting",
           100, better="lower"),
    Column("Intransigence", "what joint training reaches on the last task and this does not, points",
           lambda line: line.intransigence, "intrans.", 100, better="lower"),
    Column("BWT", "backward transfer: change on earlier tasks since they were learned, points",
           lambda line: line.backward_transfer, "BWT", 100, better="higher"),
    Column("FWT", "forward transfer: gain on later tasks before they are learned, points",
           lambda line: line.forward_transfer, "FWT", 100, better="higher"),
    Column("Bits", "per character, over all tasks after the last one", lambda line: line.bits, "", digits=3, better="lower"),
    Column("Training,\u00a0s", "seconds of training in a run", lambda line: line.seconds, "time s", deviation=False),
    Column("Step time", "CPU time of a step over that of fine-tuning", lambda line: line.step_ratio, "step", digits=2,
           deviation=False),
    Column("State,\u00a0P", "bytes held beside the model, over those of its parameters (P)", lambda line: line.state, "state",
           deviation=False),
    Column("Stored examples", "of earlier tasks", lambda line: line.stored_examples, "stored", digits=0, deviation=False),
)  # fmt: skip


def contenders(comparison: Comparison) -> list[Line]:
    """Return the lines that learn one task after another; those that train on all data are references."""
    return [line for line in comparison.lines if line.method not in REFERENCES]


def tops(comparison: Comparison) -> set[int]:
    """Return the place of each method's best line."""
    top: dict[str, tuple[float, int]] = {}
    for i, line in enumerate(comparison.lines):
        accuracy = line.average_accuracy.mean if line.average_accuracy else -1.0
        top[line.method] = max(top.get(line.method, (-1.0, i)), (accuracy, i))
    return {i for _, i in top.values()}


def shown(lines: Sequence[Line]) -> list[Column]:
    """Return the columns that have a figure in some line."""
    return [column for column in COLUMNS if any(column.value(line) for line in lines)]


def write(value: Spread | None, factor: float = 1, digits: int = 1, deviation: bool = True) -> str:
    """Write a mean, with its deviation over seeds where there is one."""
    if value is None:
        return "–"
    text = _number(value.mean * factor, digits)
    return f"{text} ± {_number(value.deviation * factor, digits)}" if deviation and value.deviation is not None else text


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")
