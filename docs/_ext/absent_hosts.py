"""Imports the integrations where their hosts are not installed, with empty classes in place of the hosts', to document them."""

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

import rwalk.integrations

HOSTS = ("accelerate", "avalanche", "lightning", "sklearn", "transformers")


class Empty:
    """What a host's class is here: a base with any options, such as Avalanche's `supports_distributed=True`."""

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()


class Absent(ModuleType):
    """A module whose names are all empty classes."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (Empty,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


class Finder:
    """Finds the modules of hosts that are not installed."""

    def __init__(self) -> None:
        self.absent = {host for host in HOSTS if find_spec(host) is None}

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Return where a module comes from: here."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.absent else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the module."""
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, as there is no code."""


def setup(_: Sphinx) -> dict[str, bool]:
    """Import the integrations, and forget the hosts, so that nobody else takes them for the real ones."""
    finder = Finder()
    sys.meta_path.append(finder)
    try:
        for module in pkgutil.iter_modules(rwalk.integrations.__path__, "rwalk.integrations."):
            import_module(module.name)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in finder.absent]:
            del sys.modules[name]
    return {"parallel_read_safe": True}
