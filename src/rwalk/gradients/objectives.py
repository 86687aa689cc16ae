"""What is differentiated at each example: scores of a model's output, which the first examples show how to read."""

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rwalk._errors import warn
from rwalk.gradients.batches import ExampleBatch, tensors
from rwalk.gradients.directions import output_rows, random_scores, refuse_constant_norm
from rwalk.gradients.independence import compare_examples, precision, refuse_without_gradient
from rwalk.gradients.isolation import ModelSnapshot, differentiable
from rwalk.gradients.likelihood import IGNORED, Likelihood, named_distribution
from rwalk.gradients.outputs import (
    find_likelihood,
    given_inputs,
    own_loss,
    read_output,
    refuse_probabilities,
    without_padding,
)
from rwalk.rules.base import Objective

SURE = 0.02
"""Mean loss in nats below which a model counts as sure of its labels: a probability of 98 % for each."""


class Scores:
    """What is differentiated at each example.

    Args:
        objective: one of those of `per_example_over`.
        loss: as there.
        logits: as there.

    Raises:
        ValueError: if the objective is unknown or does not go with the loss.
    """

    def __init__(self, objective: Objective, loss: Callable[[Any, Any], Tensor] | None, logits: Callable[..., Tensor] | None):
        self.objective: Objective = objective
        self.given = None if objective == "norm" else named_distribution(loss)
        self.loss = loss if objective == "true" else None
        self.logits = logits
        self.likelihood: Likelihood | None = None
        self.ignored = 0
        self.passes = 1  # how many backward passes an example takes
        self._with_examples, self._shared = set[int](), set[int]()  # indices of inputs
        self._checked = self._compared = False  # whether there was any batch, and one with several examples
        self._refuse(loss)

    def _refuse(self, loss: Any) -> None:
        if self.objective not in get_args(Objective):
            known = ", ".join(f'"{name}"' for name in get_args(Objective))
            raise ValueError(f'There is no objective "{self.objective}"; pass one of {known}.')
        if self.objective == "output" and loss is not None:
            raise ValueError(
                'The labels "output" measure the output itself and take no `loss`. Leave it out, and let `logits=` read what '
                'is to be kept of the output; or use `labels="sample"` with a loss that names a distribution.'
            )
        if loss is not None and self.given is None and self.objective in ("sample", "exact"):
            raise ValueError(
                f'The `loss` names no distribution, which the labels "{self.objective}" need. Pass cross_entropy, '
                "binary_cross_entropy_with_logits or mse_loss of torch.nn.functional, or their modules, without weights or "
                'smoothing; or use `labels="true"` with a loss of your own.'
            )

    @property
    def is_likelihood(self) -> bool:
        """Whether a log-likelihood is differentiated, and not a loss of the user's or the output itself."""
        return self.objective not in ("norm", "output") and self.loss is None

    @property
    def takes_batches(self) -> bool:
        """Whether scores of many examples can be computed together: all except a user's loss, which takes one, and norms."""
        return self.is_likelihood or self.objective == "output"

    def prepare(self, root: nn.Module, batch: ExampleBatch, snapshot: ModelSnapshot) -> ExampleBatch:
        """Return the examples of a batch that count; find out with the first of them how to read the model's output.

        Raises:
            ValueError: if the model, the targets and the objective do not fit together.
        """
        if self.objective == "true" and batch.target is None:
            raise ValueError(
                "There is a batch without a target, which the true log-likelihood and a `loss` need. Yield pairs "
                '`(inputs, target)` or mappings with "labels", or use labels drawn from the model.'
            )
        batch = self._find_shared(root, batch, snapshot)
        counted = self._without_ignored(batch, self.likelihood or self.given or Likelihood("categorical"))
        self._refuse_ignored(counted.target)
        if counted.size > self._checked and not self._compared:  # a first batch of one example cannot be compared
            self._check(root, counted, snapshot)
        if counted.size and self.likelihood is not None:
            counted = self._without_ignored(batch, self.likelihood)  # a regression ignores no target
            self.likelihood.refuse(self.objective, counted.target)
        self.ignored += batch.size - counted.size
        if self.ignored and self.likelihood is not None and self.likelihood.family == "gaussian":
            raise ValueError(
                f"This is a regression whose first {self.ignored} targets are all {IGNORED}, as if they were ignored class "
                "indices. Pass targets as floating-point numbers."
            )
        return counted

    def _find_shared(self, root: nn.Module, batch: ExampleBatch, snapshot: ModelSnapshot) -> ExampleBatch:
        """Return a batch with the same inputs shared as in other batches, also if they are as long as there are examples."""
        self._shared |= {k for k, t in enumerate(batch.inputs) if id(t) in batch.shared and batch.with_examples}
        doubtful = batch.doubtful - self._shared - self._with_examples
        batch = batch.sharing(batch.with_examples & self._shared)
        shared: set[int] | None = set()
        if doubtful and batch.size > 1:
            subsets = chain.from_iterable(combinations(sorted(doubtful), n) for n in range(len(doubtful) + 1))
            shared = next((set(s) for s in subsets if self._comparable(root, batch.sharing(s), snapshot)), None)
        if shared is not None:
            batch = batch.sharing(shared)
            self._shared |= shared
            self._with_examples |= batch.with_examples - self._shared
        if shared is None or self._with_examples & self._shared:
            raise ValueError(
                "The first dimension of some inputs is as long as there are examples, while it may be another dimension of the "
                "data. Give what all examples share a first dimension of 1, or use batches of another size."
            )
        return batch

    def _comparable(self, root: nn.Module, batch: ExampleBatch, snapshot: ModelSnapshot) -> bool:
        """Return whether a few examples can be run together, and do not depend on each other then."""
        try:
            return self._compare(root, batch, snapshot)[0].size > 1
        except Exception:
            return False

    def _compare(self, root: nn.Module, batch: ExampleBatch, snapshot: ModelSnapshot) -> tuple[ExampleBatch, "_Run", "_Run"]:
        """Run a few examples together, and one alone."""

        def run(part: ExampleBatch) -> _Run:
            inputs = given_inputs(part.args, part.kwargs)
            with differentiable(root.parameters()):
                return _Run(snapshot.call(root, *part.args, **part.kwargs), inputs)

        exact = precision([*root.parameters(), *tensors((batch.args, batch.kwargs))])
        return compare_examples(run, self._read, batch, exact)

    def _refuse_ignored(self, target: Any) -> None:
        """Raise a ValueError if the user's loss would take ignored targets for numbers."""
        binary = self.loss is not None and self.given is not None and self.given.family == "bernoulli"
        if binary and isinstance(target, Tensor) and not target.is_floating_point() and (target == IGNORED).any():
            raise ValueError(
                f"There are targets of {IGNORED} under binary_cross_entropy_with_logits, which takes them for numbers. "
                'Pass a `loss` that leaves them out, or use `labels="sample"` or "exact".'
            )

    def _without_ignored(self, batch: ExampleBatch, likelihood: Likelihood) -> ExampleBatch:
        """Leave out examples without any target that counts, if targets are read as labels."""
        if self.objective in ("norm", "output") or (
            self.loss is not None and self.given is None and not batch.target_in_inputs
        ):
            return batch
        rows = likelihood.counting_examples(batch.target, batch.size)
        return batch if rows is None else batch.keep(rows)

    def _check(self, root: nn.Module, batch: ExampleBatch, snapshot: ModelSnapshot) -> None:
        """Check with a few examples that they do not depend on each other, and find out what the output means."""
        few, ran, alone = self._compare(root, batch, snapshot)
        refuse_without_gradient(self._differentiated(alone, batch), root.parameters())
        if self.objective == "norm":
            with differentiable(root.parameters()):
                refuse_constant_norm(self._values(*alone), self._values(*ran), few.size, root.parameters())
        self._checked, self._compared = True, batch.size > 1
        if self.is_likelihood and self.likelihood is None:
            self._find_likelihood(few, ran, batch.target)
        if self.objective == "true":
            self._warn_if_sure(few, ran)

    def _warn_if_sure(self, few: ExampleBatch, ran: "_Run") -> None:
        """Warn where the model is so sure of the labels that they leave hardly any gradient."""
        loss = own_loss(ran.output) if self.loss is not None and self.given is None else None
        if self.likelihood is not None and self.likelihood.family != "gaussian":
            score, _ = self.likelihood.scores("true", self._values(*ran), few.target, few.size)
            loss = -score.mean() / self.likelihood.rows_that_count(few.target, few.size)
        nats = None if loss is None else float(loss.detach())
        if nats is not None and 0 < nats < SURE:  # with a single class there is nothing to be sure of
            warn(
                f"The model is sure of the data's labels: the first {few.size} examples have a mean loss of {nats:.2g} nats. "
                'Importance by labels="true", the empirical Fisher information, is nearly zero then, and rests on a few '
                'examples. Use labels="sample", which draws labels from the model.'
            )

    def _find_likelihood(self, few: ExampleBatch, ran: "_Run", targets: Any) -> None:
        """Find out which distribution the outputs describe, from a few examples and the targets of these and more."""
        z, inputs = read_output(ran.output, self.logits, ran.inputs), (few.args, few.kwargs)
        found = find_likelihood(z, few.size, few.target, targets, own_loss(ran.output), self.given, inputs)
        if self.logits is None and self.given is None:
            refuse_probabilities(found, z)
        self.likelihood = found
        found.refuse(self.objective, targets)
        scores, _ = found.scores(self.objective, z, few.target, few.size)  # raises errors that would be obscure under `vmap`
        self.passes = scores.shape[1]

    def _differentiated(self, alone: "_Run", batch: ExampleBatch) -> Tensor:
        """Return what is differentiated at the first example."""
        return self._values(*alone) if self.loss is None else self._user_loss(*alone, batch.cut(0, 1).target)

    def _user_loss(self, output: Any, inputs: Any, target: Any) -> Tensor:
        """Return the user's loss; one that names a distribution takes the logits alone, and numbers in their precision."""
        assert self.loss is not None
        if self.given is not None:
            output = read_output(output, self.logits, inputs)
            if self.given.family != "categorical" and isinstance(target, Tensor):
                target = target.to(output.dtype)
        value = self.loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a `{type(value).__name__}`"
            raise ValueError(f"`loss` returned {came}, and not a scalar tensor for one example. Let it average or sum.")
        return value.reshape(())

    def _read(self, ran: "_Run") -> Tensor | None:
        """Find the tensor of an output to compare; with a loss of the user's, any tensor."""
        if self.loss is None:
            return self._values(*ran)
        try:
            return read_output(ran.output, self.logits, ran.inputs)
        except TypeError:
            return next((t for t in tensors(ran.output) if t.dim() and t.is_floating_point()), None)

    def _values(self, output: Any, inputs: Any) -> Tensor:
        z = read_output(output, self.logits, inputs)
        if z.is_complex():
            raise ValueError("The model's output is complex. Pass `logits=` that returns real numbers.")
        return z

    def __call__(self, output: Any, inputs: Any, target: Any, size: int = 1) -> tuple[Tensor, Tensor]:
        """Return scores to differentiate one by one and the weights of their gradients, both of shape (size, scores).

        Args:
            output: the model's output.
            inputs: what it was given.
            target: the targets.
            size: how many examples these are.

        Raises:
            TypeError: if the output has no logits.
            ValueError: if they do not fit the targets.
        """
        if self.likelihood is None and self.loss is not None:
            score = self._user_loss(output, inputs, target).reshape(1, 1)
            return score, torch.ones_like(score)
        z = self._values(output, inputs)
        if target is None or self.likelihood is None:
            z = without_padding(z, inputs)
        if self.likelihood is not None:
            return self.likelihood.scores(self.objective, z, target, size)
        score = random_scores(z, size) if self.objective == "output" else output_rows(z).square().sum(1, keepdim=True)
        return score, torch.ones_like(score)


class _Run(NamedTuple):
    """A model's output and what it was given."""

    output: Any
    inputs: Any
