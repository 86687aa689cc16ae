"""What a model knew before it was trained further, by its outputs on any inputs, and how much of that is left."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rwalk import gradients
from rwalk._parameters import bare, state_dtype
from rwalk.consolidation.task_end import refuse_data
from rwalk.finetuning.rows import OutputRows, Read, read_rows, untouched, without_labels

NEIGHBOURS = 10
"""How many nearest rows are compared."""


class Kept(NamedTuple):
    """How much of what a model knew is left; 1, 1 and 0 if all of it is.

    Args:
        similarity: rank correlation of the cosine similarities of all pairs of rows, then and now (Spearman).
        neighbours: how many of the ten rows that were nearest to a row are still among its ten nearest, a fraction.
        divergence: KL divergence from the old to the new distribution in nats, mean over rows; None unless rows are logits.
    """

    similarity: float
    neighbours: float
    divergence: float | None = None

    def scalars(self, prefix: str = "kept/") -> dict[str, float]:
        """Return the figures as loggers take them."""
        return {f"{prefix}{name}": value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        """Write the figures as one sentence."""
        more = "" if self.divergence is None else f", {self.divergence:.3g} nats from the old outputs"
        return f"{self.similarity:.1%} of the order of similarities, {self.neighbours:.1%} of the nearest neighbours{more}"


class Snapshot:
    """A model's outputs on some inputs, as they are now: `snapshot.kept()` compares the model of later with them.

    The inputs need no labels, and should be like what the model is to stay good at, not like the new task.

    Args:
        model: the network.
        inputs: batches as the model takes them, as a loader yields them; labels in them are ignored. They are kept.
        read: "features" for what comes into the last linear layer, so that a head may change; or a function of the output, or
            of output and batch, that returns a tensor of shape (examples, size) or (examples, tokens, size). Without it
            logits, sentence embeddings and the last hidden states of encoders are found by their names, and a tensor is taken
            as it is.
        logits: whether that is logits, so that distributions can be compared; what is called so is.
        rows: how many rows are looked at, at most, evenly spread over the examples, or tokens that count.

    Raises:
        ValueError: if there are fewer than three rows, or each of them is one number.
        TypeError: if nothing can be read from the output, or the inputs are no batches.
        FloatingPointError: if there are outputs that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Any],
        read: Read | Literal["features"] | None = None,
        *,
        logits: bool | None = None,
        rows: int = 500,
    ) -> None:
        self._model, self._read, self._logits, self._most = model, read, logits, rows
        if not isinstance(inputs, tuple):  # of batches, as `x.split(32)` returns
            refuse_data(inputs)
        self._inputs = [without_labels(batch) for batch in inputs]
        self._before, self.logits = self._look(model)
        if len(self._before) < 3:
            raise ValueError(
                f"The inputs give {len(self._before)} rows of output, and comparing needs three or more. Pass more inputs."
            )
        if self._before.shape[1] == 1:
            raise ValueError(
                "Each row of output is one number, and the similarity of two numbers is only their sign. Pass "
                '`read="features"`, or a function that returns what lies before.'
            )

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._before)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that are kept."""
        return self._before.nbytes

    def kept(self, model: nn.Module | None = None) -> Kept:
        """Compare a model's outputs with those that were remembered.

        Args:
            model: the network; the one that the snapshot was taken of if None.
        """
        now, _ = self._look(self._model if model is None else model)
        if now.shape != self._before.shape:
            raise ValueError(
                f"The outputs have shape {tuple(now.shape)} now, and had {tuple(self._before.shape)}. Pass `read=`, which "
                "returns the part of the output that stays, such as the embedding before a head that grows."
            )
        then, after = (_similarities(rows) for rows in (self._before, now))
        return Kept(
            _rank_correlation(then, after), _overlap(then, after), _divergence(self._before, now) if self.logits else None
        )

    def _look(self, model: nn.Module) -> tuple[Tensor, bool]:
        """Return the rows of a model, evenly spread, and whether they are logits."""
        found: list[Tensor] = []
        logits, every, count = False, 1, 0
        with untouched(model) as call, gradients.noted_calls(bare(model)) as calls:
            for batch in self._inputs:
                rows, logits = self._rows_of(call(batch), batch, calls)
                calls.clear()
                _refuse_infinite(rows)
                found.append(rows[-count % every :: every].to("cpu", state_dtype(rows), copy=True))
                count += len(rows)
                while sum(map(len, found)) > 2 * max(self._most, 1):  # each second one is enough
                    found, every = [torch.cat(found)[::2].clone()], 2 * every
        if not found:
            raise ValueError("There are no inputs. Pass batches of examples that the model is to stay good at.")
        whole = torch.cat(found)
        places = torch.linspace(0, len(whole) - 1, min(self._most, len(whole))).round().long()
        return whole[places], logits

    def _rows_of(self, output: Any, batch: Any, calls: list[tuple[Any, Tensor]]) -> OutputRows:
        """Return the rows of an output, or of what came into the linear layer that was called last."""
        if self._read != "features":
            return read_rows(output, batch, self._read, self._logits)
        if not calls:
            raise ValueError('The model calls no linear layer, so that there are no "features". Pass a function as `read=`.')
        return read_rows(calls[-1][1], batch, None, self._logits)


def _refuse_infinite(rows: Tensor) -> None:
    """Raise a FloatingPointError for rows that cannot be compared."""
    odd = int((~torch.isfinite(rows)).any(1).sum())
    if odd:
        raise FloatingPointError(
            f"The model's outputs are not finite in {odd} of {len(rows)} rows, so there is nothing to compare. Look at its "
            "weights; if classes are masked, pass `read=`, a function that leaves them out."
        )


def _similarities(rows: Tensor) -> Tensor:
    """Return the cosine similarity of each pair of rows."""
    unit = nn.functional.normalize(rows.double(), dim=1)
    similarities: Tensor = unit @ unit.mT
    return similarities


def _rank_correlation(then: Tensor, now: Tensor) -> float:
    """Return Spearman's correlation over pairs of different rows."""
    i, j = torch.triu_indices(len(then), len(then), 1)
    if torch.equal(then, now):
        return 1.0
    a, b = (_ranks(similarity[i, j]) for similarity in (then, now))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal values share the mean of theirs."""
    _, inverse, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    means: Tensor = (last - (count - 1) / 2)[inverse]
    return means


def _overlap(then: Tensor, now: Tensor) -> float:
    """Return how many nearest neighbours stay, a fraction."""
    count = min(NEIGHBOURS, len(then) - 1)
    near = []
    for similarity in (then, now):
        others = similarity.clone().fill_diagonal_(-2)
        near.append(torch.zeros_like(others, dtype=torch.bool).scatter_(1, others.topk(count).indices, True))
    return float((near[0] & near[1]).sum()) / (len(then) * count)


def _divergence(then: Tensor, now: Tensor) -> float:
    """Return the mean over rows of KL(softmax(then) || softmax(now)), in nats."""
    before, after = then.double().log_softmax(1), now.double().log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())
