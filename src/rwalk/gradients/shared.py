"""Settings of the whole process that a pass over a model needs, also where several threads train at once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
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


UNCOMPILED = SharedSetting(lambda: torch.compiler.set_stance("force_eager"))
"""No compiled code runs: a graph calls no hooks that came later, and cannot be mapped over examples."""
PLAIN_ATTENTION = SharedSetting(lambda: sdpa_kernel(SDPBackend.MATH))
"""Attention is computed without fused kernels, which cannot be mapped over examples."""
WITHOUT_CUDNN = SharedSetting(_without_cudnn)
"""cuDNN is not used: it has no backward for RNNs in evaluation mode."""
