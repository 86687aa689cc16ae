"""Compiled models at measured steps: their forward passes run uncompiled, as a graph calls no hooks that came later."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from rwalk.gradients.layer_uses import ModelHook
from rwalk.gradients.shared import UNCOMPILED


class EagerCalls:
    """Has compiled modules of a model run uncompiled for a while, where a call is to be measured; nothing else is touched.

    Args:
        model: the network.
        measured: tells whether a call that begins is to be measured.
    """

    def __init__(self, model: nn.Module, measured: Callable[[], bool]) -> None:
        self._model, self._measured = model, measured
        self._undo: list[Callable[[], None]] = []
        self._entered: list[ExitStack] = []

    def open(self) -> None:
        """Begin, with all modules that are compiled now."""
        for module in self._model.modules():
            if hasattr(module, "_orig_mod"):  # as `torch.compile` returns it
                before = module.register_forward_pre_hook(ModelHook(self._enter))
                after = module.register_forward_hook(ModelHook(self._leave), always_call=True)
                self._undo += [before.remove, after.remove]
            elif module._compiled_call_impl is not None:  # as `module.compile` leaves it
                self._undo.append(self._replace(module, module._compiled_call_impl))

    def close(self) -> None:
        """End, and leave the modules as they were."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _enter(self, *_: Any) -> None:
        self._entered.append(ExitStack())
        if self._measured():
            self._entered[-1].enter_context(UNCOMPILED)

    def _leave(self, *_: Any) -> None:
        if self._entered:  # nothing was entered where an earlier hook has failed
            self._entered.pop().close()

    def _replace(self, module: nn.Module, compiled: Callable[..., Any]) -> Callable[[], None]:
        """Let a module's compiled call choose; copies of modules have none of either. Return what undoes it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._measured():
                return compiled(*args, **kwargs)
            with UNCOMPILED:
                return compiled(*args, **kwargs)

        def undo() -> None:
            module._compiled_call_impl = compiled

        module._compiled_call_impl = call
        return undo
