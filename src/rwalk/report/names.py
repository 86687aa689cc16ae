"""What methods are called in sentences, tables and charts."""

import re
from typing import Any

from rwalk.report.summary import Comparison, Line

NAMES = {
    "finetune": "fine-tuning",
    "joint": "joint training",
    "cumulative": "cumulative training",
    "replay": "replay",
    "agem": "A-GEM",
    "lwf": "LwF",
    "recipe": "recipe",
    "rwalk": "RWalk",
    "ewc": "EWC",
    "online_ewc": "online EWC",
    "ewcpp": "EWC++",
    "si": "SI",
    "mas": "MAS",
    "l2": "L2",
    "kronecker": "Kronecker",
}
REPLAY = "+replay"
"""What is behind the names of methods that replay examples, too."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufff9-\uffff]")
"""Control characters, halves of characters, and marks that end a line or turn the direction of what follows."""


def clean(text: Any) -> str:
    """Replace what XML has no room for, and what would disturb the text around it."""
    return UNPRINTABLE.sub("�", str(text))


def called(method: str) -> str:
    """Return a method's usual name."""
    plain = method.removesuffix(REPLAY)
    return clean(NAMES.get(plain, plain)) + (" with replay" if plain != method else "")


def names(comparison: Comparison) -> list[str]:
    """Name each line, with what tells it from others of the same method."""
    return [called(line.method) + _apart(line, comparison) for line in comparison.lines]


def _apart(line: Line, comparison: Comparison) -> str:
    strengths = {other.strength for other in comparison.lines if other.method == line.method}
    words = [f"strength {line.strength:g}"] if line.strength is not None and len(strengths) > 1 else []
    return bracketed(words + [f"{key} {value}" for key, value in comparison.varying(line).items()])


def bracketed(words: list[str]) -> str:
    """Put words, if there are any, in brackets behind a name."""
    return clean(f" ({', '.join(words)})") if words else ""


def listed(words: list[str]) -> str:
    """Join words as a sentence does."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
