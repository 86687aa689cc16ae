"""How the strength of each method was chosen, as far as a folder tells."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rwalk.bench.tuned import SUFFIX, Tuned
from rwalk.report.summary import Line, MethodComparison


def chosen(folder: str | Path, comparisons: Sequence[MethodComparison]) -> list[list[str]]:
    """Return for each line of each comparison how its strength was chosen; empty for methods without one."""
    tunings = []
    for file in sorted(Path(folder).rglob(f"*{SUFFIX}")):
        with suppress(ValueError, OSError):  # `rwalk.report.read` names it
            tunings.append(Tuned.load(file, exact=True))
    return [[_how(line, comparison, tunings) for line in comparison.lines] for comparison in comparisons]


def _how(line: Line, comparison: MethodComparison, tunings: Sequence[Tuned]) -> str:
    if line.strength is None:
        return ""
    rate = comparison.setting.get("training", {}).get("lr")
    mine = (comparison.stream, line.method, line.strength, rate)
    for found in tunings:
        if (found.stream, found.method, found.strength, found.lr) == mine:
            return f"tuned on the first {found.tasks} tasks, {len(found.trials)} trials"
    strengths = {other.strength for other in comparison.lines if other.method == line.method}
    return f"one of {len(strengths)} that were run" if len(strengths) > 1 else "given, or the default"
