"""The report as Markdown, for papers and pull requests: GitHub's tables."""

import re
from collections.abc import Sequence

from rwalk.report.figures import Column, filled, table
from rwalk.report.names import clean
from rwalk.report.remarks import remarks, sentence
from rwalk.report.summary import MethodComparison

SPECIAL = re.compile(r"(?P<code>`(?:--|rwalk )[a-z0-9 -]+`)|[\\`*_{}\[\]<>|#~&$]|^(?:[-+=]|[0-9]+(?=[.)]))")
"""Characters with a meaning in GitHub's Markdown, anywhere or at the start of a line; and options, which stay as they are."""


def markdown(comparisons: Sequence[MethodComparison]) -> str:
    """Write a section for each comparison: the result, the settings, the table of methods, and remarks."""
    return "\n\n".join(map(_section, comparisons)) + "\n"


def _section(comparison: MethodComparison) -> str:
    head, rows, best = table(comparison)
    cells = [[f"**{cell}**" if bold else cell for cell, bold in zip(*row, strict=True)] for row in zip(rows, best, strict=True)]
    named = [[_plain(name), *figures] for name, *figures in cells]
    lines = [[_plain(heading) for heading in head], ["---", *(["---:"] * (len(head) - 1))], *named]
    notes = "\n".join(f"- {_plain(remark.text)}" for remark in remarks(comparison))
    parts = [f"### {_plain(comparison.stream)}", _plain(sentence(comparison)), _plain(comparison.describe()),
             "\n".join(f"| {' | '.join(row)} |" for row in lines), _legend(filled(comparison)), notes]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _legend(columns: Sequence[Column]) -> str:
    words = _plain("; ".join(f"{column.name}: {column.about}" for column in columns))
    return f"Mean ± standard deviation over seeds; bold: the best and those within its deviation, without references. {words}."


def _plain(text: str) -> str:
    """Escape text, so that it is not read as Markdown or HTML."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found["code"] else f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"

    return SPECIAL.sub(escaped, clean(text).strip())
