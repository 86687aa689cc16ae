"""Steps that must leave no trace: those that a loss scaler leaves out, and those whose gradients are not finite.

A flag on a GPU is not waited for: the step goes ahead, its visit of memory reads the flag on the device and writes nothing if
it is set, and what the host has counted meanwhile is taken back before the next use. By then the flag has been copied, so that
the host waits for no work that came after it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk._errors import explain
from rwalk.parallel import ALONE, Spread

COUNTS = torch.zeros((), device="cpu")
"""The flag of a step that counts, on the host."""


class Answer(NamedTuple):
    """What a flag says, on its way to the host.

    Args:
        value: where it arrives.
        event: has happened when it is there; None where it need not be sent.
    """

    value: Tensor
    event: Any

    @classmethod
    def of(cls, flag: Tensor) -> "Answer":
        """Send for it."""
        if not flag.is_cuda:
            return cls(flag, None)
        value = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device_of(flag):
            value.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return cls(value, event)

    def read(self) -> bool:
        """Wait for it."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


class Doubt(NamedTuple):
    """A step of which it is not known yet whether it counts.

    Args:
        flag: one element, not 0 (a NaN, where it comes from gradients) if the step does not count.
        before: the rule's state before it.
        norms: the norm of each gradient, where the flag comes from them.
        names: the parameters' names, parallel to `norms`.
        step: the step's number in its task, from 1.
        answer: what the flag says, once it has been asked.
    """

    flag: Tensor
    before: Any
    norms: Tensor | None = None
    names: tuple[str, ...] = ()
    step: int = 0
    answer: Answer | None = None

    @classmethod
    def of(cls, before: Any, grad: Mapping[str, Tensor], skip: Tensor | None, step: int, spread: Spread = ALONE) -> "Doubt":
        """Take a loss scaler's word for a step where there is one, else look at the gradients: at those of all ranks."""
        if skip is not None:
            return cls(skip, before)
        if not grad:
            return cls(COUNTS, before)
        norms = spread.sum_(norms_of(grad))
        if norms.is_cpu and all(map(math.isfinite, norms.tolist())):
            return cls(COUNTS, before)
        total = norms.sum()
        return cls(total - total, before, norms, tuple(grad), step)

    @property
    def open(self) -> bool:
        """Whether the flag is on a device that would have to be waited for."""
        return not self.flag.is_cpu

    def asked(self) -> "Doubt":
        """Have the flag sent to the host, which can do other things meanwhile."""
        return self._replace(answer=Answer.of(self.flag))

    def fails(self) -> bool:
        """Tell whether the step does not count."""
        return bool(self.flag) if self.answer is None else self.answer.read()

    def settled(self) -> "Doubt":
        """Return the doubt of a step that counts."""
        return self._replace(flag=COUNTS)

    def refuse(self) -> None:
        """Raise the error that is due if gradients were not finite."""
        if self.norms is None:
            return
        bad = [name for name, fine in zip(self.names, torch.isfinite(self.norms).tolist(), strict=True) if not fine]
        late = "" if not self.open else ", found one step later, as nothing waits for the device"
        raise FloatingPointError(
            explain(
                f"gradients of {', '.join(f'`{name}`' for name in bad[:5])} that are not finite, or whose squares are not, "
                f"at step {self.step} of this task{late}",
                "finite gradients; what has been measured so far is untouched",
                "Look for the cause in the loss or the data, or leave out such steps: build the consolidator with "
                '`nonfinite="skip"`.',
            )
        )


def scaling(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """Return what a `GradScaler` has told a fused optimiser: the loss scale in its gradients, and whether it skips the step."""
    scale, skip = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    return tuple(t.reshape(()) if isinstance(t, Tensor) else None for t in (scale, skip))  # type: ignore[return-value]


def norms_of(grad: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each gradient: infinite or no number if an element or its square is. One pass, nothing kept.

    A sum of squares may overflow where no single one does, from elements of 1e18 on; such a gradient is refused too.
    """
    kinds = {g.dtype for g in grad.values()}
    if torch.float16 in kinds:  # norms may exceed its range
        each = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grad.values()]
    else:
        each = list(torch._foreach_norm(list(grad.values())))
    if len(kinds) > 1 or len({n.device for n in each}) > 1:
        each = [n.to(each[0].device, torch.float64) for n in each]
    return torch.stack(each)
