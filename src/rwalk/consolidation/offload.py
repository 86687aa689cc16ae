"""In which precision and on which device state is kept between its uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwalk.anchors.base import Anchor
from rwalk.rules.base import Rule


@dataclass(frozen=True)
class Offload:
    """How to keep state smaller, or elsewhere.

    Args:
        dtype: bfloat16 for importance; None for state precision. Everything else is always kept in state precision.
        device: "cpu" for the anchor and for what a rule calls `slow`, which is read only when a task ends: in pinned memory,
            from which copies need not be waited for; None for the parameters' device.
    """

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, dtype: Any, device: Any) -> "Offload":
        """Check what a user asked for.

        Raises:
            ValueError: for another precision than bfloat16, or another device than the CPU.
        """
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"`state_dtype` must be None or torch.bfloat16, but is {dtype}.")
        if device is not None and _device_type(device) != "cpu":
            raise ValueError(f'`state_device` must be None or "cpu", but is {device!r}.')
        return cls(dtype, None if device is None else torch.device(device))

    def keep(self, rule: Rule[Any], state: Any) -> Any:
        """Put a rule's state where it is kept."""
        for name in rule.slow:
            state = state._replace(**{name: [self._away(t) for t in getattr(state, name)]})
        return state

    def fetch(self, rule: Rule[Any], state: Any, theta: Sequence[Tensor]) -> Any:
        """Bring a rule's state back beside the parameters, for a task's end."""
        return state._replace(
            **{name: [_home(t, p) for t, p in zip(getattr(state, name), theta, strict=True)] for name in rule.slow}
        )

    def keep_anchor(self, anchor: Anchor) -> Anchor:
        """Put an anchor where it is kept."""
        if self.dtype is None and self.device is None:
            return anchor
        return anchor.kept(self._away, self._narrow)

    def _narrow(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _away(self, tensor: Any) -> Any:
        if tensor is None or self.device is None:
            return tensor
        there = tensor.to(self.device)
        return there.pin_memory() if torch.cuda.is_available() else there


def _device_type(device: Any) -> str | None:
    """Return the type of a device, None for what is no device."""
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        return None


def _home(tensor: Tensor | None, theta: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(theta.device)
