"""How the strength of each method was chosen, as far as a folder tells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwalk import files
from rwalk.report.summary import Comparison, Line

TUNED = "*.tuned"
"""Files of `rwalk tune`."""


def chosen(folder: str | Path, comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Return for each line of each comparison how its strength was chosen; empty for methods without one."""
    tunings = [found for file in sorted(Path(folder).rglob(TUNED)) if (found := _read(file))]
    return [[_how(line, comparison, tunings) for line in comparison.lines] for comparison in comparisons]


def _read(file: Path) -> dict[str, Any]:
    """Return what tuning has written, or nothing of a file that is none of its."""
    try:
        content = files.parse(files.read(file))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("trials"), list) else {}


def _how(line: Line, comparison: Comparison, tunings: Sequence[dict[str, Any]]) -> str:
    if line.strength is None:
        return ""
    rate = comparison.setting.get("training", {}).get("lr")
    mine = {"stream": comparison.stream, "method": line.method, "strength": line.strength, "lr": rate}
    for found in tunings:
        if all(found.get(key) == value for key, value in mine.items()):
            return f"tuned on the first {found.get('tasks')} tasks, {len(found['trials'])} trials"
    strengths = {other.strength for other in comparison.lines if other.method == line.method}
    return f"one of {len(strengths)} that were run" if len(strengths) > 1 else "given, or the default"
