"""Records for other programs: rows for pandas and spreadsheets, tables for LaTeX and notebooks."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rwalk import _html
from rwalk.bench.record import Record
from rwalk.report.figures import table
from rwalk.report.names import clean
from rwalk.report.remarks import sentence
from rwalk.report.summary import MethodComparison, ratio

Rows = Literal["records", "scores"]
FIGURES = ("average", "forgetting", "backward_transfer", "forward_transfer", "kept", "learned", "final_bits", "neighbours")
"""Properties of a record that have a column of their own."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": r"$-$", "–": "--", "\u00a0": "~",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
"""Characters with a meaning in LaTeX, and those that its older engines lack."""


def rows(records: Iterable[Record], of: Rows = "records") -> list[dict[str, Any]]:
    """Return a dictionary for each record, or for each score of each record: scores as they are, not in percent."""
    if of == "scores":
        return [row for record in records for row in _scores(record)]
    return [_about(record) | {name: getattr(record, name) for name in FIGURES} | _costs(record) for record in records]


def frame(records: Iterable[Record], of: Rows = "records") -> Any:
    """Return records as a pandas `DataFrame`.

    Args:
        records: for example what `rwalk.report.read` returns.
        of: "records" for a row of figures for each record, or "scores" for a row for each score: method, seed, the task that
            was trained (`after`, its number from 1; 0 before training), the task that was evaluated, and the score.

    Raises:
        ImportError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"A data frame needs pandas ({error}). Run: pip install pandas") from None
    return pd.DataFrame(rows(records, of))


def as_csv(records: Iterable[Record], of: Rows = "records") -> str:
    """Return what `frame` holds as text with commas, headings first; a figure that is not defined is empty."""
    file, found = io.StringIO(), rows(records, of)
    writer = csv.DictWriter(file, list(found[0]) if found else [])
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def latex(comparisons: Sequence[MethodComparison]) -> str:
    """Return a LaTeX table for each comparison, the best of each column in bold."""
    return "\n".join(["% needs \\usepackage{booktabs}", *map(_tabular, comparisons)])


def html(comparisons: Sequence[MethodComparison]) -> str:
    """Return a table for each comparison, as notebooks show it."""
    parts = []
    for comparison in comparisons:
        head, cells, best = table(comparison)
        parts.append(_html.table(head, cells, f"{comparison.stream}: {sentence(comparison)}", best))
    return "".join(parts)


def _about(record: Record) -> dict[str, Any]:
    strength = record.config.get("strength")
    about = {"stream": record.stream, "method": record.method, "strength": strength, "seed": record.seed}
    return about | {"metric": record.metric}


def _costs(record: Record) -> dict[str, Any]:
    memory = record.memory
    return {
        "tasks": len(record.scores),
        "train_seconds": record.timings.get("train_seconds"),
        "step_ms": record.timings.get("step_ms"),
        "state_over_model": ratio(memory.get("state_bytes"), memory.get("model_bytes")),
        "stored_examples": memory.get("stored_examples"),
    }


def _scores(record: Record) -> list[dict[str, Any]]:
    about, names = _about(record), record.task_names
    matrix = [record.untrained, *record.scores]
    return [
        about | {"after": after, "task": names[j], "score": score}
        for after, row in enumerate(matrix)
        for j, score in enumerate(row)
        if score is not None
    ]


def _tabular(comparison: MethodComparison) -> str:
    head, cells, best = table(comparison)
    lines = [" & ".join(map(_escaped, head))]
    for row, bold in zip(cells, best, strict=True):
        texts = map(_escaped, row)
        lines.append(" & ".join(f"\\textbf{{{text}}}" if top else text for text, top in zip(texts, bold, strict=True)))
    columns = "l" + "r" * (len(head) - 1)
    parts = [f"% {_escaped(f'{comparison.stream}: {comparison.describe()}')}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    parts += [f"{lines[0]} \\\\", "\\midrule", *(f"{line} \\\\" for line in lines[1:]), "\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], clean(text))
