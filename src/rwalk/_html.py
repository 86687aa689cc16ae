"""Tables for notebooks, where all text is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from rwalk._errors import printable


def table(
    headings: Iterable[str], rows: Iterable[Sequence[str]], caption: str = "", bold: Iterable[Sequence[bool]] = ()
) -> str:
    """Return an HTML table; the first cell of each row is its heading, and `bold` marks cells.

    A caption stands in a figure above it, as wide as the page: a table's own is as narrow as the table.
    """
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    marks = [*bold]
    body = "".join(_row(row, marks[place] if marks else ()) for place, row in enumerate(rows))
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<figure style="margin: 0"><figcaption>{_text(caption)}</figcaption>{whole}</figure>' if caption else whole


def _row(cells: Sequence[str], bold: Sequence[bool]) -> str:
    texts = [f"<b>{_text(cell)}</b>" if place < len(bold) and bold[place] else _text(cell) for place, cell in enumerate(cells)]
    figures = "".join(f'<td style="white-space: nowrap">{text}</td>' for text in texts[1:])
    return f'<tr><th scope="row">{texts[0]}</th>{figures}</tr>'


def _text(text: str) -> str:
    return escape(printable(str(text), ""))
