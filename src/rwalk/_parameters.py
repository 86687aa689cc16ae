"""Which parameters are protected, under which names, and how their tensors follow a model that grows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rwalk._errors import printable
from rwalk.distributed.wrappers import reshard_fsdp, wrapped_module


def listed(names: Sequence[str]) -> str:
    """Write names for a message, the first five of them."""
    shown = ", ".join(f"`{printable(str(name), keep='')}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def bare(model: nn.Module) -> nn.Module:
    """Return the user's own module behind `torch.compile` and distributed wrappers."""
    while (within := wrapped_module(model)) is not None:
        model = within
    return model


def once_built(model: nn.Module, then: Callable[[], None]) -> None:
    """Call a function once a model that is being copied or unpickled is there: now, or when its last module takes its state."""
    waiting = _unbuilt(model)
    if waiting is None:
        then()
        return
    build: Callable[[Any], None] = waiting.__setstate__

    def built(state: Any) -> None:
        build(state)
        vars(waiting).pop("__setstate__", None)
        once_built(model, then)

    vars(waiting)["__setstate__"] = built  # which copies and pickles look for on the object itself


def _unbuilt(model: nn.Module) -> nn.Module | None:
    """Return a module of a model that has no state yet, as while something that it holds is copied; None if all have."""
    if "_modules" not in vars(model):
        return model
    return next((m for child in model._modules.values() if child is not None and (m := _unbuilt(child)) is not None), None)


def named_parameters(model: nn.Module, only: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """Map the names of a model's parameters, as they are without compilation, to the parameters; tied ones appear once."""
    reshard_fsdp(model)
    found = {name.replace("_orig_mod.", ""): p for name, p in bare(model).named_parameters()}
    return found if only is None else {name: p for name, p in found.items() if name in only}


def refuse_odd(theta: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for parameters that are complex, or were made in inference mode."""
    odd = [name for name, p in theta.items() if p.is_complex()]
    if odd:
        raise ValueError(f"The parameters {listed(odd)} are complex. Hold their real and imaginary parts as real tensors.")
    fixed = [name for name, p in theta.items() if p.is_inference()]
    if fixed:
        raise ValueError(
            f"The parameters {listed(fixed)} were made in `torch.inference_mode()`. Build the model outside of it."
        )


def refuse_uninitialised(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for parameters that have no shape yet."""
    lazy = [name for name, p in parameters.items() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"The parameters {listed(lazy)} of a lazy module have no shape yet. Run the model once on a batch before."
        )


def state_dtype(theta: Tensor) -> torch.dtype:
    """Return the precision of state: that of the parameter, float32 at the least."""
    return torch.promote_types(theta.dtype, torch.float32)


def zero(theta: Tensor) -> Tensor:
    """Make zero state beside a parameter: its shape, device and memory order."""
    return torch.zeros_like(theta, dtype=state_dtype(theta), requires_grad=False)


def copy(theta: Tensor) -> Tensor:
    """Copy a parameter into state precision."""
    return theta.detach().to(state_dtype(theta), copy=True)


def exact_copy(theta: Tensor) -> Tensor:
    """Copy a parameter in the fewest bytes that lose nothing: bfloat16 where a checkpoint in that precision was loaded."""
    theta = theta.detach()
    if theta.dtype is torch.float32 and theta.is_contiguous() and _is_bfloat16(theta.flatten()[:256]) and _is_bfloat16(theta):
        return theta.bfloat16()
    return theta.clone()


def _is_bfloat16(tensor: Tensor) -> bool:
    return torch.equal(tensor.bfloat16().float(), tensor)


def zeros(theta: Sequence[Tensor]) -> list[Tensor]:
    """Make zero state beside parameters."""
    return [zero(t) for t in theta]


def copies(theta: Sequence[Tensor]) -> list[Tensor]:
    """Copy parameters into state precision."""
    return [copy(t) for t in theta]


def grown(old: torch.Size, new: torch.Size) -> bool:
    """Return whether a tensor of shape `old` can be the leading block of one of shape `new`."""
    return len(old) == len(new) and all(a <= b for a, b in zip(old, new, strict=True))


def grow_tensor(old: Tensor | None, now: Tensor, fresh: Callable[[Tensor], Tensor]) -> Tensor:
    """Carry state over to a parameter as it is now: as it was, or as the leading block of fresh state where `now` is larger.

    Args:
        old: state of the parameter as it was, None if there is none to keep.
        now: the parameter, of the same shape or grown.
        fresh: makes state for all of a parameter.
    """
    if old is not None and old.shape == now.shape:
        return old.to(now.device, state_dtype(now))
    whole = fresh(now)
    if old is not None:
        whole[tuple(slice(n) for n in old.shape)] = old
    return whole
