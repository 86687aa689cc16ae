"""The rules, one file for each published method; a file that is put here is found by the command line and the tests."""

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from rwalk.rules.base import Rule, Step, TaskEnd
from rwalk.rules.ewc import EWC
from rwalk.rules.ewcpp import EWCpp
from rwalk.rules.kronecker import Kronecker
from rwalk.rules.l2 import L2
from rwalk.rules.mas import MAS
from rwalk.rules.online_ewc import OnlineEWC
from rwalk.rules.rwalk import RWalk
from rwalk.rules.si import SI
from rwalk.rules.task_fisher import TaskFisher

__all__ = [
    "EWC",
    "L2",
    "MAS",
    "SI",
    "EWCpp",
    "Kronecker",
    "OnlineEWC",
    "RWalk",
    "Rule",
    "Step",
    "TaskEnd",
    "TaskFisher",
    "rules",
]


def rules() -> dict[str, type[Rule[Any]]]:
    """Map the name of each rule's file, as in `rwalk run --methods`, to the rule."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"}
    return {name: kind for name, module in sorted(modules.items()) for kind in _rules_of(name, module)}


def _rules_of(name: str, module: ModuleType) -> list[type[Rule[Any]]]:
    """Return the rule of a file, or none.

    Raises:
        ImportError: for a file with several.
    """
    classes = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    found = [kind for kind in classes if issubclass(kind, Rule) and not inspect.isabstract(kind)]
    if len(found) > 1:
        kinds = ", ".join(kind.__name__ for kind in found)
        raise ImportError(f"`{name}.py` has the rules {kinds}. Give each a file of its own, whose name is its method's name.")
    return found


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
