"""What learns a stream: a method by its name, a rule, a learner, or the import path of one of these two."""

from typing import Any

from rwalk._errors import printable, suggestion
from rwalk.bench.baselines import BASELINES, RECIPES
from rwalk.bench.imports import create
from rwalk.bench.streams import Experience
from rwalk.bench.training import CustomLearner
from rwalk.rules import rules
from rwalk.rules.base import Rule

Method = str | Rule[Any] | CustomLearner


def is_path(method: Method) -> bool:
    """Return whether a method is given by its import path."""
    return isinstance(method, str) and ":" in method


def made(method: Method, task: Experience) -> Method:
    """Return a method, or what its import path makes for a task: a rule, or a new learner.

    Raises:
        ValueError: if it makes something else, or cannot be imported.
    """
    if isinstance(method, str) and is_path(method):
        kind = _is_own, "a rule, or a learner with `fit` and `predict`"
        own: Rule[Any] | CustomLearner = create(method, task, "Method", kind)
        return own
    return method


def rule_of(method: Method, task: Experience) -> Rule[Any] | None:
    """Return the rule of a method; None for methods without one."""
    if isinstance(method, str) and method in RECIPES:
        return RECIPES[method]()
    found = made(method, task)
    return found if isinstance(found, Rule) else None


def name_of(method: Method) -> str:
    """Return the name of a method in records."""
    if isinstance(method, str):
        return method
    known = (name for name, kind in rules().items() if type(method) is kind)
    return next(known, type(method).__name__.lower())


def check(method: Method) -> None:
    """Raise a ValueError for a name that no method has, and a TypeError for what is none."""
    if isinstance(method, str):
        known = [*BASELINES, *RECIPES]
        if method in rules():
            raise ValueError(f"`{method}` is a rule. In Python, pass the object: `{rules()[method].__name__}()`.")
        if not is_path(method) and method not in known:
            came = f"There is no method `{printable(method, '')}`.{suggestion(method, [*known, *rules()])}"
            raise ValueError(f"{came} Pass one of {', '.join(known)}, or a rule such as `RWalk()`.")
    elif not _is_own(method):
        raise TypeError(f"A method is a name, a rule such as `RWalk()`, or has `fit` and `predict`; {method!r} is not.")


def _is_own(thing: Any) -> bool:
    return isinstance(thing, Rule) or (hasattr(thing, "fit") and hasattr(thing, "predict") and not isinstance(thing, type))
