"""Text for a terminal: without markup and without characters that steer it, in what its encoding has."""

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
"""What is written where an encoding lacks a character; a question mark for all others."""


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded; Python calls this for streams whose handler of errors is "rwalk"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(LOOK_ALIKES.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("rwalk", _look_alike)


class Steady:
    """A stream that is silent once writing to it has failed, as when nobody reads on; `failure` says how.

    Args:
        stream: where it writes to; None is silent from the start.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Be like the stream in all else."""
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
                with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # for what Python flushes as it ends
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def tolerant() -> Iterator[Steady]:
    """Let the standard streams write look-alikes of what their encoding lacks, and not fail; yield what is printed to."""
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
    with suppress(ValueError, OSError):  # closed, or led elsewhere since it was opened
        stream.reconfigure(errors=errors)


def plain(value: Any, room: int = 60) -> str:
    """Write a value in one line; what cannot be printed becomes a question mark, and what is too long ends in dots."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = printable(text[: room + 1], keep="")
    return text if len(text) <= room else text[: room - 3] + "..."


def shown(console: Console, text: str, style: str = "") -> Text:
    """Return text as a console can show it: nothing in it is markup; lines stay lines."""
    known = printable(text).encode(console.encoding, "rwalk").decode(console.encoding)
    return Text(known, style=style)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is, broken by the terminal alone."""
    console.print(shown(console, plain(text, 100_000), style), soft_wrap=True)


def complain(problem: Any) -> None:
    """Print what is wrong to the other stream."""
    print(f"rwalk: {printable(str(problem))}", file=sys.stderr)
