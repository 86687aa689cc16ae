"""An anchor remembers where the weights were and how much they mattered, and pulls weights back there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Anchor(ABC):
    """The quadratic that consolidation adds to the loss, in one of two geometries: `ElementwiseAnchor`, `KroneckerAnchor`.

    Args:
        point: the parameters after earlier tasks, by name.
        omega: their importance, by name: non-negative, one weight for each element of `point`.

    Attributes:
        parts: what its `content` has besides point and omega.
        allows_gradient_pull: whether its pull can be added to gradients, or is made after the step only.
        allows_shards: whether it works on each rank's shards alone.
        reads_skip_flag: whether its proximal pull leaves out a step by a flag on the device, without waiting for it.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    allows_gradient_pull: ClassVar[bool] = True
    allows_shards: ClassVar[bool] = True
    reads_skip_flag: ClassVar[bool] = True
    point: dict[str, Tensor] = field(default_factory=dict)
    omega: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the tensors held."""
        return len(self.point)

    def largest(self) -> float:
        """Return the largest importance of any element, 0 for an empty anchor."""
        return max((float(omega.max()) for omega in self.omega.values() if omega.numel()), default=0.0)

    @abstractmethod
    def align(self, theta: Mapping[str, Tensor]) -> Self:
        """Follow a model that changed, by name and leading block.

        Entries that grew keep their old block; new elements have importance zero and rest where the model has them. Names that
        the anchor does not know stay unknown until the next task's end, and names that `theta` lacks are dropped.
        """

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the entries of some names under others."""

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
        """Return "point" and "omega" of parameters of these names, None for those that are not held element by element."""
        return {"point": [self.point.get(name) for name in names], "omega": [self.omega.get(name) for name in names]}

    def draw(self, theta: Mapping[str, Tensor], step_size: Callable[[str], float]) -> None:  # noqa: B027 - most kinds have none
        """Make the proximal pull of whole layers after a step.

        Args:
            theta: the parameters that have just moved, by name.
            step_size: tells by name how long a step of a parameter's pull is, in one number for all of it.
        """

    def apply_deferred_pull(self, theta: Mapping[str, Tensor]) -> Callable[[], None]:  # noqa: ARG002
        """Make up for deferred pulls when a task ends; return a function that undoes it."""
        return lambda: None

    def drop_deferred_pull(self) -> None:  # noqa: B027 - most kinds defer nothing
        """Forget deferred pulls."""

    @abstractmethod
    def penalty(self, theta: Mapping[str, Tensor]) -> float | Tensor:
        """Return the quadratic at `theta`, without the strength."""

    def refuse_damage(self) -> None:
        """Raise a ValueError unless each point has an importance of its shape, all of it finite and 0 or more."""
        wrong = self.damaged_parts(self.content())
        if wrong:
            raise ValueError(f"The anchor's layers {listed(wrong)} do not fit its points. Pass it as it was saved.")
        for name, point in self.point.items():
            omega = self.omega.get(name)
            if omega is None or omega.shape != point.shape or not bool((torch.isfinite(omega) & (omega >= 0)).all()):
                raise ValueError(
                    f"The anchor's importance of {listed([name])} is missing, negative, not finite or of another shape. "
                    "`anchor.omega` needs a weight of 0 or more for each element of its point."
                )

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
    def damaged_parts(cls, content: Mapping[str, Any]) -> list[str]:  # noqa: ARG003
        """Name the `parts` of a content that do not fit its points."""
        return []

    def save(self, path: str | Path) -> None:
        """Write the anchor to a safetensors file, whole or not at all: entries `point/NAME` and `omega/NAME`.

        If its tensors are DTensors all ranks have to call; the first one writes.
        """
        checkpoint.save_once(self.content(), shards.ShardGroup.of(self.point.values()), partial(states.save, path, "anchor"))

    @staticmethod
    @torch.inference_mode(False)
    def load(path: str | Path) -> "Anchor":
        """Read an anchor, of either kind, from a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else.
        """
        content = states.load(path, "anchor")
        point, omega = (_shapes(content.get(part)) for part in ("point", "omega"))
        kind = anchor_kind(content)
        if point is None or point != omega or kind is None or kind.damaged_parts(content):
            raise ValueError(printable(f"`{path}` holds no anchor that can be read. Pass a file that `Anchor.save` wrote."))
        return kind.read(content)


def anchor_kind(content: Mapping[str, Any]) -> type[Anchor] | None:
    """Return the kind of anchor that a content was made from, None for no content of an anchor."""
    kinds = {frozenset(("point", "omega", *kind.parts)): kind for kind in Anchor.__subclasses__()}
    return kinds.get(frozenset(content))


def _shapes(tensors: Any) -> dict[str, torch.Size] | None:
    """Return the shapes of tensors of floating point by name, or None for anything else."""
    if not isinstance(tensors, dict):
        return None
    if not all(isinstance(n, str) and isinstance(t, Tensor) and t.is_floating_point() for n, t in tensors.items()):
        return None
    return {name: tensor.shape for name, tensor in tensors.items()}
