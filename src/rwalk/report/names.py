"""Names of methods in sentences, tables and charts."""

import pkgutil
import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from rwalk.report.summary import Line, MethodComparison

NAMES = {
    "finetune": "fine-tuning",
    "joint": "joint training",
    "cumulative": "cumulative training",
    "replay": "replay",
    "agem": "A-GEM",
    "lwf": "LwF",
    "default": "default",
    "recipe": "diagonal recipe",
    "rwalk": "RWalk",
    "ewc": "EWC",
    "online_ewc": "online EWC",
    "ewcpp": "EWC++",
    "si": "SI",
    "mas": "MAS",
    "l2": "L2",
    "task_fisher": "task Fisher",
    "kronecker": "Kronecker",
}
REPLAY = "+replay"
"""The suffix of methods that also replay examples."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufff9-\uffff]")
"""Control characters, halves of characters, and marks that end a line or turn the direction of what follows."""


def clean(text: Any) -> str:
    """Replace characters that XML does not allow, or that would disturb the text around them."""
    return UNPRINTABLE.sub("�", str(text))


@cache
def rule_names() -> set[str]:
    """Return the methods that are rules, which are the names of their modules, without loading these."""
    spec = find_spec("rwalk.rules")
    found = pkgutil.iter_modules(spec.submodule_search_locations if spec else ())
    return {module.name for module in found if module.name[0] != "_"} - {"base"}


def method_name(method: str) -> str:
    """Return a method's usual name."""
    plain = method.removesuffix(REPLAY)
    return clean(NAMES.get(plain, plain)) + (" with replay" if plain != method else "")


def names(comparison: MethodComparison) -> list[str]:
    """Name each line, with the settings that distinguish it from others of the same method."""
    return [method_name(line.method) + _apart(line, comparison) for line in comparison.lines]


def _apart(line: Line, comparison: MethodComparison) -> str:
    strengths = {other.strength for other in comparison.lines if other.method == line.method}
    words = [f"strength {line.strength:g}"] if line.strength is not None and len(strengths) > 1 else []
    return bracketed(words + [f"{key} {value}" for key, value in comparison.varying(line).items()])


def bracketed(words: list[str]) -> str:
    """Return words in brackets, to stand behind a name; nothing for no words."""
    return clean(f" ({', '.join(words)})") if words else ""


def listed(words: list[str]) -> str:
    """Join words as a sentence does."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
