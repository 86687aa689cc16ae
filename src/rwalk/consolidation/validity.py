"""Steps that must leave no trace: those that a loss scaler leaves out, and those whose gradients are not finite.

A flag on a GPU is not waited for: the step goes ahead, its pass over memory reads the flag on the device and writes nothing if
it is set, and what the host has counted meanwhile is taken back before the next use. By then the flag has been copied, so that
the host waits for no work that came after it.
"""

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwalk._parameters import listed
from rwalk.distributed.shards import ShardGroup

ACCEPTED = torch.zeros((), device="cpu")
"""The flag of a step that counts, on the host."""


class AsyncFlag(NamedTuple):
    """What a flag says, on its way to the host.

    Args:
        value: where it arrives.
        event: has happened when it is there; None where it need not be sent.
    """

    value: Tensor
    event: Any

    @classmethod
    def of(cls, flag: Tensor) -> "AsyncFlag":
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


class PendingCheck(NamedTuple):
    """A step whose validity check is still pending.

    Args:
        flag: one element, not 0 if the step does not count.
        before: the rule's state before it.
        bad: for each parameter 0 unless its gradient is not finite, where the flag comes from gradients.
        names: the parameters' names, parallel to `bad`.
        step: the step's number in its task, from 1.
        answer: the flag on its way to the host, once it was sent.
    """

    flag: Tensor
    before: Any
    bad: Tensor | None = None
    names: tuple[str, ...] = ()
    step: int = 0
    answer: AsyncFlag | None = None

    @classmethod
    def of_gradients(cls, bad: Tensor, before: Any, names: Iterable[str], step: int, shard_group: ShardGroup) -> "PendingCheck":
        """Look at what is known of the gradients: of those of all ranks."""
        bad = shard_group.sum_(bad.float()) if shard_group.groups else bad
        if bad.is_cpu and not bool(bad.any()):
            return cls(ACCEPTED, before)
        return cls(bad.sum(), before, bad, tuple(names), step)

    @property
    def on_device(self) -> bool:
        """Whether the flag is on a device that would have to be waited for."""
        return not self.flag.is_cpu

    def sent(self) -> "PendingCheck":
        """Start copying the flag to the host, which need not wait for it."""
        return self._replace(answer=AsyncFlag.of(self.flag))

    def fails(self) -> bool:
        """Return whether the step does not count."""
        return bool(self.flag) if self.answer is None else self.answer.read()

    def passed(self) -> "PendingCheck":
        """Return the check of a step that counts."""
        return self._replace(flag=ACCEPTED)

    def raise_if_not_finite(self) -> None:
        """Raise the error that is due if gradients were not finite."""
        if self.bad is None:
            return
        bad = [name for name, fine in zip(self.names, self.bad.eq(0).tolist(), strict=True) if not fine]
        late = ", found one step later, as nothing waits for the device" if self.on_device else ""
        raise FloatingPointError(
            f"The gradients of {listed(bad)} are not finite, or their squares are not, at step {self.step} of this "
            f"task{late}. What has been measured so far is untouched. Look for the cause in the loss or the data, or build "
            'the consolidator with `nonfinite="skip"` to leave out such steps.'
        )


def loss_scale(optimizer: Optimizer) -> Tensor | None:
    """Return the loss scale in the gradients that a `GradScaler` has given to a fused optimiser."""
    return _scalar(getattr(optimizer, "grad_scale", None))


def scaler_scale() -> float:
    """Return what the `GradScaler` that makes the present step has multiplied the loss by; 1 where none makes it.

    The stack is asked, as a scaler leaves no trace on an optimiser whose gradients it has divided itself.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "step":
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler):
                return float(scaler.get_scale())
        frame = frame.f_back
    return 1.0


def skip_flag(optimizer: Optimizer) -> Tensor | None:
    """Return the flag by which a `GradScaler` has a fused optimiser skip this step."""
    return _scalar(getattr(optimizer, "found_inf", None))


def refuse_capture() -> None:
    """Raise a RuntimeError where the step would become part of a CUDA graph."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "This step is captured in a CUDA graph, whose replays the consolidator would not see. Capture the forward and "
            "backward pass alone, and call `optimizer.step()` outside of the graph."
        )


def _scalar(value: Any) -> Tensor | None:
    return value.reshape(()) if isinstance(value, Tensor) else None
