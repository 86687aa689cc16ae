"""What learns a stream: a method by its name, a rule, a learner, or what makes one of these two."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from rwalk._errors import printable, suggestion
from rwalk.bench.baselines import BASELINES, RECIPES
from rwalk.bench.imports import Source, create
from rwalk.bench.streams import Experience
from rwalk.bench.training import CustomLearner
from rwalk.rules import rules
from rwalk.rules.base import Rule

Method = str | Rule[Any] | CustomLearner | Callable[..., Any]


def is_path(method: Method) -> bool:
    """Return whether a method is given by its import path."""
    return isinstance(method, str) and ":" in method


def is_learner(method: Method) -> bool:
    """Return whether a method is a learner of one's own, an object."""
    return not isinstance(method, Rule) and _is_own(method)


def made(method: Method, task: Experience, offers: Mapping[str, Any]) -> Method:
    """Return a method for one run: what an import path, a class or a function makes, or a copy of a learner.

    Args:
        method: the method.
        task: the first task of the stream.
        offers: what a class or function may ask for, beside what follows from the task.

    Raises:
        ValueError: if it makes something else, or cannot be imported or copied.
    """
    if is_path(method) or not (isinstance(method, str) or _is_own(method)):
        kind = _is_own, "a rule, or a learner with `fit` and `predict`"
        own: Rule[Any] | CustomLearner = create(cast(Source, method), task, "Method", kind, offers)
        return own
    if not is_learner(method):
        return method
    try:
        return copy.deepcopy(method)
    except Exception as error:
        came = f"The learner {type(method).__name__} cannot be copied ({type(error).__name__}: {error})"
        raise ValueError(printable(f"{came}. Each run trains one of its own: pass the class, or a function.")) from None


def rule_of(method: Method, task: Experience, offers: Mapping[str, Any]) -> Rule[Any] | None:
    """Return the rule of a method; None for methods without one."""
    if isinstance(method, str) and method in RECIPES:
        return RECIPES[method]()
    found = None if is_learner(method) else made(method, task, offers)
    return found if isinstance(found, Rule) else None


def name_of(method: Method) -> str:
    """Return the name of a method in records."""
    if isinstance(method, str):
        return method
    named = method if hasattr(method, "__qualname__") else type(method)
    known = (name for name, kind in rules().items() if named is kind)
    return next(known, str(getattr(named, "__name__", "method")).lower())


def settings_of(method: Method) -> dict[str, Any]:
    """Return the plain values among a learner's fields or attributes: what tells it from another one of its class."""
    if not is_learner(method):
        return {}
    names = [field.name for field in fields(method)] if is_dataclass(method) else list(getattr(method, "__dict__", {}))
    every = {name: getattr(method, name) for name in names}
    return {name: v for name, v in every.items() if name[:1] != "_" and type(v) in (bool, int, float, str)}


def check(method: Method) -> None:
    """Raise a ValueError for a name that no method has, and a TypeError for what is none."""
    if isinstance(method, str):
        known = [*BASELINES, *RECIPES]
        if method in rules():
            raise ValueError(f"`{method}` is a rule. In Python, pass the object: `{rules()[method].__name__}()`.")
        if not is_path(method) and method not in known:
            came = f"There is no method `{printable(method, '')}`.{suggestion(method, [*known, *rules()])}"
            raise ValueError(f"{came} Pass one of {', '.join(known)}, or a rule such as `RWalk()`.")
    elif not _is_own(method) and not callable(method):
        came = f"A method is a name, a rule such as `RWalk()`, or has `fit` and `predict`, or makes one; {method!r} does not"
        raise TypeError(f"{came}.")


def _is_own(thing: Any) -> bool:
    return isinstance(thing, Rule) or (hasattr(thing, "fit") and hasattr(thing, "predict") and not isinstance(thing, type))
