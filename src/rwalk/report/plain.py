"""Text for a terminal: without markup and control characters, in characters that its encoding has."""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from rwalk._errors import printable

LOOK_ALIKES = {
    "±": "+-", "×": "x", "−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "━": "-", "─": "-", "╺": "-", "╸": "-", "│": "|",
    "…": ".", "→": "->", "←": "<-", "↑": "^", "↓": "v", "·": ".", "•": "*", "“": '"', "”": '"', "‘": "'", "’": "'",
    "\u00a0": " ", "\u202f": " ", "≤": "<=", "≥": ">=", "µ": "u", "²": "2",
}  # fmt: skip
"""Replacements for characters that an encoding lacks; all others become a question mark."""


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded; Python calls this for streams whose handler of errors is "rwalk"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(LOOK_ALIKES.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("rwalk", _look_alike)


class Steady:
    """A stream that ignores all writes after one has failed, such as to a closed pipe; `failure` is the error.

    Args:
        stream: the stream behind it; None ignores all writes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, unless it has failed before."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless it has failed before."""
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self.stream is not None and self.failure is None:
            try:
                getattr(self.stream, method)(*arguments)
            except OSError as error:
                self.failure = error
                with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # Python flushes once more at exit
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def tolerant() -> Iterator[Steady]:
    """Let the standard streams replace characters that their encoding lacks, and never fail; yield standard output."""
    before = sys.stdout, sys.stderr
    streams = [(stream, stream.errors) for stream in before if isinstance(stream, io.TextIOWrapper)]
    for stream, _ in streams:
        _handle(stream, "rwalk")
    steady = Steady(sys.stdout)
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, steady)
    try:
        yield steady
    finally:
        sys.stdout = before[0]
        for stream, errors in streams:
            _handle(stream, errors)


def _handle(stream: io.TextIOWrapper, errors: str | None) -> None:
    with suppress(ValueError, OSError):  # closed, or redirected since it was opened
        stream.reconfigure(errors=errors)


def plain(value: Any, room: int = 60) -> str:
    """Return a value as one line: unprintable characters become question marks, and long text ends in dots."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = printable(text[: room + 1], keep="")
    return text if len(text) <= room else text[: room - 3] + "..."


def shown(console: Console, text: str, style: str = "") -> Text:
    """Return text as a console can show it, without markup; line breaks stay."""
    known = printable(text).encode(console.encoding, "rwalk").decode(console.encoding)
    return Text(known, style=style)


def print_plain(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is; only the terminal breaks it."""
    console.print(shown(console, plain(text, 100_000), style), soft_wrap=True)


def complain(problem: Any) -> None:
    """Print a problem to standard error."""
    print(f"rwalk: {printable(str(problem))}", file=sys.stderr)
