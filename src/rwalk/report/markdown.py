"""The report as Markdown, for papers and pull requests: GitHub's tables."""

import re
from collections.abc import Sequence

from rwalk.report.figures import Column, filled
from rwalk.report.names import clean, names
from rwalk.report.remarks import remarks, sentence
from rwalk.report.summary import Line, MethodComparison

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~&$])|^([-+=]|[0-9]+(?=[.)]))")
"""Characters with a meaning in GitHub's Markdown, anywhere or at the start of a line."""


def markdown(comparisons: Sequence[MethodComparison]) -> str:
    """Write a section for each comparison: the result, the settings, the table of methods, and remarks."""
    return "\n\n".join(map(_section, comparisons)) + "\n"


def _section(comparison: MethodComparison) -> str:
    columns = filled(comparison)
    head = ["method", "seeds", *(_plain(column.name) for column in columns)]
    best = [column.best(comparison) for column in columns]
    rows = [
        [
            _plain(name),
            str(len(line.seeds)),
            *(_cell(column, line, i in top) for column, top in zip(columns, best, strict=True)),
        ]
        for i, (line, name) in enumerate(zip(comparison.lines, names(comparison), strict=True))
    ]
    table = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    notes = "\n".join(f"- {_plain(remark.text)}" for remark in remarks(comparison))
    parts = [f"### {_plain(comparison.stream)}", _plain(sentence(comparison)), _plain(comparison.describe()),
             "\n".join(f"| {' | '.join(row)} |" for row in table), _legend(columns), notes]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _cell(column: Column, line: Line, best: bool) -> str:
    return f"**{column.text(line)}**" if best else column.text(line)


def _legend(columns: Sequence[Column]) -> str:
    words = _plain("; ".join(f"{column.name}: {column.about}" for column in columns))
    return f"Mean ± standard deviation over seeds; bold: the best and those within its deviation, without references. {words}."


def _plain(text: str) -> str:
    """Escape text, so that it is not read as Markdown or HTML."""

    def escaped(found: re.Match[str]) -> str:
        return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"

    return SPECIAL.sub(escaped, clean(text).strip())
