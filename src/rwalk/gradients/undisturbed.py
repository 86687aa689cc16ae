"""A pass over a model that leaves no trace: modes, statistics, gradients and random state are as before."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rwalk.parameters import bare

set_aside: WeakSet[nn.Module] = WeakSet()
"""Models in an undisturbed pass, which `Squares` does not watch."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate a model, differentiably and eagerly, and leave no trace.

    Inside, the whole model is in evaluation mode and gradients are enabled, also for callers under `torch.no_grad()`.
    Afterwards, whatever happens, every module's own mode, all buffers, all `.grad` fields and the global random state of torch
    (that of the CPU and of the model's CUDA devices) are as before.
    """
    root = bare(model)
    modes = [(module, module.training) for module in root.modules()]
    buffers = [(m, k, b, b.detach().clone()) for m in root.modules() for k, b in m._buffers.items() if b is not None]
    grads = [(p, p.grad) for p in root.parameters()]
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    already = root in set_aside
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels of attention cannot be mapped over examples
        stack.enter_context(_without_cudnn())  # it has no backward for RNNs in evaluation mode
        if any(hasattr(module, "_orig_mod") for module in root.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            set_aside.add(root)
            root.eval()
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            if not already:
                set_aside.discard(root)
            _restore(modes, buffers, grads)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off; `torch.backends.cudnn.flags` would also set TF32, and fail where a user has set it for one operator."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@torch.no_grad()
def _restore(
    modes: list[tuple[nn.Module, bool]],
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]],
    grads: list[tuple[nn.Parameter, Tensor | None]],
) -> None:
    for module, training in modes:
        module.training = training
    for module, name, tensor, value in buffers:
        module._buffers[name] = tensor
        if not torch.equal(tensor, value):  # a write, even of the same, would invalidate graphs that the user holds
            tensor.copy_(value)
    for p, grad in grads:
        p.grad = grad
