"""Models for the benchmarks."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(inputs: Sequence[int], outputs: int, hidden: Sequence[int] = (256, 256)) -> nn.Module:
    """Build a multi-layer perceptron with ReLU.

    Args:
        inputs: shape of one example.
        outputs: number of labels.
        hidden: widths of the hidden layers.
    """
    widths = [math.prod(inputs), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
