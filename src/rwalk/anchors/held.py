"""What an anchor holds as a whole: the quadratic tr(D^T G D A) of a layer, whatever its parameters make of D."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor

from rwalk.anchors.spectrum import Spectrum

if TYPE_CHECKING:
    from rwalk.anchors.factors import Cut, Moments


class Product(NamedTuple):
    """How the two factors of an adapter make up what it adds to a layer's weight: scale * up @ down.

    Args:
        down: the name of the factor that takes the inputs, (rank, inputs). The layer has the name of the other one, `up`,
            (outputs, rank).
        scale: what the product is multiplied by.
    """

    down: str
    scale: float = 1.0

    @property
    def bias(self) -> None:
        """The name of a bias: an adapter has none."""
        return

    @property
    def groups(self) -> int:
        """How many matrices D has."""
        return 1

    @property
    def transposed(self) -> bool:
        """Whether the first dimension of `up` is that of the inputs: it is that of the outputs."""
        return False

    def names(self, weight: str) -> list[str]:
        """Name the two factors, `up` first."""
        return [weight, self.down]

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Arrange a factor as one matrix."""
        return weight.unsqueeze(0)


@dataclass(frozen=True, eq=False)
class HeldLayer(ABC):
    """The quadratic tr(D^T G D A) of one layer, where A and G are known by their leading directions.

    Args:
        arrangement: how its parameters lie in D, or make it up.
        inputs: A.
        outputs: G.
        tasks: how many tasks have reached it.
    """

    arrangement: Any
    inputs: Spectrum
    outputs: Spectrum
    tasks: int = 1

    @classmethod
    def of(cls, moments: "Moments", cut: "Cut", unit: float, earlier: "HeldLayer | None" = None, fade: float = 1.0) -> Self:
        """Join what was measured with what earlier tasks left: A is the mean over tasks, G the sum.

        So the quadratic grows as a sum over tasks does, and not with their number squared.

        Args:
            moments: what was measured.
            cut: how much of it to keep.
            unit: what to divide G by.
            earlier: the layer as earlier tasks left it.
            fade: what to multiply its G by.
        """
        tasks = 1 if earlier is None else earlier.tasks + 1
        before = (None, None) if earlier is None else (earlier.inputs, earlier.outputs)
        inputs = moments.inputs.scaled(1 / tasks).spectrum(*cut, before[0], 1 - 1 / tasks)
        outputs = moments.outputs.scaled(1 / unit).spectrum(*cut, before[1], fade)
        return cls(moments.arrangement, inputs, outputs, tasks)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Put other tensors in the place of all that are held."""
        inputs, outputs = (Spectrum(*map(change, side)) for side in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)

    def faded(self, factor: float) -> Self:
        """Multiply G by a number."""
        return replace(self, outputs=self.outputs.scaled(factor))

    def names(self, weight: str) -> list[str]:
        """Name the layer's parameters."""
        return self.arrangement.names(weight)  # type: ignore[no-any-return]

    def content(self) -> dict[str, Any]:
        """Return the layer as plain values and tensors, for state files."""
        sides = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {**self.arrangement._asdict(), **sides, "tasks": self.tasks}

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held."""
        return [*self.inputs, *self.outputs]

    @abstractmethod
    def leading(self, weight: str) -> list[str]:
        """Name the parameters that the layer is pulled for, once they have moved; others are pulled along."""

    def pulled_for(self, weight: str, moved: Collection[str]) -> list[str]:
        """Name those of the parameters that have moved that the layer is pulled for: its bias only where no other has."""
        leading = [name for name in self.leading(weight) if name in moved]
        return leading or [name for name in self.names(weight) if name in moved]

    @abstractmethod
    def moves(
        self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what to take off parameters for a proximal pull, to be taken off before the next one is asked for.

        Args:
            weight: the layer's name.
            theta: the parameters as they are, by name.
            point: the parameters after earlier tasks.
            steps: the lengths of the steps of those parameters that the layer is pulled for.
        """

    @abstractmethod
    def penalty_at(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> Tensor:
        """Return tr(D^T G D A); a parameter that `theta` lacks counts as unmoved."""

    @abstractmethod
    def importance(self, weight: str, point: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the quadratic's diagonal at the point, in the order of `names`, each part in the shape of its parameter."""

    @abstractmethod
    def totals(self, weight: str, point: Mapping[str, Tensor]) -> list[float]:
        """Return the sum of the quadratic's diagonal over each parameter, in the order of `names`."""

    @abstractmethod
    def followed(self, weight: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Self | None:
        """Follow parameters that grew, moved to another device or went away; None where they cannot be held as one any more.

        Args:
            weight: the layer's name.
            old: the point so far, by name.
            new: the point for the parameters as they are now.
        """

    @abstractmethod
    def renamed(self, weight: str, names: Mapping[str, str]) -> Self | None:
        """Return the layer with its parameters under other names; None where they cannot be held as one any more."""


def read_sides(content: Mapping[str, Any], sizes: tuple[int, int, int]) -> tuple[Spectrum, Spectrum, int]:
    """Return A, G and the number of tasks of a layer's content.

    Raises:
        ValueError: if they do not fit the sizes: the groups, the outputs of a group and its inputs.
    """
    groups, rows, columns = sizes
    if type(content["tasks"]) is not int or content["tasks"] < 1:
        raise ValueError("tasks")
    inputs, outputs = (Spectrum(*content[key]) for key in ("inputs", "outputs"))
    for key, side, size in (("inputs", inputs, columns), ("outputs", outputs, rows)):
        if not _fits(side, groups, size):
            raise ValueError(key)
    return inputs, outputs, content["tasks"]


def _fits(side: Spectrum, groups: int, size: int) -> bool:
    """Return whether what a file holds is a spectrum of matrices of some size."""
    rank = side.values.shape[-1]
    shapes = [(groups, rank, size), (groups, rank), (groups, 1)]
    if [t.shape for t in side[:3]] != shapes or side.rest.shape not in ((groups, 1), (groups, size)):
        return False
    return all(t.is_floating_point() for t in side) and all(bool((t >= 0).all()) for t in side[1:])
