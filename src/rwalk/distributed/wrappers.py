"""What wraps a model: DistributedDataParallel, `fully_shard`, `torch.compile` and Fabric."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rwalk.distributed.shards import sharded


def wrapped_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside `torch.compile`, Lightning's Fabric or DistributedDataParallel; None if there is no wrapper."""
    for name in ("_orig_mod", "_forward_module"):
        if (found := getattr(model, name, None)) is not None:
            return found  # type: ignore[no-any-return]
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None


def reshard_fsdp(model: nn.Module) -> None:
    """Free the full parameters that a forward pass under `fully_shard` has left in place, so that shards are in use again."""
    fsdp = _fsdp_class()
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp):
            module.reshard()


def module_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class as it was before `fully_shard` put its own in front."""
    return type(module).__mro__[2] if _fsdp_class() is not None and isinstance(module, _fsdp_class()) else type(module)


def _fsdp_class() -> Any:
    """Return the class of modules under `fully_shard`; None if it has not been loaded."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


@contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """Put full copies in the place of sharded parameters, so that each rank can go through its own data at its own pace.

    Entering is collective. Inside, the hooks of `fully_shard` are off.
    """
    reshard_fsdp(model)
    places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if sharded(p)]
    distinct = {id(p): p for _, _, p in places}
    copies = {key: nn.Parameter(p.detach().full_tensor(), p.requires_grad) for key, p in distinct.items()}
    tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)] if places else []
    hooks = [(table, dict(table)) for table in tables]
    try:
        for table, before in hooks:
            for key in [key for key, hook in before.items() if _is_fsdp_hook(hook)]:
                del table[key]
        for module, name, p in places:
            module._parameters[name] = copies[id(p)]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
        for table, before in hooks:
            table.clear()
            table.update(before)


def _is_fsdp_hook(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
