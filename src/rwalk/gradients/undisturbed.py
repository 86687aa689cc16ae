"""A pass over a model that leaves no trace: modes, attributes, statistics, gradients and random state are as before."""

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from rwalk._errors import explain
from rwalk.parameters import bare

set_aside: WeakSet[nn.Module] = WeakSet()
"""Models in an undisturbed pass, which `Squares` does not watch."""

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has: its tables of parameters, buffers, modules and hooks."""

MADE = ("_parameters", "_modules", "_non_persistent_buffers_set")
"""Those of them to which a call of the module may add what it makes; buffers are kept apart."""


HOLDERS = (nn.Module, tuple, list, dict, set, deque)
"""What is looked into."""

VALUES = Tensor | torch.dtype | torch.device | torch.Size
"""What of torch an object may hold."""

MOST = 100
"""Objects that one plain object may hold, all of them together."""


def _plain(value: Any) -> bool:
    """Tell whether an object has attributes, and holds values alone: no modules, data or other machinery of training."""
    known: dict[int, Any] = {}
    waiting = [value] if _followed(value) else []
    while waiting and len(known) <= MOST:
        held = waiting.pop()
        foreign = type(held).__module__.partition(".")[0] == "torch" and not isinstance(held, VALUES)
        if foreign or isinstance(held, nn.Module | Dataset):
            return False
        if id(held) not in known and (_followed(held) or isinstance(held, HOLDERS)):
            known[id(held)] = held
            waiting += held.values() if isinstance(held, dict) else vars(held).values() if _followed(held) else held
    return 0 < len(known) <= MOST


def _followed(value: Any) -> bool:
    """Tell whether an object's attributes are looked at: one of a class of the user's, or a mere holder of names."""
    origin = type(value).__module__.partition(".")[0]
    known = origin in sys.stdlib_module_names and origin not in ("types", "collections", "__main__")
    odd = isinstance(value, (*HOLDERS, Tensor, type, ModuleType)) or callable(value)
    return hasattr(value, "__dict__") and not known and not odd


class Attributes:
    """The attributes of modules and of those in them, and what lists, dicts, sets and deques there hold, as they are now.

    Objects that hold nothing else are looked into as well. `tensors` are those found.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        known: dict[int, Any] = {}
        waiting = [*roots]
        while waiting:
            value = waiting.pop()
            if id(value) in known:
                continue
            known[id(value)] = value
            if type(value) is Tensor:
                self.tensors += [value] if value.layout == torch.strided else []
            elif not isinstance(value, HOLDERS):
                if _plain(value):
                    self._tables.append((vars(value), dict(vars(value))))
                    waiting += vars(value).values()
            elif isinstance(value, nn.Module):
                kept = {key: v for key, v in vars(value).items() if key not in INTERNAL}
                self._tables.append((vars(value), kept))
                made = [vars(value).get(key) for key in MADE]
                self._contents += [(table, _content(table)) for table in made if isinstance(table, dict | set)]
                waiting += [*kept.values(), *value.children()]
            else:
                waiting += value.values() if isinstance(value, dict) else value
                if not isinstance(value, tuple):
                    self._contents.append((value, _content(value)))

    def restore(self) -> None:
        """Put everything back that is not as it was."""
        for table, kept in self._tables:
            for key in [key for key in table if key not in INTERNAL and key not in kept]:
                del table[key]
            table.update({key: value for key, value in kept.items() if key not in table or table[key] is not value})
        for value, kept in self._contents:
            if not _same(value, kept):
                value.clear()
                value.extend(kept) if isinstance(value, list | deque) else value.update(kept)

    def state(self, works: Callable[[], Any]) -> str | None:
        """Return the name of an attribute that holds tensors, and without which something works that fails with it."""
        for table, kept in self._tables:
            for key, value in kept.items():
                if any(isinstance(t, Tensor) for t in (value if isinstance(value, tuple | list) else [value])):
                    try:
                        table[key] = None
                        kept[key] = None
                        works()
                    except Exception:
                        continue
                    else:
                        return key
                    finally:
                        table[key] = kept[key] = value
        return None


def _content(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _same(now: Any, kept: Any) -> bool:
    if len(now) != len(kept):
        return False
    if isinstance(now, dict):
        return all(map(is_, now, kept)) and all(map(is_, now.values(), kept.values()))
    return now == set(kept) if isinstance(now, set) else all(map(is_, now, kept))


class Buffers:
    """The buffers of modules and of those in them, except of those in `others`, their values, and those of other `tensors`."""

    def __init__(self, roots: Iterable[nn.Module], others: Collection[nn.Module], tensors: Sequence[Tensor]) -> None:
        modules = {m: None for root in roots for m in root.modules() if m not in others}
        self._tables = [(m._buffers, dict(m._buffers.items())) for m in modules]
        buffers = [b for _, kept in self._tables for b in kept.values() if b is not None]
        self._surely, tensors = len(buffers), [*buffers, *tensors]
        self._values = [(b, b.detach().clone()) for b in tensors]
        self._versions = [_version(b) for b in tensors]

    @torch.no_grad()
    def restore(self, surely: bool = True) -> None:
        """Put the tensors back, and their values; without `surely` where it is known that they were written into."""
        for table, kept in self._tables:
            for key in set(table.keys()) - set(kept):
                del table[key]
            for key, buffer in kept.items():
                if key not in table or table[key] is not buffer:
                    table[key] = buffer
        for i, (buffer, value) in enumerate(self._values):
            written = (surely and i < self._surely) or self._versions[i] != _version(buffer) or self._versions[i] < 0
            if written and not torch.equal(
                buffer, value
            ):  # a write, even of the same, would invalidate graphs that the user holds
                buffer.copy_(value)
            self._versions[i] = _version(buffer)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written into, -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


class Kept:
    """What a call of a model may change, as it was.

    Args:
        root: the model.
        others: what is called with it, such as a loss: a module, or a method of one, is kept as the model is.
        changing: modules of the model whose buffers may change.
    """

    def __init__(self, root: nn.Module, others: Sequence[Any] = (), changing: Collection[nn.Module] = ()) -> None:
        roots = [root, *(getattr(other, "__self__", other) for other in others)]
        modules = [value for value in roots if isinstance(value, nn.Module)]
        self._attributes = Attributes(roots)
        self._buffers = Buffers(modules, changing, self._attributes.tensors)

    def restore(self, surely: bool = False) -> None:
        """Put back attributes and buffers, so that no call of the model sees what an earlier one left in it."""
        self._attributes.restore()
        self._buffers.restore(surely)

    def call(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a model as it was.

        Raises:
            ValueError: if it fails because of what an attribute holds from an earlier batch.
        """

        def run() -> Any:
            self.restore()
            return model(*args, **kwargs)

        try:
            return run()
        except Exception as error:
            name = self._attributes.state(run)
            if name is None:
                raise
            came = f"a model whose attribute `{name}` is left from an earlier batch and does not fit the examples"
            raise ValueError(
                explain(came, "a model that can begin with any of them", f"Set `{name}` to None before.")
            ) from error


@contextmanager
def undisturbed(model: nn.Module, *others: Any) -> Iterator[Kept]:
    """Evaluate a model, differentiably and eagerly, and leave no trace.

    Inside, the whole model is in evaluation mode and gradients are enabled, also for callers under `torch.no_grad()`.
    Afterwards, whatever happens, every module's own mode and attributes, all buffers, all `.grad` fields and the global random
    state of torch (that of the CPU and of the model's CUDA devices) are as before, and so are attributes and buffers of a loss
    and of other `others` that are modules or methods of such. Yields what can be restored in between.
    """
    root = bare(model)
    modes = [(module, module.training) for module in root.modules()]
    kept = Kept(root, others)
    grads = [(p, p.grad) for p in root.parameters()]
    hooks = [(p, p._backward_hooks) for p in root.parameters() if p._backward_hooks]
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    already = root in set_aside
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels of attention cannot be mapped over examples
        stack.enter_context(_without_cudnn())  # it has no backward for RNNs in evaluation mode
        if "torch._dynamo" in sys.modules:  # anything may be compiled: a module in its place, a method, a function it calls
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            set_aside.add(root)
            root.eval()
            for p, _ in grads:
                p.grad = None
            for p, _ in hooks:  # they are about training, and nobody would call them under `vmap`
                p._backward_hooks = None
            yield kept
        finally:
            if not already:
                set_aside.discard(root)
            kept.restore(surely=True)
            for module, training in modes:
                module.training = training
            for p, grad in grads:
                p.grad = grad
            for p, own in hooks:
                p._backward_hooks = own


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have gradients of frozen parameters, too."""
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off; `torch.backends.cudnn.flags` would also set TF32, and fail where a user has set it for one operator."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
