"""Tables for notebooks, where all text is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from rwalk._errors import printable


def table(
    headings: Iterable[str], rows: Iterable[Sequence[str]], caption: str = "", bold: Iterable[Sequence[bool]] = ()
) -> str:
    """Return an HTML table; the first cell of each row is its heading, and `bold` marks cells."""
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    marks = [*bold]
    body = "".join(_row(row, marks[place] if marks else ()) for place, row in enumerate(rows))
    above = f'<caption style="text-align: left">{_text(caption)}</caption>' if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(cells: Sequence[str], bold: Sequence[bool]) -> str:
    texts = [f"<b>{_text(cell)}</b>" if place < len(bold) and bold[place] else _text(cell) for place, cell in enumerate(cells)]
    return f'<tr><th scope="row">{texts[0]}</th>{"".join(f"<td>{text}</td>" for text in texts[1:])}</tr>'


def _text(text: str) -> str:
    return escape(printable(str(text), ""))
