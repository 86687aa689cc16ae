"""How an anchor fits a model, by names and shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from rwalk._parameters import grown


class Match(NamedTuple):
    """How an anchor fits a model, by the model's names.

    Args:
        same: parameters of the same shape.
        grown: parameters whose leading block the anchor has.
        misfits: parameters that are smaller than in the anchor, or have other dimensions.
        unknown: names of the anchor that the model lacks.
        missing: names of the model that the anchor lacks.
        names: the model's name of each entry of the anchor that fits, in the model's order.
        note: what was done to the anchor's importance, if anything.
    """

    same: list[str]
    grown: list[str]
    misfits: list[str]
    unknown: list[str]
    missing: list[str]
    names: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        """Name what matched and what did not."""
        words = {
            "the same shape": self.same,
            "grown": self.grown,
            "of another shape": self.misfits,
            "only in the anchor": self.unknown,
            "only in the model": self.missing,
        }
        found = [f"{len(names)} {word} ({_first(names)})" for word, names in words.items() if names]
        return "; ".join([*found, self.note] if self.note else found)


def _first(names: Sequence[str]) -> str:
    """Write the first names of a list, five at most."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def match_names(
    point: Mapping[str, Tensor], theta: Mapping[str, Tensor], rename: Mapping[str, str] | Callable[[str], str] | None
) -> Match:
    """Compare an anchor's points with a model's parameters; `rename` leads from the anchor's names to the model's.

    Raises:
        ValueError: if `rename` gives several tensors one name.
    """
    change = rename if callable(rename) else lambda name: (rename or {}).get(name, name)
    names = {name: change(name) for name in point}
    if len(set(names.values())) < len(names):
        raise ValueError("`rename` gives one name to several tensors of the anchor. Make its results differ.")
    order = {name: i for i, name in enumerate(theta)}
    known = sorted((old for old, new in names.items() if new in order), key=lambda old: order[names[old]])
    fits = {old: names[old] for old in known if grown(point[old].shape, theta[names[old]].shape)}
    same = [new for old, new in fits.items() if point[old].shape == theta[new].shape]
    return Match(
        same=same,
        grown=[new for new in fits.values() if new not in same],
        misfits=[names[old] for old in known if old not in fits],
        unknown=[new for new in names.values() if new not in theta],
        missing=[name for name in theta if name not in names.values()],
        names=fits,
    )
