"""Which layers a model calls, and with what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Calls = list[tuple[Any, Tensor]]
"""Layers and their inputs, in the order in which they were called."""


@contextmanager
def noted_calls(root: nn.Module, layer: nn.Module | None = None) -> Iterator[Calls]:
    """Yield a list that receives each call of a layer, or of any linear layer of a model if it is None."""
    calls: Calls = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((module, args[0]))

    layers = [m for m in root.modules() if isinstance(m, nn.Linear)] if layer is None else [layer]
    handles = [module.register_forward_pre_hook(note) for module in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
