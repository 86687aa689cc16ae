"""Functions of per-example gradients, summed layer by layer in one pass over many examples, each a batch of its own."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from rwalk.gradients.layers import RULES, Gather, Of, Sum, survey
from rwalk.parallel import kind

ROOTS: dict[Any, Callable[[Tensor], Tensor]] = {torch.square: torch.sqrt, torch.abs: torch.clone}
"""What can be summed layer by layer, and what weights of the sum mean for the gradients in it."""

ANYWHERE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
"""Layers whose inputs may have any shape; all others are given one example, in a first dimension of 1."""

UNMAPPED = (RuntimeError, NotImplementedError, ValueError, TypeError)
"""What comes of a model that cannot be mapped over examples, or of an error in it."""


def mapped(function: Callable[..., Any], in_dims: Any, *args: Any) -> Any:
    """Call a function for all examples at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # where an operator is looped over
        return vmap(function, in_dims=in_dims, randomness="different")(*args)


def reaches(score: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Tell whether scores depend on parameters in spite of others in their places: who holds them saw no replacement."""
    if not score.requires_grad:
        return False
    found = torch.autograd.grad(score.sum(), list(parameters), retain_graph=True, allow_unused=True)
    return any(g is not None for g in found)


@dataclass(eq=False)
class _Call:
    """A call of a layer for all examples: its input, of which `version` it was, and zeros that were added to its output."""

    x: Tensor
    version: int
    zeros: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the input, and of the gradient that will come."""
        return self.x.nbytes + self.zeros.nbytes


@dataclass(eq=False)
class _Tap:
    """A layer; of each of its parameters, by the name in the layer, the sum; and its calls in the pass that goes on."""

    module: nn.Module
    sums: dict[str, Sum]
    calls: list[_Call] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The full names of the parameters."""
        return {s.name for s in self.sums.values()}

    def enter(self, leaves: Mapping[str, Tensor], module: nn.Module, _: Any) -> None:
        """Detach the parameters of the layer, if they are those of the pass."""
        own = {key: leaves[s.name] for key, s in self.sums.items()}
        if all(module._parameters.get(key) is leaf for key, leaf in own.items()):
            self.whole = own
            module._parameters.update({key: leaf.detach() for key, leaf in own.items()})  # type: ignore[misc]

    def leave(self, mark: list[Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Put the parameters back, and note the call."""
        own, self.whole = self.whole, {}
        module._parameters.update(own)  # type: ignore[arg-type]
        if not own or not torch.is_grad_enabled():
            return output
        x, before = args[0] if args else kwargs["input"], len(self.calls)
        noted: Tensor = _Note.apply(mark[0], x, output, self)  # type: ignore[no-untyped-call]
        if len(self.calls) == before:
            raise RuntimeError("a layer whose call was not noted")
        return noted

    def fits(self) -> bool:
        """Tell whether the layer's rule holds for its calls: one at most, as contributions add up before they are squared.

        A call that was begun and not noted has gradients that nobody would find.
        """
        return not self.whole and len(self.calls) < 2 and all(self._rules(call) for call in self.calls)

    def _rules(self, call: _Call) -> bool:
        if isinstance(self.module, nn.modules.batchnorm._BatchNorm) and (
            self.module.training or self.module.running_mean is None
        ):
            return False  # it normalises each example with its own statistics
        dims, x = RULES[kind(self.module)][1], call.x
        fitting = x.dim() > 2 and x.shape[1] == 1 and (not dims or x.dim() - 1 in dims)
        return (fitting or kind(self.module) in ANYWHERE) and x._version == call.version

    def rule(self) -> Gather:
        """Return what adds the gradients of the output."""
        x = self.calls[0].x
        rule = RULES[kind(self.module)][0]
        if kind(self.module) in ANYWHERE:
            return rule(self.module, x)
        gather = rule(self.module, x.squeeze(1))
        return lambda g, weight, bias: gather(g.squeeze(1), weight, bias)


class _Note(torch.autograd.Function):
    """Notes a layer's call under `vmap`, where the tensors of all examples are at hand, and adds zeros to have its gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, mark: Tensor, x: Tensor, y: Tensor, tap: _Tap) -> tuple[Tensor, int]:  # noqa: ARG004
        """Add zeros, the same for all elements, so that no memory is held for them."""
        if in_dims[0] is None:
            raise RuntimeError("a layer under a `vmap` of the model's own")
        x, y = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((x, y), in_dims[1:3], strict=True)
        )
        zeros = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True).expand_as(y)
        tap.calls.append(_Call(x.detach(), x._version, zeros))
        return y + zeros, 0

    @staticmethod
    def forward(*_: Any) -> NoReturn:
        """Refuse: there is always a `vmap`."""
        raise NotImplementedError

    @staticmethod
    def setup_context(*_: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        """Refuse gradients that the model itself takes: in them it uses parameters that are detached."""
        raise NotImplementedError


class _Unasked(TorchFunctionMode):
    """Refuses models that look whether a tensor requires gradients, as hooks of gradients do: under `vmap` none does."""

    asking = tuple(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else pass."""
        if func in self.asking:
            raise RuntimeError("a model that looks at the graph")
        return func(*args, **(kwargs or {}))


_Reached = list[tuple[_Tap, Tensor]]
"""Layers, and the gradients of their outputs for all examples."""


class Layers:
    """Sums of a function of per-example gradients, for all parameters that only their layer's own forward uses.

    In its own forward a layer has its parameters detached. So if scores still depend on one, it is used elsewhere, too; it is
    left to others then, and so is that of a layer that is called more than once.

    Args:
        root: the model.
        theta: the parameters, by their names in it.
        of: what is summed; all but `torch.square` and `torch.abs` is left to others.
    """

    def __init__(self, root: nn.Module, theta: Mapping[str, nn.Parameter], of: Of) -> None:
        names = {id(p): name for name, p in theta.items()}
        self._of = of
        self._taps: list[_Tap] = []
        for _, module, mine, why in survey(root, theta) if of in ROOTS and not _everywhere() else ():
            if not why and "forward" not in vars(module):
                self._taps.append(_Tap(module, {key: Sum(names[id(p)], p, of) for key, p in mine.items()}))
        self._sums = [s for tap in self._taps for s in tap.sums.values()]
        self.held: int | None = None
        """Bytes of inputs and gradients of layers that the last pass has held for each example."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters that are not left to others."""
        return frozenset(n for tap in self._taps for n in tap.names)

    def add(self, scores: Callable[..., Any], theta: Mapping[str, nn.Parameter], parts: Any, dims: Any, size: int) -> None:
        """Add examples, for the parameters that are in `names` afterwards.

        Args:
            scores: called with parameters by name and one example, returns scores and the weights of their gradients.
            theta: the parameters.
            parts: all examples, as one tree of tensors.
            dims: the dimension of examples in each tensor.
            size: how many examples there are.
        """
        leaves = {name: theta[name].detach().requires_grad_() for name in self.names}
        with _watched(self._taps, leaves) as mark:
            try:
                with _Unasked():
                    score, weight = mapped(partial(_marked, scores, leaves, mark), (0, dims), torch.arange(size), parts)
                self._taps = [] if reaches(score, theta.values()) else [tap for tap in self._taps if tap.fits()]
                passes = self._passes(score, ROOTS[self._of](weight), leaves)
                first = next(passes, [])
            except UNMAPPED:
                self._taps = []
                return
            self.held = sum(call.nbytes for tap in self._taps for call in tap.calls) // size
            self._gather(chain([first], passes))

    def _passes(self, score: Tensor, weight: Tensor, leaves: Mapping[str, Tensor]) -> Iterator[_Reached]:
        """Go back from one score of all examples after the other; the first time, let go of what is used elsewhere."""
        watched = {name: leaves[name] for name in self.names}
        for c in range(score.shape[1] if score.requires_grad and self._taps else 0):
            along = torch.zeros_like(score)
            along[:, c] = weight[:, c]
            called = [tap for tap in self._taps if tap.calls]
            inputs = [*(tap.calls[0].zeros for tap in called), *watched.values()]
            if not inputs:  # every layer is used elsewhere, too
                return
            found = torch.autograd.grad(score, inputs, along, c + 1 < score.shape[1], allow_unused=True)
            elsewhere = {n for n, g in zip(watched, found[len(called) :], strict=True) if g is not None}
            self._taps, watched = [tap for tap in self._taps if not elsewhere & tap.names], {}
            yield [(tap, g) for tap, g in zip(called, found, strict=False) if g is not None and tap in self._taps]

    @torch.no_grad()
    def _gather(self, passes: Iterable[_Reached]) -> None:
        """Add what gradients of outputs mean for the layers' parameters."""
        rules = {tap: tap.rule() for tap in self._taps if tap.calls}
        for reached in passes:
            for tap, g in reached:
                for s in tap.sums.values():
                    s.open(1)
                with torch.autocast(g.device.type, enabled=False):
                    rules[tap](g, tap.sums.get("weight"), tap.sums.get("bias"))

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all passes, by name; there is none where no gradient came."""
        return {s.name: s.take(1) for s in self._sums if s.examples}


def _everywhere() -> bool:
    """Tell whether there are hooks of all modules' calls, which change outputs before `_Tap.leave` sees them."""
    return any((modules._global_forward_hooks, modules._global_forward_pre_hooks))


def _marked(scores: Callable[..., Any], leaves: Mapping[str, Tensor], here: list[Tensor], mark: Tensor, example: Any) -> Any:
    """Leave a tensor of the mapping where `_Note` finds it."""
    here[:] = [mark]
    return scores(leaves, example)


@contextmanager
def _watched(taps: Sequence[_Tap], leaves: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Watch the layers' calls; yield the list for a tensor of the mapping that these are under."""
    mark: list[Tensor] = []
    handles = []
    try:
        for tap in taps:
            handles.append(tap.module.register_forward_pre_hook(partial(tap.enter, leaves)))
            handles.append(tap.module.register_forward_hook(partial(tap.leave, mark), with_kwargs=True, prepend=True))
        yield mark
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.calls.clear()
            tap.whole = {}
