"""Passes over a model that leave no trace: modes, attributes, buffers, gradients and random state are restored."""

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
from torch.utils.data import Dataset

from rwalk._parameters import bare
from rwalk.gradients.shared import PLAIN_ATTENTION, UNCOMPILED, WITHOUT_CUDNN

models_in_isolation: WeakSet[nn.Module] = WeakSet()
"""Models inside `isolated`, whose hooks for training do nothing."""

MODULE_TABLES = frozenset(vars(nn.Module()))
"""Attributes that every module has: its tables of parameters, buffers, modules and hooks."""

RESTORED_TABLES = ("_parameters", "_modules", "_non_persistent_buffers_set")
"""Those of them that a call of the module may change; buffers are saved apart."""

CONTAINERS = (nn.Module, tuple, list, dict, set, deque)
"""What is searched for tensors."""

VALUES = Tensor | torch.dtype | torch.device | torch.Size
"""Values of torch that an object may hold."""

MAX_OBJECTS = 100
"""How many objects a plain object may hold, at any depth."""


def _is_plain(value: Any) -> bool:
    """Return whether an object has attributes and holds only values: no modules, data or other machinery of training."""
    known: dict[int, Any] = {}
    waiting = [value] if _has_own_attributes(value) else []
    while waiting and len(known) <= MAX_OBJECTS:
        held = waiting.pop()
        foreign = type(held).__module__.partition(".")[0] == "torch" and not isinstance(held, VALUES)
        if foreign or isinstance(held, nn.Module | Dataset):
            return False
        own = _has_own_attributes(held)
        if id(held) not in known and (own or isinstance(held, CONTAINERS)):
            known[id(held)] = held
            waiting += held.values() if isinstance(held, dict) else vars(held).values() if own else held
    return 0 < len(known) <= MAX_OBJECTS


def _has_own_attributes(value: Any) -> bool:
    """Return whether an object is of a class of the user's, or only holds attributes, as a `SimpleNamespace` does."""
    origin = type(value).__module__.partition(".")[0]
    standard = origin in sys.stdlib_module_names and origin not in ("types", "collections", "__main__")
    odd = isinstance(value, (*CONTAINERS, Tensor, type, ModuleType)) or callable(value)
    return hasattr(value, "__dict__") and not standard and not odd


class _SavedAttributes:
    """The attributes of objects and of everything in them, and the contents of the containers there.

    Modules, containers and plain objects are searched; `tensors` are those found.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        known: dict[int, Any] = {}
        waiting = [*roots]
        while waiting:
            value = waiting.pop()
            if id(value) not in known:
                known[id(value)] = value
                waiting += self._save(value)

    def _save(self, value: Any) -> list[Any]:
        """Save an object, and return what it holds."""
        if type(value) is Tensor:
            self.tensors += [value] if value.layout == torch.strided else []
        elif isinstance(value, nn.Module):
            saved = {key: v for key, v in vars(value).items() if key not in MODULE_TABLES}
            self._attributes.append((vars(value), saved))
            tables = [vars(value).get(key) for key in RESTORED_TABLES]
            self._contents += [(table, _content(table)) for table in tables if isinstance(table, dict | set)]
            return [*saved.values(), *value.children()]
        elif isinstance(value, CONTAINERS):
            if not isinstance(value, tuple):
                self._contents.append((value, _content(value)))
            return _content(value) if not isinstance(value, dict) else [*value.values()]
        elif _is_plain(value):
            self._attributes.append((vars(value), dict(vars(value))))
            return [*vars(value).values()]
        return []

    def restore(self) -> None:
        """Restore what has changed."""
        for table, saved in self._attributes:
            for key in [key for key in table if key not in MODULE_TABLES and key not in saved]:
                del table[key]
            table.update({key: value for key, value in saved.items() if key not in table or table[key] is not value})
        for value, content in self._contents:
            if not _same(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list | deque) else value.update(content)

    def stale(self, run: Callable[[], Any]) -> str | None:
        """Return the name of an attribute whose tensors make a function fail, which works with None there."""
        for table, saved in self._attributes:
            for key, value in saved.items():
                if any(isinstance(t, Tensor) for t in (value if isinstance(value, tuple | list) else [value])):
                    try:
                        table[key] = saved[key] = None
                        run()
                    except Exception:
                        continue
                    else:
                        return key
                    finally:
                        table[key] = saved[key] = value
        return None


def _content(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _same(now: Any, kept: Any) -> bool:
    if len(now) != len(kept):
        return False
    if isinstance(now, dict):
        return all(map(is_, now, kept)) and all(map(is_, now.values(), kept.values()))
    return now == set(kept) if isinstance(now, set) else all(map(is_, now, kept))


class _SavedBuffers:
    """The buffers of modules and of those in them, except for those of `others`, and the values of these and other tensors."""

    def __init__(self, roots: Iterable[nn.Module], others: Collection[nn.Module], tensors: Sequence[Tensor]) -> None:
        modules = {m: None for root in roots for m in root.modules() if m not in others}
        self._tables = [(m._buffers, dict(m._buffers.items())) for m in modules]
        buffers = [b for _, saved in self._tables for b in saved.values() if b is not None]
        self._n_buffers, tensors = len(buffers), [*buffers, *tensors]
        self._values = [(t, t.detach().clone()) for t in tensors]
        self._versions = [_version(t) for t in tensors]

    @torch.no_grad()
    def restore(self, all_buffers: bool = True) -> None:
        """Restore the tensors and their values; without `all_buffers` only tensors that may have been written to."""
        for table, saved in self._tables:
            for key in set(table.keys()) - set(saved):
                del table[key]
            for key, buffer in saved.items():
                if key not in table or table[key] is not buffer:
                    table[key] = buffer
        for i, (tensor, value) in enumerate(self._values):
            written = self._versions[i] != _version(tensor) or self._versions[i] < 0
            checked = written or (all_buffers and i < self._n_buffers)
            if checked and not torch.equal(tensor, value):  # writing the same values would invalidate graphs of the user's
                tensor.copy_(value)
            self._versions[i] = _version(tensor)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written to, -1 for tensors of inference mode, which do not count it."""
    return -1 if tensor.is_inference() else tensor._version


class ModelSnapshot:
    """The attributes and buffers of a model, which a call of it may change.

    Args:
        root: the model.
        others: what is called with it, such as a loss: a module, or the object of a method, is saved as the model is.
        changing: modules of the model whose buffers may change.
    """

    def __init__(self, root: nn.Module, others: Sequence[Any] = (), changing: Collection[nn.Module] = ()) -> None:
        roots = [root, *(getattr(other, "__self__", other) for other in others)]
        modules = [value for value in roots if isinstance(value, nn.Module)]
        self._attributes = _SavedAttributes(roots)
        self._buffers = _SavedBuffers(modules, changing, self._attributes.tensors)

    def restore(self, all_buffers: bool = False) -> None:
        """Restore attributes and buffers, so that no call of the model sees what an earlier one has left."""
        self._attributes.restore()
        self._buffers.restore(all_buffers)

    def call(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a model in its saved state.

        Raises:
            ValueError: if it fails because of what an attribute holds from an earlier batch.
        """

        def run() -> Any:
            self.restore()
            return model(*args, **kwargs)

        try:
            return run()
        except Exception as error:
            name = self._attributes.stale(run)
            if name is None:
                raise
            raise ValueError(
                f"The model's attribute `{name}` is left from an earlier batch and does not fit these examples. "
                f"Set `{name}` to None before, so that the model can begin with any example."
            ) from error


@contextmanager
def isolated(model: nn.Module, *others: Any) -> Iterator[ModelSnapshot]:
    """Evaluate a model, differentiably and eagerly, and leave no trace.

    Inside, the whole model is in evaluation mode and gradients are enabled, also for callers under `torch.no_grad()`.
    Afterwards, even after an error, every module's mode and attributes, all buffers, all `.grad` fields and the global random
    state of torch (on the CPU and on the model's CUDA devices) are restored; so are attributes and buffers of a loss and of
    other `others` that are modules or methods of objects. Yields the snapshot, which can be restored in between.
    """
    root = bare(model)
    snapshot = ModelSnapshot(root, others)
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    nested = root in models_in_isolation
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(PLAIN_ATTENTION)
        stack.enter_context(WITHOUT_CUDNN)
        if "torch._dynamo" in sys.modules:  # anything may be compiled: a module in its place, a method, a function it calls
            stack.enter_context(UNCOMPILED)
        if not nested:
            stack.callback(models_in_isolation.discard, root)
        with _evaluating(root):
            try:
                models_in_isolation.add(root)
                yield snapshot
            finally:
                snapshot.restore(all_buffers=True)


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients and without the parameters' hooks."""
    modes = [(module, module.training) for module in root.modules()]
    grads = [(p, p.grad) for p in root.parameters()]
    hooks = [(p, p._backward_hooks) for p in root.parameters() if p._backward_hooks]
    try:
        root.eval()
        for p, _ in grads:
            p.grad = None
        for p, _ in hooks:  # they are for training, and are not called under `vmap`
            p._backward_hooks = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.grad = grad
        for p, own in hooks:
            p._backward_hooks = own


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Enable gradients of frozen parameters, too."""
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
