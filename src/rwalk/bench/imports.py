"""Models, rules and learners of one's own: by their import path, and made with what they ask for."""

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rwalk._errors import printable
from rwalk.bench.streams import Experience
from rwalk.rules.base import Rule

Source = str | Callable[..., Any]
"""An import path, `package.module:name`, or the object there."""


def create(
    source: Source,
    task: Experience,
    what: str,
    kind: tuple[Callable[[Any], bool], str],
    offers: Mapping[str, Any] | None = None,
) -> Any:
    """Return what an import path, or the object there, makes for a task.

    Args:
        source: a class or function, called with what it asks for; of rules also an instance.
        task: the first task of a stream.
        what: the word for it in messages.
        kind: whether an object is of the right kind, and the words for that.
        offers: what it may ask for beside what follows from the task.

    Raises:
        ValueError: if it cannot be imported or called, or makes something else.
    """
    fits, expected = kind
    offered = {name: read(task) for name, read in OFFERS.items()} | dict(offers or {})
    path = source if isinstance(source, str) else path_of(source)
    try:
        with _current_folder():
            found = _imported(source) if isinstance(source, str) else source
            made = found if isinstance(found, Rule) else _called(found, task, offered)
            if not fits(made):
                raise TypeError(f"it makes an object of type {type(made).__name__}")
    except Exception as error:  # code of one's own may raise anything
        came = f"{what} `{path}` cannot be made ({type(error).__name__}: {error})."
        remedy = f"Pass `package.module:name` of a class or function that makes {expected}; it may ask for {', '.join(offered)}"
        raise ValueError(printable(f"{came} {remedy}. The current folder is searched, too.")) from None
    return made


OFFERS: dict[str, Callable[[Experience], Any]] = {
    "task": lambda task: task,
    "shape": lambda task: task.shape,
    "inputs": lambda task: math.prod(task.shape),
    "outputs": lambda task: task.outputs,
    "classes": lambda task: task.outputs,
    "num_classes": lambda task: task.outputs,
    "tokens": lambda task: task.tokens,
}
"""What a class or function may ask for by the names of its parameters: the first task, the shape of an input and the number of
its elements, how many outputs the stream has, under three names, and how many different numbers a text's inputs can be."""


def _called(factory: Any, task: Experience, offered: Mapping[str, Any]) -> Any:
    """Call a factory with what it asks for; a single parameter of another name is the task."""
    if not callable(factory):
        raise TypeError(f"it is an object of type {type(factory).__name__}, and neither a class nor a function")
    if hasattr(factory, "parameters") and not isinstance(factory, type):
        raise TypeError("it is a network already, which runs would share")
    if isinstance(factory, type) and issubclass(factory, Rule):
        return factory()
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # of some that are written in C
        return factory(task)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [p.name for p in parameters if p.name in needed and (p.name not in offered or p.kind is p.POSITIONAL_ONLY)]
    if len(needed) == 1 and unknown:
        return factory(task)
    if unknown:
        raise TypeError(f"it needs `{unknown[0]}`, which nobody gives")
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return factory(**{name: offered[name] for name in named if name in offered})


def function(source: Source) -> Callable[..., Any]:
    """Return a function, or the one at an import path.

    Raises:
        ValueError: if there is none.
    """
    try:
        with _current_folder():
            found = _imported(source) if isinstance(source, str) else source
        if not callable(found):
            raise TypeError(f"it is an object of type {type(found).__name__}")
    except Exception as error:
        came = f"Metric `{source}` cannot be used ({type(error).__name__}: {error})"
        raise ValueError(
            printable(f"{came}. Pass a function of true and predicted labels, or its `package.module:name`.")
        ) from None
    return found


def preload(*sources: Any) -> None:
    """Import the modules of those that are import paths, as that may draw random numbers; `create` explains what fails."""
    for source in sources:
        if isinstance(source, str) and ":" in source:
            with suppress(Exception), _current_folder():
                _imported(source)


def code_of(*sources: Any) -> str:
    """Return a digest of the files behind those that are import paths; empty if there are none.

    With it in a run's configuration, results of code that was edited since are not taken for those of the code as it is.
    """
    found = list[bytes]()
    for source in sources:
        if isinstance(source, str) and ":" in source:
            with suppress(Exception), _current_folder():
                spec = find_spec(source.partition(":")[0])
                found.append(Path(spec.origin if spec and spec.origin else "").read_bytes())
    return hashlib.sha256(b"".join(found)).hexdigest()[:10] if found else ""


def path_of(thing: Any) -> str:
    """Return the import path of a class or function; of another object that of its class."""
    if isinstance(thing, partial):
        fixed = [*map(repr, thing.args), *(f"{name}={value!r}" for name, value in thing.keywords.items())]
        return f"{path_of(thing.func)}({', '.join(fixed)})"
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def check_kept(source: Source) -> None:
    """Raise a ValueError if files that outlive this process would name what no import path finds again."""
    path = source if isinstance(source, str) else path_of(source)
    try:
        found = isinstance(source, str) or (not path.startswith("__main__:") and _imported(path) is source)
    except (ImportError, AttributeError):
        found = False
    if not found:
        came = f"Checkpoints and records in a folder know a model by its import path, and `{path}` is none"
        raise ValueError(printable(f"{came}. Define it at the top of a module of its own, or keep no files."))


def _imported(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let imports find modules in the current folder, as `python` does and programs that are installed do not."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
