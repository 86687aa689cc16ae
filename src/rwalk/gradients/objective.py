"""What is differentiated at examples: read from a model's output, in a way that is found out on the first of them."""

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rwalk._errors import explain
from rwalk.gradients.batches import Batch, tensors
from rwalk.gradients.independence import looked_at, precision, refuse_constant
from rwalk.gradients.likelihood import IGNORED, Likelihood, named, own_loss, read_output, refuse_chances, settled
from rwalk.gradients.undisturbed import Kept, differentiable
from rwalk.importance.base import Objective


class Scores:
    """What is differentiated at examples.

    Args:
        objective: one of those of `rwalk.gradients.over`.
        loss: as there.
        logits: as there.

    Raises:
        ValueError: if the objective is unknown or does not go with the loss.
    """

    def __init__(self, objective: Objective, loss: Callable[[Any, Any], Tensor] | None, logits: Callable[[Any], Tensor] | None):
        self.objective: Objective = objective
        self.given = None if objective == "norm" else named(loss)
        self.loss = loss if objective == "true" else None
        self.logits = logits
        self.likelihood: Likelihood | None = None
        self.ignored = 0
        self._along, self._apart = set[int](), set[int]()  # which inputs, by their places, hold examples or are shared
        self._looked = self._compared = False  # whether there was any batch, and one of several examples
        self._refuse(loss)

    def _refuse(self, loss: Any) -> None:
        if self.objective not in get_args(Objective):
            known = ", ".join(f'"{name}"' for name in get_args(Objective))
            raise ValueError(explain(f'objective "{self.objective}"', f"one of {known}", "Pass one of these."))
        if loss is not None and self.given is None and self.objective in ("sample", "exact"):
            came = f'a `loss` that names no distribution, with the labels "{self.objective}"'
            expected = "cross_entropy, binary_cross_entropy_with_logits or mse_loss of torch.nn.functional, or their modules"
            remedy = 'Pass one of these without weights or smoothing, or use `labels="true"` with a loss of your own.'
            raise ValueError(explain(came, expected, remedy))

    @property
    def likely(self) -> bool:
        """Whether a log-likelihood is differentiated, and not a loss of the user's or a norm."""
        return self.objective != "norm" and self.loss is None

    def ready(self, root: nn.Module, batch: Batch, kept: Kept) -> Batch:
        """Return the examples of a batch that count, and find out with the first ones how to read the model's output.

        Raises:
            ValueError: if the model, the targets and the objective do not fit together.
        """
        if self.objective == "true" and batch.target is None:
            raise ValueError(untargeted())
        batch = self._alike(root, batch, kept)
        counted = self._counted(batch, self.likelihood or self.given or Likelihood("categorical"))
        self._refuse_ignored(counted.target)
        if counted.size > self._looked and not self._compared:  # a first batch of one example cannot be compared
            self._look(root, counted, kept)
        if counted.size and self.likelihood is not None:
            counted = self._counted(batch, self.likelihood)  # of a regression nothing is ignored
            self.likelihood.refuse(self.objective, counted.target)
        self.ignored += batch.size - counted.size
        if self.ignored and self.likelihood is not None and self.likelihood.family == "gaussian":
            came = f"a regression whose first {self.ignored} targets are all {IGNORED}"
            raise ValueError(explain(came, "targets that tell what they are", "Pass targets as floating-point numbers."))
        return counted

    def _alike(self, root: nn.Module, batch: Batch, kept: Kept) -> Batch:
        """Return a batch with its inputs read as in other batches, where it may be an accident how long they are."""
        self._apart |= {k for k, t in enumerate(batch.whole) if id(t) in batch.shared and batch.along}
        doubtful = batch.doubtful - self._apart - self._along
        batch = batch.sharing(batch.along & self._apart)
        if doubtful and batch.size > 1:
            some = chain.from_iterable(combinations(sorted(doubtful), n) for n in range(len(doubtful) + 1))
            shared = next((set(s) for s in some if self._comparable(root, batch.sharing(s), kept)), None)
            if shared is None:
                raise ValueError(_ambiguous())
            batch = batch.sharing(shared)
            self._apart |= shared
        self._along |= batch.along - self._apart
        if self._along & self._apart:
            raise ValueError(_ambiguous())
        return batch

    def _comparable(self, root: nn.Module, batch: Batch, kept: Kept) -> bool:
        """Tell whether a few examples can be run together, and do not depend on each other then."""
        try:
            return self._compare(root, batch, kept)[0].size > 1
        except Exception:
            return False

    def _compare(self, root: nn.Module, batch: Batch, kept: Kept) -> tuple[Batch, Any, Any]:
        """Run a few examples together, and one alone."""

        def run(part: Batch) -> Any:
            with differentiable(root.parameters()):
                return kept.call(root, *part.args, **part.kwargs)

        exact = precision([*root.parameters(), *tensors((batch.args, batch.kwargs))])
        return looked_at(run, self._read, batch, exact)

    def _refuse_ignored(self, target: Any) -> None:
        """Raise a ValueError where the loss would take targets that do not count for numbers."""
        binary = self.loss is not None and self.given is not None and self.given.family == "bernoulli"
        if binary and isinstance(target, Tensor) and not target.is_floating_point() and (target == IGNORED).any():
            came = f"targets of {IGNORED} under binary_cross_entropy_with_logits, which takes them for numbers"
            remedy = 'Pass a `loss` that leaves them out, or use `labels="sample"` or "exact".'
            raise ValueError(explain(came, "targets of 0 and 1", remedy))

    def _counted(self, batch: Batch, likelihood: Likelihood) -> Batch:
        """Leave out examples without any target that counts, where that is how labels are read."""
        if self.objective == "norm" or (self.loss is not None and self.given is None and not batch.given):
            return batch
        rows = likelihood.counted(batch.target, batch.size)
        return batch if rows is None else batch.keep(rows)

    def _look(self, root: nn.Module, batch: Batch, kept: Kept) -> None:
        """Look at a few examples: whether they depend on each other, and what the output means."""
        few, output, alone = self._compare(root, batch, kept)
        refuse_constant(self._differentiated(alone, batch), root.parameters())
        self._looked, self._compared = True, batch.size > 1
        if self.likely and self.likelihood is None:
            z, inputs = read_output(output, self.logits), (few.args, few.kwargs)
            self.likelihood = settled(z, few.size, few.target, batch.target, own_loss(output), self.given, inputs)
            if self.logits is None and self.given is None:
                refuse_chances(self.likelihood, z)
            self.likelihood.refuse(self.objective, batch.target)
            self.likelihood.scores(self.objective, z, few.target, few.size)  # raises what does not fit, outside of any mapping

    def _differentiated(self, alone: Any, batch: Batch) -> Tensor:
        """Return what is differentiated of the output for the first example."""
        return self._values(alone) if self.loss is None else self._lost(alone, batch.cut(0, 1).target)

    def _lost(self, output: Any, target: Any) -> Tensor:
        """Return the user's loss; one that names a distribution is given the logits alone, and numbers in their precision."""
        assert self.loss is not None
        if self.given is not None:
            output = read_output(output, self.logits)
            if self.given.family != "categorical" and isinstance(target, Tensor):
                target = target.to(output.dtype)
        return scalar(self.loss(output, target))

    def _read(self, output: Any) -> Tensor | None:
        """Find the tensor that is looked at; with a loss of the user's, any that the output has."""
        if self.loss is None:
            return self._values(output)
        try:
            return read_output(output, self.logits)
        except TypeError:
            return next((t for t in tensors(output) if t.dim() and t.is_floating_point()), None)

    def _values(self, output: Any) -> Tensor:
        z = read_output(output, self.logits)
        if z.is_complex():
            raise ValueError(explain("a complex output", "real numbers", "Pass `logits=` that returns such."))
        return z

    def __call__(self, output: Any, target: Any, size: int = 1) -> tuple[Tensor, Tensor]:
        """Return scores to differentiate one by one and the weights of their gradients, both of shape (size, scores).

        Raises:
            TypeError: if there are no logits in the output.
            ValueError: if they do not fit the targets.
        """
        if self.likelihood is not None:
            return self.likelihood.scores(self.objective, self._values(output), target, size)
        if self.loss is not None:
            score = self._lost(output, target)
        else:
            values = self._values(output)
            score = values.masked_fill(values == -torch.inf, 0).square().sum()  # a shut class is no output
        return score.reshape(1, 1), torch.ones_like(score).reshape(1, 1)


def _ambiguous() -> str:
    """Say that nobody knows which inputs belong to single examples."""
    came = "inputs whose first dimension is as long as there are examples, while it may be another dimension of the data"
    remedy = "Give what all examples share a first dimension of 1, or use batches of another size."
    return explain(came, "inputs that hold one row for each example in all batches, or in none", remedy)


def untargeted() -> str:
    """Say that a batch has no target."""
    return explain(
        "a batch without a target",
        "labels, which the true log-likelihood and a `loss` are about",
        'Yield pairs `(inputs, target)` or mappings with "labels", or use labels drawn from the model.',
    )


def scalar(value: Any) -> Tensor:
    """Return what `loss` gave as a scalar, or raise a ValueError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a `{type(value).__name__}`"
        raise ValueError(
            explain(f"{came} from `loss`", "a scalar tensor for one example", "Let `loss` average or sum over its output.")
        )
    return value.reshape(())
