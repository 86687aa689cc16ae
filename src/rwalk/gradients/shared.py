"""Settings of the whole process that a pass over a model needs, also where several threads train at once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class SharedSetting(AbstractContextManager[None]):
    """A setting that is made when the first asks for it, and undone when the last has left, in whatever order they do.

    Args:
        make: returns a context in which it holds.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._users, self._made = make, Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        """Ask for it."""
        with self._lock:
            if not self._users:
                self._made.enter_context(self._make())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        """Leave."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._made.close()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Disable cuDNN; `torch.backends.cudnn.flags` would also set TF32, and fail if a user has set it for one operator."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


Listener = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""Takes what a function has returned, and its arguments; returns what takes the place of the first."""


class HeardFunction:
    """A function of `torch.nn.functional` that tells the listeners of the thread that calls it.

    It is replaced when the first of all threads begins to listen, and put back when the last has left.

    Args:
        name: the function.
    """

    def __init__(self, name: str) -> None:
        self._name, self._of_thread, self._setting = name, local(), SharedSetting(self._replaced)

    @property
    def _listeners(self) -> list[tuple[object, Listener]]:
        found: list[tuple[object, Listener]] = self._of_thread.__dict__.setdefault("listeners", [])
        return found

    def listen(self, owner: object, listener: Listener) -> None:
        """Tell a listener of this thread's calls, too."""
        self._setting.__enter__()
        self._listeners.append((owner, listener))

    def leave(self, owner: object) -> None:
        """Tell this thread's last listener no more; one that never came, as an earlier hook has failed, does not leave."""
        if self._listeners and self._listeners[-1][0] is owner:
            self._listeners.pop()
            self._setting.__exit__()

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        plain = getattr(F, self._name)

        def telling(*args: Any, **named: Any) -> Any:
            output = plain(*args, **named)
            for _, listener in tuple(self._listeners):
                output = listener(output, args, named)
            return output

        setattr(F, self._name, telling)
        try:
            yield
        finally:
            if getattr(F, self._name) is telling:
                setattr(F, self._name, plain)


UNCOMPILED = SharedSetting(lambda: torch.compiler.set_stance("force_eager"))
"""No compiled code runs: a graph calls no hooks that came later, and cannot be mapped over examples."""
PLAIN_ATTENTION = SharedSetting(lambda: sdpa_kernel(SDPBackend.MATH))
"""Attention is computed without fused kernels, which cannot be mapped over examples."""
WITHOUT_CUDNN = SharedSetting(_without_cudnn)
"""cuDNN is not used: it has no backward for RNNs in evaluation mode."""
