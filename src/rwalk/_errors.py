"""Messages: text from outside must not control a terminal, and a warning names the line of the user's that led to it."""

import sys
import unicodedata
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

OURS = ("rwalk", "torch", "contextlib")
"""Packages whose frames are between a user's line and a warning."""
ALIKE = 0.7
"""How much of a mistyped name, of 1, has to agree with a known one."""


def warn(message: str) -> None:
    """Warn, and name the first line outside of this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def printable(text: str, keep: str = "\n") -> str:
    """Replace characters that control a terminal or cannot be printed by question marks, except those to keep."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" or c in keep else "?" for c in text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence that asks for the known name which a mistyped one resembles, after a space; empty if none does."""
    names = {one.casefold().replace("-", "_"): one for one in known}
    near = get_close_matches(name.casefold().replace("-", "_"), names, 1, ALIKE)
    return f" Did you mean `{printable(names[near[0]], '')}`?" if near else ""
