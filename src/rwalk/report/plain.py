"""What records hold as text for a terminal: in one line, of bounded length, and without characters that steer it."""

from typing import Any

from rich.console import Console


def plain(value: Any, room: int = 60) -> str:
    """Write a value of a record; what cannot be printed becomes a question mark, and what is too long ends in dots."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: room + 1])
    return text if len(text) <= room else text[: room - 3] + "..."


def say(console: Console, text: str) -> None:
    """Print text as it is: nothing in it is markup, and lines are broken by the terminal alone."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
