"""Tiny models, tasks and loops that several tests share."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rwalk import kernels


def use_backend(name):
    """Choose kernels for one test, after which the default is back; skip it where they are not installed."""
    if name in ("numba", "triton"):
        pytest.importorskip(name)
    kernels.use(name)


def batches(seed, steps, size=6, inputs=5, classes=3):
    """Random classification batches as float64 NumPy arrays."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=inputs)
    return [(rng.normal(size=(size, inputs)) + shift, rng.integers(0, classes, size)) for _ in range(steps)]


def train(model, optimizer, stream):
    """The user's loop."""
    for x, y in stream:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
        optimizer.step()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


class Heads(torch.nn.Module):
    """A trunk with one head per task; heads can be added."""

    def __init__(self, heads=2):
        super().__init__()
        self.trunk = torch.nn.Linear(5, 7)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(7, 3) for _ in range(heads))
        self.on = 0
        self.double()

    def forward(self, x):
        return self.heads[self.on](torch.tanh(self.trunk(x)))


def tensors(memory):
    """The state of a consolidator as one flat dictionary of tensors and numbers."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(f"{prefix}[{i}]", inner)
        else:
            flat[prefix] = value

    walk("", memory.state_dict())
    return flat


def assert_same_state(a, b):
    """Demand that two consolidators hold bit-identical state."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key
