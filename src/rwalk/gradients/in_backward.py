"""Squared per-example gradients, collected during the user's own backward pass."""

import math
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from rwalk._errors import warn
from rwalk._parameters import bare
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.shards import full_tensor
from rwalk.gradients.across_ranks import StepSquares, sum_across_ranks
from rwalk.gradients.backward_hooks import BackwardHooks
from rwalk.gradients.comparison import CommonFactor, GradientFit

NOT_THE_GRADIENT = (
    "The per-example gradients do not sum to the gradient in use, so the square of the batch's gradient is used for this step "
    "and others like it. Each gradient that the optimiser uses has to come from one backward pass of a mean loss; passes that "
    "are dropped, further gradients through the model, clipping by value and terms of the loss about weights prevent this."
)

GLOBAL_HOOK = (
    "There is a forward hook on all modules (`register_module_forward_hook`), which may change what per-example gradients are "
    "made of, so the square of the batch's gradient is used. Register hooks on single modules instead."
)

ODD = "what its layer contributes does not sum to its gradient: it is used elsewhere too, or the gradient is changed"


class Squares:
    """Sum of squared per-example gradients, collected while the user's own backward pass runs.

    The loss must be the mean over the examples of a batch, unscaled; over several micro-batches between two calls of `take`,
    the mean over all of their examples. The first dimension of inputs and outputs is that of the examples. A parameter is
    collected if a single module uses it, once in each forward pass, and that module's class is in `LAYER_RULES`. All other
    parameters have no entry in what `take` returns and are named once, in a UserWarning.

    At the first step, and at the first one after `look_again`, the sum of each parameter's contributions is compared with its
    gradient, and part of the batch is run to see whether the first dimension of each layer's input is that of the examples.
    At other steps the smallest parameter alone is compared.

    Args:
        model: the network that is trained, called as a whole.
        theta: the parameters to collect, by name; those that require no gradient are left out.
        strict: raise a RuntimeError instead of the warning.

    Raises:
        RuntimeError: with `strict`, if the class of a module is not supported.
    """

    def __init__(self, model: nn.Module, theta: Mapping[str, nn.Parameter], strict: bool = False) -> None:
        self.strict = strict
        self._root = bare(model)
        self._ranks = Ranks.of(model)
        self._theta = {name: p for name, p in theta.items() if p.requires_grad}
        self._hooks = BackwardHooks(self._root, self._theta)
        self._reported: set[str] = set()
        self._candidates = {s.name: s.parameter for s in self._hooks.sums()}
        self.look_again()
        try:
            self._report()
        except (RuntimeError, Warning):
            self.close()
            raise

    def __repr__(self) -> str:
        """Show how many parameters are collected."""
        return f"Squares(gathered={len(self._hooks.sums())}, of={len(self._theta)}, strict={self.strict})"

    @property
    def nbytes(self) -> int:
        """Bytes of the sums that are kept from one step to the next."""
        return sum(s.nbytes for s in self._hooks.sums())

    def look_again(self) -> None:
        """Check all layers and parameters again at the next step, as a new task may use them otherwise."""
        self._hooks.check_inputs_again()
        self._insignificant: set[str] = set()
        self._compare(self._candidates)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._hooks.close()

    def take(self) -> dict[str, Tensor]:
        """Return the mean over examples of the squared per-example gradient since the last call, and start anew.

        Returns:
            For each parameter collected, by name, a tensor of its shape in state precision, valid until the next backward pass.

        Raises:
            RuntimeError: with `strict`, if a module turned out to be unsupported; the message names it.
        """
        with torch.no_grad():
            found = self._step_squares()
            self._find_bypassed(found)
            scale = self._scale(found) if found.squares else 1.0
            taken = {} if scale == 0 else {n: square for n, square in found.squares.items() if n not in self._hooks.problems}
            for square in taken.values() if scale != 1 else ():
                square.mul_(scale)
        self._hooks.clear()
        self._report()
        return taken

    def _step_squares(self) -> StepSquares:
        """Return what was collected since the last step; on several ranks, of all of them."""
        hooks, sums = self._hooks, self._hooks.sums()
        totals = {s.name: s.total for s in sums if s.examples and s.total is not None}
        squares = {s.name: s.take(hooks.examples) for s in sums if s.examples}
        bounds = {name: squares[name].sum() for name in totals}
        closed = frozenset(self._candidates) - {s.name for s in sums}
        found = StepSquares(squares, closed, totals, bounds, hooks.spoiled or hooks.global_hook)
        if self._ranks.groups:
            found = sum_across_ranks(found, hooks.examples, self._candidates, self._compared, self._ranks)
            hooks.close_layers(found.closed, "it could not be gathered on another rank")
        return found

    def _compare(self, names: Iterable[str]) -> None:
        """Choose the parameters whose sums are compared with their gradients from the next step on."""
        self._compared = frozenset(names)
        for s in self._hooks.sums():
            s.compared = s.name in self._compared

    def _scale(self, found: StepSquares) -> float:
        """Compare what was collected with the gradient in use; return the factor between their squares, 0 if they differ.

        Contributions of examples sum to the gradient, times a factor that comes from loss scaling or from clipping by norm.
        Parameters to which this does not apply are left out if it does to others, else the gradient was made otherwise.
        """
        if found.spoiled:
            self._warn_once(GLOBAL_HOOK if self._hooks.global_hook else NOT_THE_GRADIENT)
            return 0.0
        grads = {name: full_tensor(self._candidates[name].grad) for name in found.totals}
        fits = {n: GradientFit.of(found.totals[n], g, found.bounds[n]) for n, g in grads.items() if g is not None}
        if not all(math.isfinite(fit.grad) for fit in fits.values()):
            return 0.0  # no valid step
        common = CommonFactor.of(fits)
        if not common.agrees:
            self._warn_once(NOT_THE_GRADIENT)
            return 0.0
        if len(fits) != 1:
            self._leave_out(common, fits.keys(), found.squares)
        return common.squared

    def _leave_out(self, common: CommonFactor, checked: Set[str], squares: Iterable[str]) -> None:
        """Leave out odd parameters, and compare the smallest of the others, if possible with a significant sum, from now on."""
        self._hooks.close_parameters(common.odd, ODD)
        self._insignificant |= common.insignificant
        sizes = {n: (n in self._insignificant, p.numel(), p.dim()) for n, p in self._candidates.items()}
        smallest = min((name for name in squares if name not in common.odd), key=lambda name: sizes[name])
        self._compare((self._compared - checked) | {smallest})

    def _find_bypassed(self, found: StepSquares) -> None:
        if self._hooks.global_hook:
            self._warn_once(GLOBAL_HOOK)
        else:
            self._hooks.find_bypassed(self._theta, found.squares)

    def _warn_once(self, text: str) -> None:
        """Warn once, or raise an error with `strict`."""
        if self.strict:
            raise RuntimeError(text)
        if text not in self._reported:
            self._reported.add(text)
            warn(text)

    def _report(self) -> None:
        """Name the modules that were found to be unsupported since the last report."""
        fresh = {name: why for name, why in self._hooks.problems.items() if name not in self._reported}
        self._reported.update(fresh)
        if not fresh:
            return
        listed = "; ".join(f"`{name or type(self._root).__name__}`: {why}" for name, why in fresh.items())
        text = (
            f"The per-example gradients of some modules cannot be gathered ({listed}). That takes layers such as Linear, Conv, "
            "Embedding or a norm, each used once in a forward pass on a batch of examples."
        )
        if self.strict:
            raise RuntimeError(f"{text} Use such layers, freeze these parameters, or pass `strict=False`.")
        warn(f"{text} The square of their batch gradient is used instead; nothing need be done.")
