"""Text from outside in messages: names, paths and contents of files must not control a terminal."""

import unicodedata


def printable(text: str, keep: str = "\n") -> str:
    """Replace characters that control a terminal or cannot be printed by question marks, except those to keep."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" or c in keep else "?" for c in text)
