"""How an optimiser's step is watched: behind wrappers, with and without a closure, and once however it is called."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[Optimizer], None]
HOOKED = Optimizer.profile_hook_step(print).__code__
"""What runs the hooks of a step, around each method `step`; in a compiled step it has other instructions by the same name."""


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that makes the steps, behind wrappers such as Accelerate's, which keep it as `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and inner is not optimizer:
        optimizer = inner
    return optimizer


def refuse_unwatchable(optimizer: Optimizer) -> None:
    """Refuse an optimiser whose steps cannot be followed, before it is attached to."""
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS moves several times in a step, which cannot be observed. Use an optimiser that moves once, along one "
            "gradient, such as `torch.optim.Adam`."
        )
    if not getattr(type(optimizer).step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        kind = type(optimizer).__name__
        raise TypeError(
            f"`{kind}` does not call the hooks of its steps: its constructor has to call that of `torch.optim.Optimizer`. If "
            f"`{kind}` wraps an optimiser, attach to that one."
        )


def refuse_attachment(optimizer: Optimizer, owner: Any, steps: int) -> None:
    """Refuse a second consolidator of a model on an optimiser, and another optimiser `steps` steps into a task."""
    if any(other is owner or other.model is owner.model for other in observers(optimizer)):
        raise RuntimeError(
            "A consolidator of this model is attached to this optimiser already. Call its `detach()` first, or leave out "
            "this call."
        )
    if steps:
        raise RuntimeError(
            f"The consolidator is {steps} steps into a task under another optimiser. Call `consolidate()` first, or "
            "`detach()` to continue this task under the new optimiser."
        )


def nested(optimizer: Optimizer) -> bool:
    """Return whether the hooks that run belong to a step within a step of the same optimiser.

    The stack is asked, as a flag that a step sets would outlive a step that fails.
    """
    frame, depth = inspect.currentframe(), 0
    while frame is not None and depth < 2:
        code = frame.f_code
        if (code.co_filename, code.co_name) == (HOOKED.co_filename, HOOKED.co_name):
            depth += frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return depth == 2


class StepHooks:
    """Calls `before` at each step of an optimiser when its gradients are ready, and `after` once it has moved.

    A class that overrides `step` and calls that of its parent may run all hooks twice, once for each of the two methods; then
    only those of the outer one count.

    Args:
        owner: the consolidator, for `observers`.
        before: called once in a step, after the closure where there is one.
        after: called after it; None for nothing.
    """

    def __init__(self, owner: object, optimizer: Optimizer, before: Hook, after: Hook | None) -> None:
        self.owner = owner
        self._before, self._after = before, after
        self._overrides = sum("step" in vars(kind) for kind in type(optimizer).__mro__ if kind is not Optimizer) > 1
        eager: Callable[[Any], Any] = torch.compiler.disable  # in a compiled step, what we do must not become part of the graph
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(eager(self._enter))]
        if after is not None:
            self._handles.append(optimizer.register_step_post_hook(eager(self._leave)))
            hooks: Any = optimizer._optimizer_step_post_hooks
            hooks.move_to_end(self._handles[-1].id, last=False)  # other hooks' changes to weights are no move of the optimiser

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._overrides and nested(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._before(optimizer)
            return None
        observed = ObservedClosure(closure, optimizer, self._before)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": observed}
        return (args[0], observed, *args[2:]), kwargs

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self._after is not None and not (self._overrides and nested(optimizer)):
            self._after(optimizer)


class ObservedClosure:
    """A user's closure, after which the gradients are ready to be observed; an optimiser may call it once in a step.

    Args:
        closure: what the user passed to `step`.
        optimizer: whose step it is.
        then: called with the optimiser after the closure.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: Optimizer, then: Hook) -> None:
        self._closure, self._optimizer, self._then = closure, optimizer, then
        self._versions = self._look()
        self._called = False

    def __call__(self) -> Any:
        """Call the closure, then observe; return what the closure returns."""
        if self._called or self._look() != self._versions:
            kind, late = type(self._optimizer).__name__, "twice" if self._called else "after it has moved the weights"
            raise RuntimeError(
                f"`{kind}` calls its closure {late} in a step, which cannot be observed. Use an optimiser that calls it once "
                f"and then moves once; if `{kind}` wraps one, attach to that one."
            )
        self._called = True
        loss = self._closure()
        self._then(self._optimizer)
        return loss

    def _look(self) -> list[int]:
        """Return how often each parameter has been written to."""
        return [p._version for group in self._optimizer.param_groups for p in group["params"]]


def observers(optimizer: Optimizer) -> list[Any]:
    """List the owners of the `StepHooks` of an optimiser."""
    hooks = (getattr(hook, "__wrapped__", hook) for hook in optimizer._optimizer_step_pre_hooks.values())
    watchers = (getattr(hook, "__self__", None) for hook in hooks)
    return [watcher.owner for watcher in watchers if isinstance(watcher, StepHooks)]
