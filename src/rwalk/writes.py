"""Writes to weights that no observed step has made: by the user, by a callback, or by a checkpoint that is loaded.

A write in place raises a tensor's version, unless it goes past autograd, as through `.data` or NumPy. So a few elements of the
largest tensors are looked at too, which finds whatever changes a whole model.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

TENSORS, ELEMENTS = 3, 32
"""How many tensors are looked at, and how many elements of each."""


class Writes:
    """What parameters were like when they were noted: at first all of `theta`, later those that a step has moved."""

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        largest = sorted((name for name, t in theta.items() if t.numel()), key=lambda name: theta[name].numel())[-TENSORS:]
        self._versions = {name: t._version for name, t in theta.items()}
        self._probes = {name: _some(theta[name]).clone() for name in largest}

    @property
    def known(self) -> bool:
        """Whether anything was noted."""
        return bool(self._versions)

    def note(self, theta: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Note what parameters of these names are like now."""
        for name in names:
            self._versions[name] = theta[name]._version
            if name in self._probes:
                self._probes[name] = _some(theta[name]).clone()

    def found(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name the parameters that have been written to since, all if elements alone tell; comparing waits for a device."""
        seen = self.seen(theta)
        unseen = any(name not in seen and name in theta and _unlike(theta[name], old) for name, old in self._probes.items())
        return list(theta) if unseen else seen

    def seen(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name those that have been written to in sight of autograd, which waits for nothing."""
        return [name for name, t in theta.items() if self._versions.get(name, t._version) != t._version and t.numel()]


def _some(tensor: Tensor) -> Tensor:
    """View a few elements, spread over the tensor's memory."""
    count = min(tensor.numel(), ELEMENTS)
    return tensor.detach().as_strided((count,), (tensor.numel() // count,))


def _unlike(tensor: Tensor, old: Tensor) -> bool:
    """Tell whether elements differ; a tensor that grew, or is now of another kind, does not say."""
    now = _some(tensor)
    return now.shape == old.shape and now.dtype == old.dtype and not torch.equal(now.to(old.device), old)
