"""Which examples are kept: a selection gives each candidate a key, and those with the smallest keys stay.

Examples kept under a small budget are then always the first of those kept under a larger one, so that a class can give up
examples when others arrive without going through its data again. The four selections are those of Chaudhry, Dokania, Ajanthan
and Torr, "Riemannian Walk for Incremental Learning", ECCV 2018, section 4.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


class Candidates(NamedTuple):
    """Examples of one class, to choose from; features, logits and weight are in float64.

    Args:
        x, y: inputs and labels, first dimension examples.
        features: (examples, d), input of the model's last linear layer; None if they are not known.
        logits: (examples, classes), output of the model; None without a model.
        weight: (outputs, d), weights of the last linear layer; None without one.
    """

    x: Tensor
    y: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None
    weight: Tensor | None = None


Selection = Callable[[Candidates, int, Generator], Tensor]
"""Called with candidates, how many to keep, and a random generator; returns keys of shape (examples,) in float64."""


def uniform(candidates: Candidates, count: int, generator: Generator) -> Tensor:  # noqa: ARG001
    """Every example with the same probability."""
    return torch.rand(len(candidates.y), generator=generator, dtype=torch.float64, device="cpu")


def plane(candidates: Candidates, count: int, generator: Generator) -> Tensor:  # noqa: ARG001
    """Near the decision boundary: drawn without replacement, with weights 1/|phi(x).w_y|.

    Taking the smallest of exponential times with rates q draws without replacement, with weights q (Efraimidis and Spirakis
    2006).
    """
    features, weight = _needed(candidates.features, "features"), _needed(candidates.weight, "a last linear layer")
    highest = int(candidates.y.max())
    if highest >= len(weight) or features.shape[1] != weight.shape[1]:
        came = f"features of width {features.shape[1]} and the label {highest}"
        layer = f"the last linear layer, of shape {tuple(weight.shape)}"
        raise ValueError(
            f"{layer[0].upper()}{layer[1:]}, does not fit {came}. Leave `features` out, or choose another selection."
        )
    distance = (features * weight[candidates.y.cpu()]).sum(1).abs()
    times = torch.empty(len(distance), dtype=torch.float64, device="cpu").exponential_(generator=generator)
    return times * distance


def entropy(candidates: Candidates, count: int, generator: Generator) -> Tensor:  # noqa: ARG001
    """Where the model is least sure: the highest entropy of the softmax of its output; one logit is the log odds of label 1."""
    logits = _needed(candidates.logits, "a model's output")
    if logits.shape[1] == 1:
        if int(candidates.y.max()) > 1 or int(candidates.y.min()) < 0:
            came = f"The model has one logit, which allows the labels 0 and 1, not {int(candidates.y.max())}"
            raise ValueError(f"{came}. Pass `logits=`, or choose another selection.")
        logits = F.pad(logits, (1, 0))
    probabilities = logits.softmax(1)
    surprise: Tensor = torch.special.entr(probabilities)  # 0 log 0 = 0, for masked classes
    return -surprise.sum(1)


def herding(candidates: Candidates, count: int, generator: Generator) -> Tensor:  # noqa: ARG001
    """Those whose mean feature stays closest to the class's mean, picked one by one (iCaRL, Rebuffi et al. 2017, algorithm 4).

    The k-th pick is the example, not picked before, with the smallest norm of mu - (phi(x) + sum of those picked)/k, where phi
    has unit length, as there.
    """
    phi = F.normalize(_needed(candidates.features, "features"))
    mean, picked = phi.mean(0), torch.zeros_like(phi[0])
    square, keys = phi.square().sum(1), torch.full_like(phi[:, 0], torch.inf)
    for k in range(1, min(count, len(phi)) + 1):
        away = square - 2 * (phi @ (k * mean - picked))  # k^2 times the squared norm, up to a constant
        best = away.masked_fill(keys.isfinite(), torch.inf).argmin()
        keys[best] = k
        picked += phi[best]
    return keys


SELECTIONS: dict[str, Selection] = {
    "uniform": uniform,
    "plane": plane,
    "entropy": entropy,
    "herding": herding,
    "reservoir": uniform,
}
"""By name. A reservoir holds a uniform sample of a stream of any length (Vitter 1985): the examples with the smallest keys."""


def _needed(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        remedy = "Pass the model that has learned the task, with `features=` if it has no linear layer, or select uniformly."
        raise ValueError(f"This selection needs {what}. {remedy}")
    return value
