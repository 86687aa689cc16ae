"""Squared per-example gradients, gathered during the user's own backward pass."""

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwalk._errors import explain
from rwalk.gradients.batches import Batch, first_size, tensors
from rwalk.gradients.comparison import CANCELLED, TOLERANCE, Comparison
from rwalk.gradients.layers import RULES, Gather, Sum, survey
from rwalk.gradients.pooled import Gathered, pooled
from rwalk.gradients.undisturbed import set_aside, undisturbed
from rwalk.parallel import Ranks, kind, sharded, whole
from rwalk.parameters import bare

DIFFERENT = explain(
    "per-example gradients that do not sum to the gradient in use",
    "one backward pass of a mean loss for each gradient that the optimiser uses",
    "The square of the batch's gradient is used for such steps; passes that are dropped, further gradients through the model, "
    "clipping by value and terms of the loss about weights cause this.",
)

ODD = "what its layer contributes does not sum to its gradient: it is used elsewhere too, or the gradient is changed"

HOOKED = explain(
    "a forward hook on all modules (`register_module_forward_hook`), which may change what per-example gradients are made of",
    "hooks of single modules",
    "The square of the batch's gradient is used while there is such a hook.",
)


def _unfit(module: nn.Module, x: Tensor, batch: int | None) -> str | None:
    """Say why the gradient of a module with input x cannot be told by example."""
    dims = RULES[kind(module)][1]
    own = 0 if isinstance(module, nn.Embedding) else len(getattr(module, "normalized_shape", (0,)))
    if batch is None:
        return "it is called outside of the model's forward, or the model takes no tensor"
    if (dims and x.dim() not in dims) or x.dim() <= own:
        return f"its input of shape {tuple(x.shape)} has no dimension for examples"
    if x.shape[0] != batch:
        return f"the first dimension of its input is {x.shape[0]}, that of the batch {batch}"
    return None


@dataclass
class _Tap:
    """A supported module and its sums; `fired` is the forward pass whose gradient came last."""

    name: str
    sums: dict[str, Sum]
    fired: int = 0
    closed: bool = False

    def __reduce__(self) -> Any:
        """A copy, which comes about where a model is copied with its hooks, gathers nothing."""
        return _Tap, (self.name, {}, 0, True)

    def wanted(self, which: str) -> Sum | None:
        """Return the sum for "weight" or "bias" unless it is not asked for or frozen."""
        found = self.sums.get(which)
        return found if found is not None and found.parameter.requires_grad else None


@dataclass
class _Passes:
    """The forward passes of a model, numbered, and the examples whose gradients came since the last `take`.

    They are `spoiled` if several backward passes went through one graph, and `hooked` if a hook on all modules was there.
    """

    number: int = 0
    batch: int | None = None
    examples: int = 0
    counted: set[int] = field(default_factory=set)
    spoiled: bool = False
    hooked: bool = False

    def clear(self) -> None:
        """Begin the next step."""
        self.examples, self.spoiled, self.hooked = 0, False, False
        self.counted.clear()

    def count(self, number: int, batch: int) -> int:
        """Count the examples of a forward pass once; return the count of all."""
        if number not in self.counted:
            self.counted.add(number)
            self.examples += batch
        return self.examples


class _Hook(partial[Any]):
    """A hook of ours; `torch.jit.script`, which compiles hooks, asks for the name that no other caller needs."""

    @property
    def __name__(self) -> str:
        """Say what to do instead."""
        came = '`torch.jit.script` of a model with a consolidator whose rule has `fisher="example"` attached'
        raise AttributeError(explain(came, "a model that is not watched", "Call `detach()` before, and `attach` afterwards."))


class Squares:
    """Sum of squared per-example gradients, gathered while the user's own backward pass runs.

    The loss must be the mean over the examples of a batch, unscaled; over several micro-batches between two calls of `take`,
    the mean over all of their examples. The first dimension of inputs and outputs is that of the examples. A parameter is
    gathered if one module alone uses it, once in a forward pass, and that module is one of `RULES`, exactly. All others have
    no entry in what `take` returns and are reported once, in a UserWarning.

    At the first step, and at the first one after `look_again`, what was gathered of each parameter is compared with its
    gradient, and a part of the batch is run for a look at where the layers have the examples. At other steps the smallest
    parameter alone is compared.

    Args:
        model: the network that is trained, called as a whole.
        theta: the parameters to gather, by name; those that require no gradient are left out.
        strict: raise a RuntimeError instead of the warning.

    Raises:
        RuntimeError: with `strict`, if a module can be told to be unsupported from its kind.
    """

    _copied = False

    def __init__(self, model: nn.Module, theta: Mapping[str, nn.Parameter], strict: bool = False) -> None:
        self.strict = strict
        self._root = bare(model)
        self._ranks = Ranks.of(model)
        self._theta = {name: p for name, p in theta.items() if p.requires_grad}
        self._passes = _Passes()
        self._found: dict[str, str] = {}
        self._reported: set[str] = set()
        self._owner, self._taps = self._survey()
        self._layout = {s.name: s.parameter for s in self._sums()}
        self.look_again()
        self._handles = [self._root.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True)]
        for module, tap in self._taps.items():
            hook = _Hook(self._after, tap)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        try:
            self._report()
        except (RuntimeError, Warning):
            self.close()
            raise

    def __reduce__(self) -> Any:
        """Copy nothing, where a model is copied with its hooks."""
        return _without_a_model, ()

    def __repr__(self) -> str:
        """Show how much is gathered."""
        return f"Squares(gathered={len(self._sums())}, of={len(self._theta)}, strict={self.strict})"

    @property
    def nbytes(self) -> int:
        """Bytes of the sums that are kept from one step to the next."""
        return sum(s.nbytes for s in self._sums())

    def look_again(self) -> None:
        """Look at all layers and parameters again at the next step, as a new task may use them otherwise."""
        self._placed = False
        self._silent: set[str] = set()
        self._compare(self._layout)

    def _compare(self, names: Iterable[str]) -> None:
        """Choose the parameters whose sums are compared with their gradients from the next step on."""
        self._compared = frozenset(names)
        for s in self._sums():
            s.compared = s.name in self._compared

    def take(self) -> dict[str, Tensor]:
        """Return the mean over examples of the squared per-example gradient since the last call, and start anew.

        Returns:
            For each parameter gathered, by name, a tensor of its shape in state precision, valid until the next backward pass.

        Raises:
            RuntimeError: with `strict`, if a module turned out to be unsupported; the message names it.
        """
        passes, sums = self._passes, self._sums()
        with torch.no_grad():
            totals = {s.name: s.total for s in sums if s.examples and s.total is not None}
            squares = {s.name: s.take(passes.examples) for s in sums if s.examples}
            bounds = {name: squares[name].sum() for name in totals}
            found = Gathered(squares, frozenset(), totals, bounds, passes.spoiled or passes.hooked)
            if self._ranks.groups:
                found = self._joined(found)
            self._find_idle(set(found.squares))
            scale = self._scale(found) if found.squares else 1.0
            taken = {} if scale == 0 else {n: square for n, square in found.squares.items() if n not in self._found}
            for square in taken.values() if scale != 1 else ():
                square.mul_(scale)
        for s in sums:
            s.total = None
        passes.clear()
        self._report()
        return taken

    def _joined(self, mine: Gathered) -> Gathered:
        """Join what the ranks have gathered, and close here what had to be closed on another one."""
        mine = mine._replace(shut=frozenset(self._layout) - {s.name for s in self._sums()})
        found = pooled(mine, self._passes.examples, self._layout, self._compared, self._ranks)
        for tap in self._open():
            if any(s.name in found.shut for s in tap.sums.values()):
                self._refuse(tap, "it could not be gathered on another rank")
        return found

    def _scale(self, found: Gathered) -> float:
        """Compare what was gathered with the gradient in use: return the factor between their squares, 0 where they differ.

        Contributions of examples sum to the gradient, times a factor that comes from loss scaling or from clipping by norm.
        Parameters to which this does not apply are left out if it does to others, else the gradient was made otherwise.
        """
        if found.spoiled:
            self._say(HOOKED if self._passes.hooked else DIFFERENT)
            return 0.0
        compared: dict[str, Comparison] = {}
        for name, total in found.totals.items():
            grad = whole(self._layout[name].grad)
            if grad is not None:
                compared[name] = Comparison.of(total, grad, found.bounds[name])
        if not all(math.isfinite(c.grad) for c in compared.values()):
            return 0.0  # no step to measure
        telling = {n: c for n, c in compared.items() if c.telling} or compared
        factor = statistics.median_low([c.factor for c in telling.values()]) if telling else 1.0
        odd = {n for n, c in compared.items() if not c.fits(factor, CANCELLED if len(compared) > 1 else 0.0)}
        if telling and odd.issuperset(telling):
            self._say(DIFFERENT)
            return 0.0
        if len(compared) != 1 or telling.keys() != compared.keys():
            self._settle(found, compared, odd)
        return 1.0 if abs(factor - 1) <= TOLERANCE else factor * factor  # which may be infinite

    def _settle(self, found: Gathered, compared: Mapping[str, Comparison], odd: set[str]) -> None:
        """Leave out odd parameters, and keep the smallest with a sum to speak of to compare at each step."""
        self._found.update(dict.fromkeys(odd, ODD))
        for tap in self._open():
            tap.sums = {key: s for key, s in tap.sums.items() if s.name not in odd}
        self._silent |= {name for name, c in compared.items() if not c.telling}
        sizes = {n: (n in self._silent, self._layout[n].numel(), self._layout[n].dim()) for n in found.squares if n not in odd}
        self._compare((self._compared - compared.keys()) | {min(sizes, key=lambda name: sizes[name])})

    def _say(self, text: str) -> None:
        """Warn once, or raise an error with `strict`."""
        if self.strict:
            raise RuntimeError(text)
        if text not in self._reported:
            self._reported.add(text)
            warnings.warn(text, stacklevel=4)

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for tap in self._taps.values():
            tap.closed = True

    def _open(self) -> list[_Tap]:
        return [tap for tap in self._taps.values() if not tap.closed]

    def _sums(self) -> list[Sum]:
        return [s for tap in self._open() for s in tap.sums.values()]

    def _survey(self) -> tuple[dict[str, str], dict[nn.Module, _Tap]]:
        """Find the owner of every parameter, and the modules that can be gathered; note why others cannot."""
        name_of = {id(p): name for name, p in self._theta.items()}
        owner: dict[str, str] = {}
        taps: dict[nn.Module, _Tap] = {}
        for path, module, mine, why in survey(self._root, self._theta):
            for p in mine.values():
                owner.setdefault(name_of[id(p)], path)
            if why:
                self._found[path] = why
            else:
                taps[module] = _Tap(path, {key: Sum(name_of[id(p)], p) for key, p in mine.items()})
        return owner, taps

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Number a forward pass of the whole model and note its batch size."""
        if not torch.is_grad_enabled() or self._aside():
            return
        self._drop_what_was_dropped()
        self._passes.number += 1
        self._passes.batch = first_size((args, kwargs))
        if not self._placed and (self._passes.batch or 0) > 1:
            self._placed = True
            self._look_at_places(args, kwargs)

    def _look_at_places(self, args: Any, kwargs: Any) -> None:
        """Refuse layers that have something else in the dimension of examples, which may be as long as the batch by chance.

        They see no fewer of it where the model is given fewer examples.
        """
        size = self._passes.batch or 0
        shared = frozenset(id(t) for t in tensors((args, kwargs)) if not t.dim() or t.shape[0] != size)
        part = Batch(args, kwargs, None, size, shared).cut(0, 2 if size > 2 else 1)
        for tap, x in [] if any(map(sharded, self._layout.values())) else self._inputs(part):
            if not tap.closed and x.dim() and len(x) == size:
                self._refuse(tap, f"the first dimension of its input is {size} where the model is given {part.size} examples")

    def _inputs(self, part: Batch) -> list[tuple[_Tap, Tensor]]:
        """Return the inputs of layers as the model runs on some examples; none where it cannot."""
        seen: list[tuple[_Tap, Tensor]] = []
        with ExitStack() as stack:
            for module, tap in self._taps.items():
                note = partial(lambda tap, _, args, kwargs: seen.append((tap, args[0] if args else kwargs["input"])), tap)
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.enter_context(undisturbed(self._root))
            try:
                self._root(*part.args, **part.kwargs)
            except Exception:  # a model that takes no fewer
                return []
        return seen

    def _aside(self) -> bool:
        """Tell whether what runs is no training: a compilation, a trace, a function transform, or a pass over data."""
        traced = self._copied or torch.compiler.is_compiling() or torch._C._is_tracing()
        return traced or torch._C._are_functorch_transforms_active() or self._root in set_aside

    def _drop_what_was_dropped(self) -> None:
        """Start anew if the gradient of earlier passes was thrown away, as for a step that a loss scaler skipped."""
        sums = [s for s in self._sums() if s.examples]
        if sums and all(s.parameter.grad is None for s in sums):
            for s in sums:
                s.examples, s.total = 0, None
            self._passes.clear()

    def _after(self, tap: _Tap, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Wait for the gradient of a module's output."""
        if tap.closed or self._aside():
            return
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        if torch.nn.modules.module._global_forward_hooks:
            self._passes.hooked = True
            return
        x = (args[0] if args else kwargs["input"]).detach()
        why = _unfit(module, x, self._passes.batch)
        if why:
            self._refuse(tap, why)
        elif len(x):
            rule = RULES[kind(module)][0]
            gather = partial(self._gather, tap, rule(module, x), output.shape, self._passes.number, [])
            _unaltered(output).register_hook(gather)

    @torch.no_grad()
    def _gather(self, tap: _Tap, gather: Gather, shape: torch.Size, number: int, came: list[bool], g: Any) -> None:
        """Add the contributions of one backward pass; `came` is empty until the first one through this graph."""
        if g is None or tap.closed or self._aside() or torch._C._functorch.is_legacy_batchedtensor(g):
            return
        if came:
            self._passes.spoiled = True
            return
        came.append(True)
        if tap.fired == number:
            self._refuse(tap, "it is used more than once in one forward pass of the model")
            return
        tap.fired = number
        weight, bias = tap.wanted("weight"), tap.wanted("bias")
        examples = self._passes.count(number, shape[0])
        for one in (weight, bias):
            if one is not None:
                one.open(examples)
        with torch.autocast(g.device.type, enabled=False) if torch.is_autocast_enabled(g.device.type) else nullcontext():
            gather(g.detach().reshape(shape), weight, bias)

    def _refuse(self, tap: _Tap, why: str) -> None:
        tap.closed = True
        tap.sums.clear()
        self._found[tap.name] = why

    def _find_idle(self, gathered: set[str]) -> None:
        """Note the modules whose parameters got a gradient that passed by the module's own forward."""
        if self._passes.hooked:
            self._say(HOOKED)
            return
        if not self._passes.examples and any(tap.fired for tap in self._taps.values()):
            return  # no backward pass since the last call: these are gradients of before
        for name, p in self._theta.items():
            owner = self._owner.get(name, name)
            known = owner in self._found or name in self._found or name in gathered
            if not known and p.requires_grad and p.grad is not None and p.grad.any():
                self._found[owner] = "its parameters are used outside of its forward, or it is compiled"

    def _report(self) -> None:
        """Name the modules that were found to be unsupported since the last report."""
        fresh = {name: why for name, why in self._found.items() if name not in self._reported}
        self._reported.update(fresh)
        if not fresh:
            return
        listed = "; ".join(f"`{name or type(self._root).__name__}`: {why}" for name, why in fresh.items())
        came = f"modules whose per-example gradients cannot be gathered ({listed})"
        expected = "layers such as Linear, Conv, Embedding or a norm, each used once in a forward pass on a batch of examples"
        if self.strict:
            raise RuntimeError(explain(came, expected, "Use such layers, freeze these parameters, or pass `strict=False`."))
        remedy = "The square of their batch gradient is used instead; nothing need be done."
        warnings.warn(explain(came, expected, remedy), stacklevel=3)


def _without_a_model() -> Squares:
    """Return what hooks of a copied model belong to: it looks at nothing."""
    idle = object.__new__(Squares)
    idle._copied = True
    return idle


def _unaltered(output: Tensor) -> Tensor:
    """Return the tensor whose gradient is that of a module's output even if the output is modified in place afterwards.

    Modifying a view in place gives the view a new history without its hooks; hooks of its base stay where they are.
    """
    base = output._base if output._is_view() else None
    if base is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base
