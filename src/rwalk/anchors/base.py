"""An anchor remembers where the weights were and how much they mattered, and pulls weights back there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rwalk._errors import printable
from rwalk._io import states
from rwalk._parameters import listed
from rwalk.anchors.match import Match, match_names
from rwalk.distributed import checkpoint, shards


@dataclass(frozen=True, eq=False, repr=False)
class Anchor(ABC):
    """The quadratic that consolidation adds to the loss, in one of two geometries: `ElementwiseAnchor`, `KroneckerAnchor`.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: the importance of those that are held element by element, by name: non-negative, of the shape of `point`.
        origin: the name of the rule that made it, if known.

    Attributes:
        parts: what its `content` has besides point and omega.
        by_element: whether it pulls each element alone, at each step; otherwise `draw` pulls whole layers every few steps.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    by_element: ClassVar[bool] = True
    point: dict[str, Tensor] = field(default_factory=dict)
    omega: dict[str, Tensor] = field(default_factory=dict)
    origin: str = field(default="", kw_only=True)

    def __repr__(self) -> str:
        """Show how much is held, and no tensors."""
        weights = sum(point.numel() for point in self.point.values())
        by = f", origin={self.origin!r}" if self.origin else ""
        return f"{type(self).__name__}(tensors={len(self)}, weights={weights:,}{by})"

    def __len__(self) -> int:
        """Count the tensors held."""
        return len(self.point)

    def largest(self) -> float:
        """Return the largest importance of any element, 0 for an empty anchor."""
        return max((float(omega.max()) for omega in self.omega.values() if omega.numel()), default=0.0)

    def importance(self) -> dict[str, Tensor]:
        """Return the quadratic's diagonal, by name."""
        return dict(self.omega)

    def totals(self, shard_group: shards.ShardGroup) -> dict[str, float]:
        """Return the sum of the importance of each parameter over all ranks, by name."""
        return dict(zip(self.omega, shard_group.sums([float(o.sum()) for o in self.omega.values()]), strict=True))

    def whole_penalty(self, theta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float | Tensor:  # noqa: ARG002
        """Return the part of `penalty` that each rank knows as a whole, where `theta` are parts of sharded parameters."""
        return 0.0

    @abstractmethod
    def align(self, theta: Mapping[str, Tensor]) -> Self:
        """Follow a model that changed, by name and leading block.

        Entries that grew keep their old block; new elements have importance zero and rest where the model has them. Names that
        the anchor does not know stay unknown until the next task's end, and names that `theta` lacks are dropped.
        """

    @abstractmethod
    def begun(self, theta: Mapping[str, Tensor], sharded: bool = False) -> Self:
        """Take up parameters that it does not hold, as they are, with importance zero; `sharded` for parts of larger ones."""

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the entries of some names under others."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Multiply the importance by a number."""

    def merge(self, point: Mapping[str, Tensor], omega: Sequence[Tensor]) -> "Anchor":  # noqa: ARG002
        """Add a second quadratic, where the sum of two is one of the same kind; `omega` runs parallel to `point`."""
        raise TypeError(f"A quadratic cannot be merged into a {type(self).__name__}. Merge into an ElementwiseAnchor.")

    def match(self, theta: Mapping[str, Tensor], rename: Mapping[str, str] | Callable[[str], str] | None = None) -> Match:
        """Compare with parameters by name and leading block.

        Args:
            theta: parameters by name.
            rename: from this anchor's names to those of `theta`; names that a mapping lacks stay.
        """
        return match_names(self.point, theta, rename)

    def columns(self, names: Sequence[str]) -> dict[str, list[Tensor | None]]:
        """Return "point" and "omega" of parameters of these names, None for those that are not held."""
        return {"point": [self.point.get(name) for name in names], "omega": [self.omega.get(name) for name in names]}

    @abstractmethod
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the quadratic at `theta`, without the strength."""

    def refuse_damage(self) -> None:
        """Raise a ValueError unless whole layers fit their points, and the other points have an importance that fits."""
        wrong = self.damaged_parts(self.content()) if self.parts else []
        if wrong:
            raise ValueError(f"The anchor's layers {listed(wrong)} do not fit its points. Pass it as it was saved.")
        self.refuse_odd_importance()

    def refuse_odd_importance(self) -> None:
        """Raise a ValueError unless each point has an importance of its shape, all of it finite and 0 or more."""
        for name in self.omega if self.parts else self.point:
            point, omega = self.point.get(name), self.omega.get(name)
            if (
                omega is None
                or point is None
                or omega.shape != point.shape
                or not bool((torch.isfinite(omega) & (omega >= 0)).all())
            ):
                raise ValueError(
                    f"The anchor's importance of {listed([name])} is missing, negative, not finite or of another shape. "
                    "`anchor.omega` needs a weight of 0 or more for each element of its point."
                )

    def kept(self, away: Callable[[Tensor], Tensor], narrow: Callable[[Tensor], Tensor]) -> Self:
        """Return the anchor as it is kept: everything where `away` puts it, and importance in the precision of `narrow`."""
        point = {name: away(t) for name, t in self.point.items()}
        return replace(self, point=point, omega={name: away(narrow(t)) for name, t in self.omega.items()})

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held."""
        yield from self.point.values()
        yield from self.omega.values()

    def content(self) -> dict[str, Any]:
        """Return the anchor as tensors and plain values in dictionaries, for state files."""
        return {"point": self.point, "omega": self.omega}

    @classmethod
    @abstractmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Return the anchor that `content` was made from."""

    @classmethod
    def damaged_parts(cls, content: Mapping[str, Any]) -> list[str]:
        """Name the `parts` of a content that do not fit its points."""
        return [name for name in content["point"] if name not in content["omega"]]

    def save(self, path: str | Path) -> None:
        """Write the anchor to a safetensors file, whole or not at all: entries `point/NAME` and `omega/NAME`.

        If its tensors are DTensors all ranks have to call; the first one writes.
        """
        content = self.content() | ({"origin": self.origin} if self.origin else {})
        checkpoint.save_once(content, shards.ShardGroup.of(self.point.values()), partial(states.save, path, "anchor"))

    @staticmethod
    @torch.inference_mode(False)
    def load(path: str | Path, *, mapped: bool = False) -> "Anchor":
        """Read an anchor, of either kind, from a file that `save` wrote.

        Args:
            path: the file.
            mapped: leave the tensors in the file, where they take no memory of the process; it must not be written to while
                they are in use, except by `save`, which leaves the old file to them. Those in `channels_last` are copied.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else.
        """
        content = states.load(path, "anchor", mapped)
        origin = content.pop("origin", "")
        point, omega = (_shapes(content.get(part)) for part in ("point", "omega"))
        kind = anchor_kind(content)
        unlike = point is None or omega is None or any(point.get(name) != shape for name, shape in omega.items())
        if unlike or kind is None or kind.damaged_parts(content):
            raise ValueError(printable(f"`{path}` holds no anchor that can be read. Pass a file that `Anchor.save` wrote."))
        return replace(kind.read(content), origin=str(origin))


def anchor_kind(content: Mapping[str, Any]) -> type[Anchor] | None:
    """Return the kind of anchor that a content was made from, None for no content of an anchor."""
    kinds = {frozenset(("point", "omega", *kind.parts)): kind for kind in Anchor.__subclasses__()}
    parts = frozenset(content)
    return kinds.get(parts - {"every"} if "layers" in parts else parts)  # earlier versions saved `every` with an anchor


def _shapes(tensors: Any) -> dict[str, torch.Size] | None:
    """Return the shapes of tensors of floating point by name, or None for anything else."""
    if not isinstance(tensors, dict):
        return None
    if not all(isinstance(n, str) and isinstance(t, Tensor) and t.is_floating_point() for n, t in tensors.items()):
        return None
    return {name: tensor.shape for name, tensor in tensors.items()}
