"""The rules, one file for each published method; a file that is put here is found by the command line and the tests."""

import inspect
import pkgutil
from importlib import import_module
from typing import Any

from rwalk.importance.base import Importance


def rules() -> dict[str, type[Importance[Any]]]:
    """Map the name of each rule's file, as in `rwalk run --methods`, to the rule."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"}
    return {
        name: kind
        for name, module in sorted(modules.items())
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Importance) and kind.__module__ == module.__name__
        if not inspect.isabstract(kind)
    }
