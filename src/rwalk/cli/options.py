"""The commands, and the one parser of what is typed. Only the module of the command that is typed is loaded."""

from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

from rwalk._errors import printable, suggestion

COMMANDS = {
    "list": ("list", "List"),
    "run": ("run", "Run"),
    "tune": ("tune", "Tune"),
    "report": ("report", "Report"),
    "compare": ("report", "Compare"),
}
"""For each command the module of this package and its class, which has the options and a method `do`."""
UNSET = tyro.conf.arg(help_behavior_hint="")
"""Of an option whose default is None, which its help explains in words."""
ABOUT = """`list` shows streams, data sets, models and methods; `run` and `tune` train; `report` and `compare` read the results.

Each command has a --help of its own, and `rwalk --version` prints the version. To begin with:
  rwalk list
  rwalk run permuted-digits --methods finetune,default,joint --tasks 3
  rwalk report runs --open"""


def parse(words: Sequence[str]) -> Any:
    """Return the command that is typed, or exit with a message; without any word, with the help."""
    if words and words[0] in COMMANDS:
        return tyro.cli(_kind(words[0]), prog=f"rwalk {words[0]}", args=words[1:])
    if words and not words[0].startswith("-"):
        came = f"There is no command `{printable(words[0], '')}`.{suggestion(words[0], COMMANDS)}"
        raise ValueError(f"{came} The commands are {', '.join(COMMANDS)}; `rwalk --help` explains them.")
    union: Any = reduce(or_, (_named(name) for name in COMMANDS))
    return tyro.cli(union, prog="rwalk", description=ABOUT, args=words or ["--help"])


def _kind(name: str) -> Any:
    module, kind = COMMANDS[name]
    return getattr(import_module(f"rwalk.cli.{module}"), kind)


def _named(name: str) -> Any:
    """Return a command as one of several, with the first line of what it says about itself."""
    kind = _kind(name)
    return Annotated[kind, tyro.conf.subcommand(name, description=(kind.__doc__ or "").splitlines()[0])]
