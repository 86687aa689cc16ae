"""The commands, and the one parser of what is typed. Only the module of the command that is typed is loaded."""

from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

COMMANDS = {
    "run": ("run", "Run"),
    "tune": ("tune", "Tune"),
    "list": ("list", "List"),
    "report": ("report", "Report"),
    "compare": ("report", "Compare"),
}
"""For each command the module of this package and its class, which has the options and a method `do`."""
ABOUT = "`run` and `tune` train methods on streams of tasks; `report` and `compare` read the results."


def parse(words: Sequence[str]) -> Any:
    """Return the command that is typed, or exit with a message."""
    if words and words[0] in COMMANDS:
        return tyro.cli(_kind(words[0]), prog=f"rwalk {words[0]}", args=words[1:])
    union: Any = reduce(or_, (Annotated[_kind(name), tyro.conf.subcommand(name)] for name in COMMANDS))
    return tyro.cli(union, prog="rwalk", description=ABOUT, args=words)


def _kind(name: str) -> Any:
    module, kind = COMMANDS[name]
    return getattr(import_module(f"rwalk.cli.{module}"), kind)
