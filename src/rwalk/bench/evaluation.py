"""How good a learner is on each task: accuracy for labels, R² for the targets of a regression, or a metric of one's own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rwalk._errors import printable
from rwalk.bench.imports import function
from rwalk.bench.record import ACCURACY
from rwalk.bench.streams import Experience, Score
from rwalk.bench.training import CustomLearner


def scores(learner: CustomLearner, stream: Sequence[Experience], last: int) -> list[float | None]:
    """Return the score on each task after training task number `last`; None for class-incremental tasks yet to come.

    Raises:
        FloatingPointError: if outputs of a regression are not finite.
    """
    seen = {label for e in stream[: last + 1] for label in e.classes}
    return [_score(learner, e, seen) if e.scenario != "class" or e.task <= last else None for e in stream]


def _score(learner: CustomLearner, experience: Experience, seen: set[int]) -> float:
    x, y = experience.test.read()
    labels = seen if experience.scenario == "class" else experience.classes
    answer = learner.predict(x, labels)
    if experience.score is not None:
        return _own(experience.score, y, answer)
    return r_squared(answer, y) if experience.regression else (answer == y).double().mean().item()


def _own(score: Score, y: Tensor, answer: Tensor) -> float:
    """Return the score by a metric of one's own, of arrays with an entry for each label or example."""
    true, predicted = (t.flatten() if not t.is_floating_point() or t.shape[-1] == 1 else t for t in (y, answer.view_as(y)))
    value = float(function(score.source)(true.numpy(), predicted.numpy()))
    if not math.isfinite(value):
        raise ValueError(f"The metric `{printable(score.name)}` returned {value}. It has to return a finite number.")
    if score.name == ACCURACY and not 0 <= value <= 1:
        raise ValueError(f"The metric `accuracy` returned {value}, which is no fraction; give the function another name.")
    return value


def r_squared(outputs: Tensor, y: Tensor) -> float:
    """Return 1 - SSE/SST, the share of the targets' variance around their own mean that outputs explain, in float64.

    The mean over targets; one that is constant counts 1 if it is met exactly and else 0, as in scikit-learn's `r2_score`.

    Args:
        outputs: the model's answers, of the shape of `y`.
        y: targets, of shape (examples, targets).

    Raises:
        FloatingPointError: if outputs are not finite.
    """
    z, y = outputs.double().reshape(y.shape), y.double()
    if not z.isfinite().all():
        raise FloatingPointError(
            "The model's outputs are not finite any more: training diverged. Pass a smaller learning rate."
        )
    errors, variation = (z - y).square().sum(0), (y - y.mean(0)).square().sum(0)
    constant = y.amin(0) == y.amax(0)
    return 1 - torch.where(constant, (errors > 0).double(), errors / variation).mean().item()
