"""The directive `api`: an entry for every public name of a module.

Its body orders them, one name a line, and may name the members of a class that users need (`Anchor: save load`); without that
all members are shown. Names that the body leaves out follow, so that none is missing.
"""

import inspect
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import rwalk
from rwalk.rules import Rule


class Api(SphinxDirective):
    """Document public names of a module as autodoc does; with the option `only`, no others than those in the body."""

    required_arguments = 1
    has_content = True
    option_spec = {"only": directives.flag}  # noqa: RUF012 - as docutils declares it

    def run(self) -> list[nodes.Node]:
        """Return the entries."""
        name = self.arguments[0]
        module = import_module(name)
        self.env.note_dependency(__file__)
        self.env.note_dependency(str(module.__file__))
        chosen = {word: members.strip() for word, _, members in (line.partition(":") for line in self.content)}
        if "only" not in self.options:
            elsewhere = set(rwalk.__all__) if name != "rwalk" else set()
            chosen |= {word: "" for word in public(module) if word not in {*chosen, *elsewhere}}
        lines = [line for word, members in chosen.items() for line in entry(name, word, getattr(module, word), members)]
        node = nodes.container()
        self.state.nested_parse(StringList(["```{eval-rst}", *lines, "```"], name), self.content_offset, node)
        return node.children


def public(module: Any) -> list[str]:
    """Return the names that a module offers: its `__all__`, or the classes and functions that it defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def entry(module: str, name: str, value: Any, members: str) -> list[str]:
    """Return autodoc's directive for one name."""
    kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
    lines = [f".. auto{kind}:: {module}.{name}"]
    if kind == "class" and not (issubclass(value, Rule) and value is not Rule):
        foreign = [base.__name__ for base in value.__mro__ if not base.__module__.startswith("rwalk")]
        hidden = [word for word in dir(value) if word.isupper()]
        lines.append(f"   :members: {', '.join(members.split())}")
        lines += [] if members else [f"   :inherited-members: {', '.join(foreign)}"]
        lines += [f"   :exclude-members: {', '.join(hidden)}"] if hidden else []
    return [*lines, ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("api", Api)
    return {"parallel_read_safe": True}
