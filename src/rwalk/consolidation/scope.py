"""Which parameters of a model may be protected: all, or those that the user names."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from rwalk._errors import printable
from rwalk._parameters import bare, listed, named_parameters

Named = str | nn.Module | Sequence[str | nn.Module]
"""A part of a model: a parameter or module by name, all that a pattern such as `encoder.*.bias` fits, a module, or several."""

P = TypeVar("P", bound=Tensor)


class Scope:
    """Those parameters that `only` names, without those that `exclude` names.

    Args:
        model: the network.
        only: what may be protected; None for everything.
        exclude: what may not.

    Raises:
        TypeError: for anything but names and modules.
        ValueError: for what is no part of the model.
    """

    def __init__(self, model: nn.Module, only: Named | None = None, exclude: Named | None = None) -> None:
        self.only = None if only is None else patterns(model, only, "only")
        self.exclude = () if exclude is None else patterns(model, exclude, "exclude")

    def __contains__(self, name: str) -> bool:
        """Return whether the parameter of a name may be protected."""
        wanted = self.only is None or any(fits(name, pattern) for pattern in self.only)
        return wanted and not any(fits(name, pattern) for pattern in self.exclude)

    def of(self, parameters: Mapping[str, P]) -> dict[str, P]:
        """Return those of some parameters that may be protected."""
        return {name: p for name, p in parameters.items() if name in self}

    def trainable(self, model: nn.Module) -> list[str]:
        """List the names of a model's parameters that may be protected and require gradients."""
        return [name for name, p in self.of(named_parameters(model)).items() if p.requires_grad]

    def refuse_others(self, names: Sequence[str]) -> None:
        """Raise a ValueError for the names of a saved state that may not be protected."""
        others = [name for name in names if name not in self]
        if others:
            raise ValueError(
                f"The state protects {listed(others)}, which `only` and `exclude` leave out here. Build the consolidator with "
                "the same `only` and `exclude` as the one that saved it."
            )


def fits(name: str, pattern: str) -> bool:
    """Return whether a parameter has a name, lies in a module of that name, or fits a pattern with wildcards."""
    return not pattern or name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def patterns(model: nn.Module, parts: Named, argument: str) -> tuple[str, ...]:
    """Return parts of a model as names and patterns.

    Raises:
        TypeError: for anything but names and modules.
        ValueError: for what is no part of the model.
    """
    listing = [parts] if isinstance(parts, str | nn.Module) else parts
    if not isinstance(listing, Sequence) or not all(isinstance(part, str | nn.Module) for part in listing):
        raise TypeError(f"`{argument}` must be a name or module, or a list of these, but is {printable(repr(parts))}.")
    modules = {id(module): _plain(name) for name, module in bare(model).named_modules(remove_duplicate=False)}
    names = [*named_parameters(model), *modules.values()]
    return tuple(_pattern(part, modules, names, argument) for part in listing)


def _pattern(part: str | nn.Module, modules: Mapping[int, str], names: Sequence[str], argument: str) -> str:
    if isinstance(part, nn.Module):
        if id(bare(part)) not in modules:
            raise ValueError(f"`{argument}` has a `{type(part).__name__}` that is no part of the model. Pass a module of it.")
        return modules[id(bare(part))]
    if len(names) > 1 and not any(fits(name, part) for name in names if name):
        near: Any = get_close_matches(part, [name for name in names if name], 3, 0.3)
        hint = f" Near names: {listed(near)}." if near else ""
        raise ValueError(f"`{argument}` has {printable(repr(part))}, which fits no parameter or module of the model.{hint}")
    return part


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
