"""Hooks that collect what each example contributes to gradients while the user's own backward pass runs."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwalk.distributed.shards import sharded
from rwalk.distributed.wrappers import module_class
from rwalk.gradients.batches import ExampleBatch, first_size, tensors
from rwalk.gradients.isolation import isolated, models_in_isolation
from rwalk.gradients.layer_rules import LAYER_RULES, Gather, Sum, find_owners


@dataclass
class HookedLayer:
    """A layer and the sums of its parameters; `last_pass` is the forward pass whose gradient came last."""

    path: str
    sums: dict[str, Sum]
    last_pass: int = 0
    closed: bool = False

    def __reduce__(self) -> Any:
        """Make copies collect nothing: a model is copied with its hooks."""
        return HookedLayer, (self.path, {}, 0, True)

    def wanted(self, which: str) -> Sum | None:
        """Return the sum for "weight" or "bias", None if it is not collected or frozen."""
        found = self.sums.get(which)
        return found if found is not None and found.parameter.requires_grad else None


class Hook(partial[Any]):
    """A hook of a model; `torch.jit.script`, which compiles hooks, is the only caller that asks for its name."""

    @property
    def __name__(self) -> str:
        """Raise an error with the remedy."""
        raise AttributeError(
            '`torch.jit.script` cannot compile a model with a consolidator whose rule has `fisher="example"` attached. '
            "Call `detach()` before, and `attach` afterwards."
        )


class BackwardHooks:
    """Hooks on the layers of a model.

    Args:
        root: the model, called as a whole.
        theta: the parameters to collect, by name.

    Attributes:
        problems: why modules by path, or parameters by name, are not collected.
        examples: how many examples had a backward pass since the last `clear`.
        spoiled: whether several backward passes went through one graph.
        global_hook: whether there was a forward hook on all modules, which may change what layers compute.
    """

    _copied = False

    def __init__(self, root: nn.Module, theta: Mapping[str, nn.Parameter]) -> None:
        self.problems: dict[str, str] = {}
        self.examples, self.spoiled, self.global_hook = 0, False, False
        self._root, self._inputs_checked = root, False
        self._pass = 0  # the number of the current forward pass
        self._batch_size: int | None = None
        self._counted: set[int] = set()
        self._owners, self._layers = self._survey(theta)
        self._handles = [root.register_forward_pre_hook(Hook(self._before_pass), with_kwargs=True)]
        for module, layer in self._layers.items():
            hook = Hook(self._after_layer, layer)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def __reduce__(self) -> Any:
        """Make copies do nothing: a model is copied with its hooks."""
        return _copy_of_hooks, ()

    def _survey(self, theta: Mapping[str, nn.Parameter]) -> tuple[dict[str, str], dict[nn.Module, HookedLayer]]:
        """Return the path of the module that owns each parameter, and the layers to collect; note why others cannot be."""
        name_of = {id(p): name for name, p in theta.items()}
        owners: dict[str, str] = {}
        layers: dict[nn.Module, HookedLayer] = {}
        for path, module, own, problem in find_owners(self._root, theta):
            for p in own.values():
                owners.setdefault(name_of[id(p)], path)
            if problem:
                self.problems[path] = problem
            else:
                layers[module] = HookedLayer(path, {key: Sum(name_of[id(p)], p) for key, p in own.items()})
        return owners, layers

    def sums(self) -> list[Sum]:
        """Return the sums of all parameters that are still collected."""
        return [s for layer in self._open() for s in layer.sums.values()]

    def _open(self) -> list[HookedLayer]:
        return [layer for layer in self._layers.values() if not layer.closed]

    def check_inputs_again(self) -> None:
        """Check the inputs of layers again in the next forward pass."""
        self._inputs_checked = False

    def clear(self) -> None:
        """Begin the next step."""
        self.examples, self.spoiled, self.global_hook = 0, False, False
        self._counted.clear()
        for s in self.sums():
            s.total = None

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers.values():
            layer.closed = True

    def close_layers(self, names: Collection[str], why: str) -> None:
        """Stop collecting the layers of some parameters."""
        for layer in self._open():
            if any(s.name in names for s in layer.sums.values()):
                self._close_layer(layer, why)

    def close_parameters(self, names: Collection[str], why: str) -> None:
        """Stop collecting some parameters."""
        self.problems.update(dict.fromkeys(names, why))
        for layer in self._open():
            layer.sums = {key: s for key, s in layer.sums.items() if s.name not in names}

    def _close_layer(self, layer: HookedLayer, why: str) -> None:
        layer.closed = True
        layer.sums.clear()
        self.problems[layer.path] = why

    def find_bypassed(self, theta: Mapping[str, nn.Parameter], collected: Collection[str]) -> None:
        """Note the modules whose parameters have a gradient that did not come through the module's own forward."""
        if not self.examples and any(layer.last_pass for layer in self._layers.values()):
            return  # no backward pass since the last step: these gradients are older
        for name, p in theta.items():
            owner = self._owners.get(name, name)
            known = owner in self.problems or name in self.problems or name in collected
            if not known and p.requires_grad and p.grad is not None and p.grad.any():
                self.problems[owner] = "its parameters are used outside of its forward, or it is compiled"

    def _idle(self) -> bool:
        """Return whether this is no training: a compilation, a trace, a function transform, or a pass over data."""
        return self._copied or no_training(self._root)

    def _before_pass(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Number a forward pass of the whole model and note its batch size."""
        if not torch.is_grad_enabled() or self._idle():
            return
        self._clear_if_dropped()
        self._pass += 1
        self._batch_size = first_size((args, kwargs))
        if not self._inputs_checked and (self._batch_size or 0) > 1:
            self._inputs_checked = True
            self._check_inputs(args, kwargs, self._batch_size or 0)

    def _clear_if_dropped(self) -> None:
        """Start anew if the gradient of earlier passes was dropped, as in a step that a loss scaler skips."""
        sums = [s for s in self.sums() if s.examples]
        if sums and all(s.parameter.grad is None for s in sums):
            for s in sums:
                s.examples = 0
            self.clear()

    def _check_inputs(self, args: Any, kwargs: Any, size: int) -> None:
        """Close layers whose first dimension is not that of the examples, though it happens to be as long as the batch.

        It keeps its length if the model is given fewer examples.
        """
        if any(sharded(s.parameter) for s in self.sums()):
            return
        shared = frozenset(id(t) for t in tensors((args, kwargs)) if not t.dim() or t.shape[0] != size)
        few = ExampleBatch(args, kwargs, None, size, shared).cut(0, 2 if size > 2 else 1)
        for layer, x in self._layer_inputs(few):
            if not layer.closed and x.dim() and len(x) == size:
                why = f"the first dimension of its input is {size} where the model is given {few.size} examples"
                self._close_layer(layer, why)

    def _layer_inputs(self, batch: ExampleBatch) -> list[tuple[HookedLayer, Tensor]]:
        """Run the model on some examples and return the inputs of its layers; none if the model fails."""
        seen: list[tuple[HookedLayer, Tensor]] = []

        def note(layer: HookedLayer, _: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((layer, _input(args, kwargs)))

        with ExitStack() as stack:
            for module, layer in self._layers.items():
                stack.callback(module.register_forward_pre_hook(partial(note, layer), with_kwargs=True).remove)
            stack.enter_context(isolated(self._root))
            try:
                self._root(*batch.args, **batch.kwargs)
            except Exception:  # some models take no smaller batches
                return []
        return seen

    def _after_layer(self, layer: HookedLayer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Wait for the gradient of a layer's output."""
        if layer.closed or self._idle() or not (torch.is_grad_enabled() and output.requires_grad):
            return
        if torch.nn.modules.module._global_forward_hooks:
            self.global_hook = True
            return
        x = _input(args, kwargs).detach()
        why = _problem_with_input(module, x, self._batch_size)
        if why:
            self._close_layer(layer, why)
        elif len(x):
            rule = LAYER_RULES[module_class(module)][0]
            collect = partial(self._collect, layer, rule(module, x), output.shape, self._pass, [])
            with_gradient(output).register_hook(collect)

    @torch.no_grad()
    def _collect(self, layer: HookedLayer, gather: Gather, shape: torch.Size, number: int, came: list[bool], g: Any) -> None:
        """Add the contributions of one backward pass; `came` is empty until the first one through this graph."""
        if g is None or layer.closed or self._idle() or torch._C._functorch.is_legacy_batchedtensor(g):
            return
        if came:
            self.spoiled = True
            return
        came.append(True)
        if layer.last_pass == number:
            self._close_layer(layer, "it is used more than once in one forward pass of the model")
            return
        layer.last_pass = number
        weight, bias = layer.wanted("weight"), layer.wanted("bias")
        self._count(number, shape[0])
        for one in (weight, bias):
            if one is not None:
                one.open(self.examples)
        with torch.autocast(g.device.type, enabled=False) if torch.is_autocast_enabled(g.device.type) else nullcontext():
            gather(g.detach().reshape(shape), weight, bias)

    def _count(self, number: int, examples: int) -> None:
        """Count the examples of each forward pass once."""
        if number not in self._counted:
            self._counted.add(number)
            self.examples += examples


def no_training(root: nn.Module) -> bool:
    """Return whether what runs is no training of a model: a compilation, a trace, a transform, or a pass over data."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    return traced or torch._C._are_functorch_transforms_active() or root in models_in_isolation


def _copy_of_hooks() -> BackwardHooks:
    """Return what the hooks of a copied model belong to: it is always idle."""
    idle = object.__new__(BackwardHooks)
    idle._copied = True
    return idle


def _input(args: Any, kwargs: Any) -> Tensor:
    """Return the input of a layer."""
    return args[0] if args else kwargs["input"]  # type: ignore[no-any-return]


def _problem_with_input(module: nn.Module, x: Tensor, batch: int | None) -> str | None:
    """Return why the gradient of a layer with input x cannot be split by example."""
    dims = LAYER_RULES[module_class(module)][1]
    own = 0 if isinstance(module, nn.Embedding) else len(getattr(module, "normalized_shape", (0,)))
    if batch is None:
        return "it is called outside of the model's forward, or the model takes no tensor"
    if (dims and x.dim() not in dims) or x.dim() <= own:
        return f"its input of shape {tuple(x.shape)} has no dimension for examples"
    if x.shape[0] != batch:
        return f"the first dimension of its input is {x.shape[0]}, that of the batch {batch}"
    return None


def with_gradient(output: Tensor) -> Tensor:
    """Return the tensor whose gradient is that of a layer's output even if the output is modified in place afterwards.

    Modifying a view in place gives the view a new history without its hooks; hooks of its base stay where they are.
    """
    base = output._base if output._is_view() else None
    if base is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base
