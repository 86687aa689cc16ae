"""How the library complains: what came, what was expected, what to do."""

import unicodedata


def explain(came: str, expected: str, remedy: str) -> str:
    """Join the three parts that every error message of the library has."""
    return printable(f"Got {came}. Expected {expected}. {remedy}")


def printable(text: str, keep: str = "\n") -> str:
    """Put a question mark for each character that steers a terminal or cannot be printed, except those to keep."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" or c in keep else "?" for c in text)
