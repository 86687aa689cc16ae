"""What this machine can do, measured in about a second: bandwidth by size, arithmetic, and what a step costs beside both."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rwalk import kernels
from rwalk.consolidator import Consolidator
from rwalk.importance import rules
from rwalk.plan import LARGE, Backend, Machine, Overhead

SIZES = [2**power for power in (20, 21, 22, 23, 24, 25, 26, 28)]
"""Bytes of the three arrays of a triad together, from the second-level cache to far beyond the last one."""
WIDTH = 1024
"""Rows and columns of the matrix that batches are multiplied with."""
DEPTHS = (2, 8)
"""Layers of the two tiny networks whose steps tell what there is for a step, and for each of its tensors."""


def here(tokens: int, rule: str = "rwalk", optimizer: str = "adam", backend: Backend = "fused") -> Machine:
    """Measure this machine's processor, with as many threads as PyTorch uses.

    Args:
        tokens: rows of the matrix product that measures arithmetic: small batches are slower.
        rule: the rule whose hooks are timed.
        optimizer: the optimiser that is timed.
        backend: "fused" is the backend `numba` here.

    Raises:
        ImportError: if the backend is not installed.
    """
    before = kernels.current()
    kernels.use("numba" if backend == "fused" else backend)
    try:
        plain, ours = overheads(rule, optimizer)
    finally:
        kernels.use(before if before in kernels.BACKENDS else "auto")
    threads = torch.get_num_threads()
    name = f"this machine, {threads} thread{'s' * (threads > 1)}, float32"
    return Machine(
        name,
        tuple((float(size), triad(size)) for size in SIZES),
        product(tokens),
        call=call(),
        fresh=fresh(),
        plain=plain,
        ours=ours,
    )


def timed(work: Callable[[], Any], count: int, rounds: int = 5) -> float:
    """Return the median seconds of some work over rounds of `count`: of the processor with one thread, else of the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    taken = []
    for _ in range(rounds):
        start = clock()
        for _ in range(count):
            work()
        taken.append((clock() - start) / count)
    return median(taken)


def triad(size: int) -> float:
    """Return bytes a second of a = b + 0.5 * c over arrays of `size` bytes together: two streams read, one written."""
    a, b, c = (torch.ones(size // 12) for _ in range(3))
    return size / timed(lambda: torch.add(b, c, alpha=0.5, out=a), max(2**26 // size, 1))


def product(rows: int) -> float:
    """Return operations a second of a batch times a square matrix."""
    rows = min(rows, WIDTH)
    x, weight = torch.ones(rows, WIDTH), torch.ones(WIDTH, WIDTH)
    operations = 2 * rows * WIDTH**2
    return operations / timed(lambda: x @ weight, max(2**30 // operations, 1), rounds=3)


def call() -> float:
    """Return seconds of an operation on one element."""
    one = torch.ones(1)
    return timed(lambda: one.mul_(1.0), 1000)


def fresh() -> float:
    """Return seconds to a byte of writing to memory that the system has just made, above writing to memory that is there."""
    count = LARGE // 2
    there = torch.ones(count)
    return max(timed(lambda: torch.ones(count), 1) - timed(lambda: there.fill_(1.0), 1), 0.0) / there.nbytes


def overheads(rule: str, optimizer: str) -> tuple[Overhead, Overhead]:
    """Return what a plain step takes beside its work, and what our hooks take, by steps of two tiny networks."""
    few, many = (tiny(depth, rule, optimizer) for depth in DEPTHS)
    plain, both = line(few[0], many[0]), line(few[1], many[1])
    return plain, Overhead(max(both.step - plain.step, 0.0), max(both.tensor - plain.tensor, 0.0))


def line(few: float, many: float) -> Overhead:
    """Divide the seconds of two steps into those for a step and those for each of a layer's two tensors."""
    tensor = (many - few) / (2 * (DEPTHS[1] - DEPTHS[0]))
    return Overhead(few - 2 * DEPTHS[0] * tensor, tensor)


def tiny(depth: int, rule: str, optimizer: str) -> tuple[float, float]:
    """Return seconds of a step of a network of so many layers, plain and in the second task of a rule; rounds alternate."""
    x, y = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
    pair: list[Callable[[], None]] = []
    for watched in (False, True):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        optimize = _optimizer(optimizer, model)
        pair.append(lambda model=model, optimize=optimize: _step(model, optimize, x, y))  # type: ignore[misc]
        if watched:
            memory = Consolidator(model, None if rule == "recipe" else rules()[rule](), 1e-3).attach(optimize)
            pair[1]()
            memory.consolidate([(x, y)])
    taken = [[timed(work, 15, rounds=1) for work in pair] for _ in range(5)]
    plain, both = (median(times) for times in zip(*taken, strict=True))
    return plain, both


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9 if name == "momentum" else 0.0)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
