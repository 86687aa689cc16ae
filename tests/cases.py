"""Tiny models, tasks and loops that several tests share."""

import itertools
import math
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rwalk import TaskFisher, kernels
from rwalk.rules.base import Defaults


def use_backend(name):
    """Choose kernels for one test, after which the default is back; skip it where they are not installed."""
    if name in ("numba", "triton"):
        pytest.importorskip(name)
    kernels.use(name)


def pairwise(indirect=(), **axes):
    """Parametrise a test so that each pair of values of two axes occurs, in far fewer cases than the full product."""
    values = [list(axis) for axis in axes.values()]
    places = [(i, a) for i, axis in enumerate(values) for a in range(len(axis))]
    missing = {(one, other) for one, other in itertools.combinations(places, 2) if one[0] < other[0]}
    cases = []
    while missing:
        case = dict(min(missing))
        for i in sorted(set(range(len(values))) - case.keys()):
            new = [sum(tuple(sorted([(i, a), place])) in missing for place in case.items()) for a in range(len(values[i]))]
            case[i] = new.index(max(new))
        missing -= set(itertools.combinations(sorted(case.items()), 2))
        cases.append([values[i][a] for i, a in sorted(case.items())])
    ids = ["-".join(re.sub(r" at 0x\w+", "", getattr(value, "__name__", str(value))) for value in case) for case in cases]
    return pytest.mark.parametrize(list(axes), cases, ids=ids, indirect=list(indirect))


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


class Lora(torch.nn.Module):
    """A linear layer with adapters, as PEFT's."""

    def __init__(self, inputs, outputs, rank=2, keys=("one",), scale=1.5, dropout=0.0):
        super().__init__()
        self.base_layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = torch.nn.ModuleDict({k: torch.nn.Linear(inputs, rank, bias=False) for k in keys})
        self.lora_B = torch.nn.ModuleDict({k: torch.nn.Linear(rank, outputs, bias=False) for k in keys})
        self.lora_dropout = torch.nn.ModuleDict({k: torch.nn.Dropout(dropout) for k in keys})
        self.scaling = dict.fromkeys(keys, scale)
        self.active_adapters = list(keys)
        self.merged = False

    def forward(self, x):
        out = self.base_layer(x)
        for key in self.active_adapters:
            out = out + self.lora_B[key](self.lora_A[key](self.lora_dropout[key](x))) * self.scaling[key]
        return out


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


class MeanSquares(TaskFisher):
    """The mean over a task's steps of squared gradients, in no unit: what the diagonal recipe sums up."""

    defaults: ClassVar[Defaults] = Defaults()

    def conclude(self, state, end):
        return end.renew([fisher.clone() for fisher in state.fisher]), state._replace(seen=[0] * len(state.seen))


def same(a, b):
    """Return whether two states are equal in values, bits of tensors and types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return (math.isnan(a) and math.isnan(b)) or a == b if isinstance(a, float) else a == b
