"""The backward passes of one measured step: what they have told, without those whose gradients were dropped."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rwalk.anchors.spectrum import Addition, add_sums
from rwalk.distributed.shards import local
from rwalk.gradients.layer_moments import LayerSums, WeightGradient


@dataclass
class PassSums:
    """What some backward passes have told.

    Args:
        layers: sums of layers, by the names of their weights.
        sizes: how many examples each forward pass had that the gradients have come from, by its number; see `StepPasses.use`.
        made: the gradients of weights that follow from their layers.
        given: the gradients that these weights have got, as `probed` gives them.
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    made: dict[str, WeightGradient] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """How many examples there were; uses outside of the model's own forward passes count where there are no others."""
        return sum(size for n, size in self.sizes.items() if n > 0) or sum(self.sizes.values()) or 1

    def count(self, number: int, size: int) -> None:
        """Count the examples of a forward pass; of uses outside of one only those of the first."""
        before = next((n for n in self.sizes if n < 0), number) if number < 0 else number
        if before <= number:
            self.sizes.pop(before, None)
            self.sizes[number] = size

    def keep(self, weight: str, gradient: Tensor) -> None:
        """Keep the gradient of a weight, as `probed` gives it."""
        known = self.given.get(weight)
        self.given[weight] = gradient if known is None else known + gradient

    def join(self, other: "PassSums") -> None:
        """Add the sums of another pass of the same step, which is used up."""
        additions: list[Addition] = []
        for weight, sums in other.layers.items():
            mine = self.layers.setdefault(weight, sums)
            additions += [] if mine is sums else mine.joining(sums, 1.0)
        add_sums(additions)
        self.sizes |= other.sizes


class StepPasses:
    """Keeps what the last backward pass has told apart until it is known whether its gradients were.

    Args:
        parameters: those whose gradients tell.

    Attributes:
        kept: the sums of earlier passes whose gradients are still there.
        odd: weights whose gradients in one of these are not those of their layers.
        calls: how many examples each forward pass of the model had.
    """

    def __init__(self, parameters: Collection[nn.Parameter]) -> None:
        self._parameters = parameters
        self.kept, self.odd = PassSums(), set[str]()
        self.calls: list[int] = []
        self._uses = 0
        self._last, self._begun = PassSums(), -1
        self._before: list[tuple[Tensor, int]] = []

    def use(self, output: Tensor) -> tuple[int, int]:
        """Return the number and the size of the forward pass that a use belongs to; below 0 where the model was not called."""
        if self.calls:
            return len(self.calls), self.calls[-1]
        self._uses += 1
        return -self._uses, output.shape[0] if output.dim() > 1 else 1

    def during(self, backward: int | None = None) -> PassSums:
        """Return the sums of a backward pass, of the last one unless told; as one begins, see what has become of that."""
        if backward is not None and backward != self._begun:
            self._settle()
            self._begun, self._before = backward, self._gradients()
        return self._last

    def end(self) -> PassSums:
        """Return the sums of the step, whose gradients are there now."""
        if not self.kept.layers or self._changed(self._gradients()):
            self._join()
        return self.kept

    def _settle(self) -> None:
        """Join the last pass with earlier ones, or drop it if its gradients came to nothing, or all if nothing is left."""
        if not self._last.layers and not self._last.given:
            return
        now = self._gradients()
        if now and not self._changed(now):
            self._last = PassSums()  # as after `torch.autograd.grad`
        elif any(bool(local(g).any()) for g, _ in now):
            self._join()
        else:
            self.kept, self._last, self.odd = PassSums(), PassSums(), set()

    def _join(self) -> None:
        """Join the last pass with earlier ones; weights that were used outside of layers alone are compared with the next."""
        last, self._last = self._last, PassSums()
        self.odd |= {w for w, made in last.made.items() if w in last.given and not made.fits(last.given[w])}
        self._last.given = {w: g for w, g in last.given.items() if w not in last.made}
        self.kept.join(last)

    def _gradients(self) -> list[tuple[Tensor, int]]:
        """List the gradients that are there, and how often each was written to."""
        return [(g, g._version) for p in self._parameters if p.requires_grad and (g := p.grad) is not None]

    def _changed(self, now: list[tuple[Tensor, int]]) -> bool:
        """Return whether gradients are others than before the last backward pass."""
        same = (a is b and n == m for (a, n), (b, m) in zip(now, self._before, strict=False))
        return len(now) != len(self._before) or not all(same)


def backward_pass() -> int:
    """Return the number of the backward pass that is under way, -1 outside of one."""
    return torch._C._current_graph_task_id()
