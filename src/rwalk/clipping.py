"""Gradients as they were before the user clipped them, for rules that are to see those."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from rwalk._errors import explain


class Unclipped(NamedTuple):
    """Copies of gradients, to be observed at the next step.

    Args:
        grad: the copies, by name.
        scaler: the loss scaler that had unscaled them; None for none.
    """

    grad: dict[str, Tensor]
    scaler: GradScaler | None

    @classmethod
    def of(cls, grad: Mapping[str, Tensor], optimizer: Optimizer, scaler: GradScaler | None) -> "Unclipped":
        """Copy gradients, or raise a RuntimeError where there are none or a loss scale is still in them."""
        if not grad:
            raise RuntimeError(
                explain(
                    "`before_clip` without gradients",
                    "gradients of parameters that the optimiser holds",
                    "Call it after `loss.backward()`, just before clipping.",
                )
            )
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if scaler is not None:
            state = scaler._per_optimizer_states.get(id(optimizer), {})
            if getattr(state.get("stage"), "name", "") != "UNSCALED":
                raise RuntimeError(
                    explain(
                        "`before_clip` with a loss scale still in the gradients",
                        "gradients that `scaler.unscale_` has divided by it since the last step",
                        "Call `scaler.unscale_(optimizer)`, then `memory.before_clip(scaler)`, then clip.",
                    )
                )
        return cls({name: g.detach().clone() for name, g in grad.items()}, scaler)

    def check(self, grad: Mapping[str, Tensor]) -> None:
        """Raise a RuntimeError unless these are the gradients of the step that is about to be made, before clipping."""
        if scaler_above() is not self.scaler:
            raise RuntimeError(
                explain(
                    "a step that another `GradScaler` makes than the one given to `before_clip`, or none",
                    "one `GradScaler` for both, or none",
                    "Call `scaler.unscale_(optimizer)`, then `memory.before_clip(scaler)`, clip, and `scaler.step(optimizer)`.",
                )
            )
        if self.grad.keys() != grad.keys():
            raise RuntimeError(
                explain(
                    "a step with gradients for other parameters than at the last `before_clip`",
                    "the same gradients, clipped",
                    "Call `before_clip` again after each new backward pass.",
                )
            )


def scaler_above() -> GradScaler | None:
    """Return the loss scaler that is making the current step; on optimisers that are not fused it leaves no other sign."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not GradScaler.step.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    scaler = None if frame is None else frame.f_locals["self"]
    return scaler if scaler is not None and scaler.is_enabled() else None
