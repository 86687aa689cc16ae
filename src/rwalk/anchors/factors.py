"""The quadratic of one linear layer as two small matrices: how its inputs vary, and how the gradients at its outputs do.

With D = [bias | weight] minus where they were, A the second moments of the inputs [1 | x] and G those of the gradients at the
outputs, it is tr(D^T G D A): all pairs of a layer's weights count, where a diagonal has each weight alone. Martens and Grosse
2015, arXiv 1503.05671; for continual learning Ritter, Botev and Barber 2018, arXiv 1805.07810.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwalk._parameters import state_dtype


class Spectrum(NamedTuple):
    """A symmetric matrix without negative eigenvalues, basis diag(values) basis^T."""

    basis: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Spectrum":
        """Decompose a matrix; eigenvalues that rounding has made negative become 0."""
        values, basis = torch.linalg.eigh(matrix.double())
        return cls(basis.to(matrix.dtype).contiguous(), values.clamp(min=0).to(matrix.dtype))  # as a file will give it back

    def matrix(self) -> Tensor:
        """Multiply the matrix out."""
        return (self.basis * self.values) @ self.basis.T

    def diagonal(self) -> Tensor:
        """Return the matrix's diagonal."""
        return self.basis.square() @ self.values

    def padded(self, size: int) -> "Spectrum":
        """Make the matrix the leading block of a larger one that is 0 elsewhere."""
        more = size - len(self.values)
        rest = torch.eye(more, dtype=self.basis.dtype, device=self.basis.device)
        return Spectrum(torch.block_diag(self.basis, rest), torch.nn.functional.pad(self.values, (0, more))) if more else self

    def beside(self, theta: Tensor) -> "Spectrum":
        """Move to a parameter's device and state precision."""
        return Spectrum(*(t.to(theta.device, state_dtype(theta)) for t in self))


class Moments(NamedTuple):
    """What is measured of a linear layer over a task's data.

    Args:
        bias: the name of its bias; None where it has none or that one is not protected.
        inputs: A, of shape (1 + inputs, 1 + inputs), or without the 1 where `bias` is None.
        outputs: G, of shape (outputs, outputs).
    """

    bias: str | None
    inputs: Tensor
    outputs: Tensor

    def unbiased(self) -> "Moments":
        """Leave the bias out."""
        return self if self.bias is None else Moments(None, self.inputs[1:, 1:], self.outputs)


@dataclass(frozen=True, eq=False)
class KroneckerFactor:
    """The quadratic tr(D^T G D A) of one linear layer, in the bases in which both matrices are diagonal.

    Args:
        bias: the name of its bias, None where that one is no part of it.
        inputs: A.
        outputs: G.
        tasks: how many tasks have reached it.
        deferred: what has not been pulled yet: the sum of 2 * strength * learning rate over steps, and their number.
    """

    bias: str | None
    inputs: Spectrum
    outputs: Spectrum
    tasks: int = 1
    deferred: list[float] = field(default_factory=lambda: [0.0, 0])

    @classmethod
    def of(cls, moments: Moments, earlier: "KroneckerFactor | None" = None) -> "KroneckerFactor":
        """Join what was measured with what earlier tasks left: A is the mean over tasks, G the sum.

        So the quadratic grows as a sum over tasks does, and not with their number squared. An earlier layer says whether the
        bias counts.
        """
        if earlier is None:
            return cls(moments.bias, Spectrum.of(moments.inputs), Spectrum.of(moments.outputs))
        now = moments if earlier.bias else moments.unbiased()
        inputs = earlier.inputs.matrix().lerp(now.inputs, 1 / (earlier.tasks + 1))
        outputs = earlier.outputs.matrix() + now.outputs
        return cls(earlier.bias, Spectrum.of(inputs), Spectrum.of(outputs), earlier.tasks + 1)

    def names(self, weight: str) -> list[str]:
        """Name the layer's parameters, in the order of the columns of D."""
        return [weight] if self.bias is None else [self.bias, weight]

    def omega(self, weight: str) -> dict[str, Tensor]:
        """Return the quadratic's diagonal, as importance by name."""
        parts = self.split(torch.outer(self.outputs.diagonal(), self.inputs.diagonal()))
        return {name: part.contiguous() for name, part in zip(self.names(weight), parts, strict=True)}

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Cut a matrix of the shape of D into parts of the shapes of the layer's parameters."""
        return [matrix] if self.bias is None else [matrix[:, 0], matrix[:, 1:]]

    def displacement(self, weight: str, theta: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> Tensor:
        """Return D; a parameter that `theta` lacks counts as unmoved."""
        parts = [
            theta[n].to(point[n].dtype) - point[n] if n in theta else torch.zeros_like(point[n]) for n in self.names(weight)
        ]
        return parts[0] if self.bias is None else torch.cat([parts[0].unsqueeze(1), parts[1]], 1)

    def penalty(self, displacement: Tensor) -> Tensor:
        """Return tr(D^T G D A)."""
        return self._in_bases(displacement).square().mul_(self._values()).sum()

    def proximal_move(self, displacement: Tensor, step: float) -> Tensor:
        """Return what to take off D for the minimum of step / 2 * tr(D'^T G D' A) + |D' - D|^2 / 2 over D'.

        In the two bases that is w / (1 + w) of each entry, with w = step * g_i * a_j.
        """
        share = self._values().mul_(step).reciprocal_().add_(1).reciprocal_()
        return self.outputs.basis @ share.mul_(self._in_bases(displacement)) @ self.inputs.basis.T

    def aligned(self, weight: Tensor, bias: bool) -> "KroneckerFactor":
        """Follow a weight that moved or grew, and drop the bias unless it is still there."""
        inputs = self.inputs
        if self.bias is not None and not bias:
            inputs = Spectrum.of(inputs.matrix()[1:, 1:])
        kept = self.bias if bias else None
        rows, columns = weight.shape
        sides = inputs.padded(columns + (kept is not None)), self.outputs.padded(rows)
        return replace(self, bias=kept, inputs=sides[0].beside(weight), outputs=sides[1].beside(weight))

    def content(self) -> dict[str, Any]:
        """Return the layer as plain values and tensors, for state files."""
        sides = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {"bias": self.bias, **sides, "tasks": self.tasks, "deferred": list(self.deferred)}

    @classmethod
    def read(cls, content: Mapping[str, Any], weight: str, point: Mapping[str, Tensor]) -> "KroneckerFactor":
        """Return the layer that `content` was made from.

        Raises:
            ValueError: if it does not fit the parameters of `point`.
        """
        bias, tasks = content["bias"], content["tasks"]
        deferred = content["deferred"] if "deferred" in content else content["owed"]  # its name in earlier versions
        sides = {key: Spectrum(*content[key]) for key in ("inputs", "outputs")}
        rows, columns = point[weight].shape
        for key, size in (("inputs", columns + (bias is not None)), ("outputs", rows)):
            fits = [t.shape for t in sides[key]] == [(size, size), (size,)] and all(t.is_floating_point() for t in sides[key])
            if not fits or not (sides[key].values >= 0).all():
                raise ValueError(key)
        if (bias is not None and point[bias].shape != (rows,)) or [type(v) for v in (tasks, *deferred)] != [int, float, int]:
            raise ValueError("bias, tasks or deferred")
        if tasks < 1 or not 0 <= deferred[0] < math.inf or deferred[1] < 0:
            raise ValueError("tasks or deferred")
        return cls(bias, sides["inputs"], sides["outputs"], tasks, list(deferred))

    def tensors(self) -> list[Tensor]:
        """List the tensors that are held."""
        return [*self.inputs, *self.outputs]

    def _in_bases(self, displacement: Tensor) -> Tensor:
        return self.outputs.basis.T @ displacement @ self.inputs.basis

    def _values(self) -> Tensor:
        return torch.outer(self.outputs.values, self.inputs.values)
