"""Sums of a function of per-example gradients, layer by layer, in one pass over many examples that are each its own batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from rwalk.distributed.wrappers import module_class
from rwalk.gradients.layer_rules import LAYER_RULES, Elementwise, Gather, Sum, find_owners
from rwalk.gradients.mapping import UNMAPPED, OnlyMapped, mapped, reaches

ROOTS: dict[Any, Callable[[Tensor], Tensor]] = {torch.square: torch.sqrt, torch.abs: torch.clone}
"""The functions that can be summed layer by layer, and what to apply to a gradient's weight before the function."""

ANYWHERE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
"""Layers whose inputs may have any shape; all others get one example at a time, with a first dimension of 1."""


@dataclass(eq=False)
class _LayerCall:
    """A call of a layer for all examples: its input, with its version counter, and zeros that were added to its output."""

    x: Tensor
    version: int
    zeros: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the input, and of the gradient that will come."""
        return self.x.nbytes + self.zeros.nbytes


@dataclass(eq=False)
class _MappedLayer:
    """A layer, the sums of its parameters by their names in it, its calls in this pass, and parameters set aside in a call."""

    module: nn.Module
    sums: dict[str, Sum]
    calls: list[_LayerCall] = field(default_factory=list)
    attached: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The parameters' names in the model."""
        return {s.name for s in self.sums.values()}

    def enter(self, leaves: Mapping[str, Tensor], module: nn.Module, _: Any) -> None:
        """Before the layer's forward, detach its parameters if they are those of this pass."""
        own = {key: leaves[s.name] for key, s in self.sums.items()}
        if all(module._parameters.get(key) is leaf for key, leaf in own.items()):
            self.attached = own
            module._parameters.update({key: leaf.detach() for key, leaf in own.items()})  # type: ignore[misc]

    def leave(self, mark: list[Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """After it, put the parameters back and note the call."""
        own, self.attached = self.attached, {}
        module._parameters.update(own)  # type: ignore[arg-type]
        if not own or not torch.is_grad_enabled():
            return output
        x, before = args[0] if args else kwargs["input"], len(self.calls)
        noted: Tensor = _Note.apply(mark[0], x, output, self)  # type: ignore[no-untyped-call]
        if len(self.calls) == before:
            raise RuntimeError("the layer's call was not noted")
        return noted

    def fits(self) -> bool:
        """Return whether the layer's rule holds: for one call at most, as contributions of several add up before the square.

        The gradients of a call that was begun and not noted would be lost.
        """
        return not self.attached and len(self.calls) < 2 and all(self._rule_holds(call) for call in self.calls)

    def _rule_holds(self, call: _LayerCall) -> bool:
        module = self.module
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return False  # it normalises each example with its own statistics
        dims, x = LAYER_RULES[module_class(self.module)][1], call.x
        fitting = x.dim() > 2 and x.shape[1] == 1 and (not dims or x.dim() - 1 in dims)
        return (fitting or module_class(self.module) in ANYWHERE) and x._version == call.version

    def rule(self) -> Gather:
        """Return the function that takes the gradients of the output."""
        x = self.calls[0].x
        rule = LAYER_RULES[module_class(self.module)][0]
        if module_class(self.module) in ANYWHERE:
            return rule(self.module, x)
        gather = rule(self.module, x.squeeze(1))
        return lambda g, weight, bias: gather(g.squeeze(1), weight, bias)


class _Note(OnlyMapped):
    """Notes a layer's call under `vmap`, where the tensors of all examples are known, and adds zeros whose gradient is kept.

    Gradients that the model itself takes are refused, as the parameters are detached in them.
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, mark: Tensor, x: Tensor, y: Tensor, layer: _MappedLayer) -> tuple[Tensor, int]:  # noqa: ARG004
        """Add zeros, expanded from one element so that they take no memory."""
        if in_dims[0] is None:
            raise RuntimeError("the model calls the layer under a `vmap` of its own")
        x, y = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((x, y), in_dims[1:3], strict=True)
        )
        zeros = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True).expand_as(y)
        layer.calls.append(_LayerCall(x.detach(), x._version, zeros))
        return y + zeros, 0


class _RefuseGraphQueries(TorchFunctionMode):
    """Refuses models that ask whether a tensor requires gradients, as hooks on gradients do: under `vmap` none does."""

    queries = tuple(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse these queries, and call everything else."""
        if func in self.queries:
            raise RuntimeError("the model asks for the graph of a tensor")
        return func(*args, **(kwargs or {}))


_Reached = list[tuple[_MappedLayer, Tensor]]
"""Layers and the gradients of their outputs for all examples."""


class LayerwiseSums:
    """Sums of a function of per-example gradients, for all parameters that only their layer's own forward uses.

    A layer's parameters are detached during its own forward. If scores still depend on one of them, it is used elsewhere too;
    it then leaves `names`, as do the parameters of a layer that is called more than once.

    Args:
        root: the model.
        theta: the parameters, by their names in it.
        of: the function; `names` is empty unless it is `torch.square` or `torch.abs`.
    """

    def __init__(self, root: nn.Module, theta: Mapping[str, nn.Parameter], of: Elementwise) -> None:
        names = {id(p): name for name, p in theta.items()}
        self._of = of
        self._layers: list[_MappedLayer] = []
        for _, module, own, problem in find_owners(root, theta) if of in ROOTS and not _global_hooks() else ():
            if not problem and "forward" not in vars(module):
                self._layers.append(_MappedLayer(module, {key: Sum(names[id(p)], p, of) for key, p in own.items()}))
        self._sums = [s for layer in self._layers for s in layer.sums.values()]
        self.bytes_per_example: int | None = None
        """Bytes of the inputs of layers and the gradients of their outputs in the last pass."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters that can be summed layer by layer."""
        return frozenset(n for layer in self._layers for n in layer.names)

    def add(self, scores: Callable[..., Any], theta: Mapping[str, nn.Parameter], parts: Any, dims: Any, size: int) -> None:
        """Add examples, for the parameters that are in `names` afterwards.

        Args:
            scores: takes parameters by name and one example, and returns scores and the weights of their gradients.
            theta: the parameters.
            parts: all examples, as one tree of tensors.
            dims: the dimension of examples in each tensor.
            size: how many examples there are.

        Raises:
            DividedExamplesError: if the model takes different ways for different examples; nothing was added.
        """
        leaves = {name: theta[name].detach().requires_grad_() for name in self.names}
        with _hooked(self._layers, leaves) as mark:
            try:
                with _RefuseGraphQueries():
                    score, weight = mapped(partial(_marked, scores, leaves, mark), size, (dims,), parts)
                self._layers = [] if reaches(score, theta.values()) else [layer for layer in self._layers if layer.fits()]
                passes = self._passes(score, ROOTS[self._of](weight), leaves)
                first = next(passes, [])
            except UNMAPPED:
                self._layers = []
                return
            self.bytes_per_example = sum(call.nbytes for layer in self._layers for call in layer.calls) // size
            self._gather(chain([first], passes))

    def _passes(self, score: Tensor, weight: Tensor, leaves: Mapping[str, Tensor]) -> Iterator[_Reached]:
        """Run backward from each score of all examples in turn; after the first, leave out layers that are used elsewhere."""
        watched = {name: leaves[name] for name in self.names}
        for c in range(score.shape[1] if score.requires_grad and self._layers else 0):
            along = torch.zeros_like(score)
            along[:, c] = weight[:, c]
            called = [layer for layer in self._layers if layer.calls]
            inputs = [*(layer.calls[0].zeros for layer in called), *watched.values()]
            if not inputs:  # all layers are used elsewhere too
                return
            found = torch.autograd.grad(score, inputs, along, c + 1 < score.shape[1], allow_unused=True)
            elsewhere = {n for n, g in zip(watched, found[len(called) :], strict=True) if g is not None}
            self._layers, watched = [layer for layer in self._layers if not elsewhere & layer.names], {}
            yield [(layer, g) for layer, g in zip(called, found, strict=False) if g is not None and layer in self._layers]

    @torch.no_grad()
    def _gather(self, passes: Iterable[_Reached]) -> None:
        """Add the contributions to the layers' parameters."""
        rules = {layer: layer.rule() for layer in self._layers if layer.calls}
        for reached in passes:
            for layer, g in reached:
                for s in layer.sums.values():
                    s.open(1)
                with torch.autocast(g.device.type, enabled=False):
                    rules[layer](g, layer.sums.get("weight"), layer.sums.get("bias"))

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all passes by name, for the parameters that any gradient has reached."""
        return {s.name: s.take(1) for s in self._sums if s.examples}


def _global_hooks() -> bool:
    """Return whether there are hooks on all modules, which may change outputs before `_MappedLayer.leave` sees them."""
    return any((modules._global_forward_hooks, modules._global_forward_pre_hooks))


def _marked(scores: Callable[..., Any], leaves: Mapping[str, Tensor], here: list[Tensor], mark: Tensor, example: Any) -> Any:
    """Put a mapped tensor where `_Note` finds it."""
    here[:] = [mark]
    return scores(leaves, example)


@contextmanager
def _hooked(layers: Sequence[_MappedLayer], leaves: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Hook the layers; yield the list for a tensor that `vmap` maps, which `_Note` takes."""
    mark: list[Tensor] = []
    handles = []
    try:
        for layer in layers:
            handles.append(layer.module.register_forward_pre_hook(partial(layer.enter, leaves)))
            handles.append(layer.module.register_forward_hook(partial(layer.leave, mark), with_kwargs=True, prepend=True))
        yield mark
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.calls.clear()
            layer.attached = {}
