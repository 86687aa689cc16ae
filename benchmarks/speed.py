"""Time: rounds of ten training steps alternate in one process, and each is compared with the plain round beside it.

On a CPU what counts is its time; a GPU is waited for, and the clock is read.

`python -m benchmarks.speed CASE OPTIMIZER ROUNDS SEED VARIANT...` prints the times of variants that are measured apart. Such a
case has a process for each of its groups: in one that has freed much memory, gradients may be laid into pages that are still
there, while elsewhere the system makes new ones at every step, a third of the time of a plain one.
"""

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks import child
from benchmarks.models import CASES, Case
from benchmarks.peers import everything
from benchmarks.variants import Loop, Variant

ROUND = 10
"""Steps in a round: one window of Riemannian Walk, so that what happens once a window is counted."""

LARGE = ("resnet50", "vit-b16", "bert-base", "gpt2")
TARGETS = {
    ("blocked", "mlp-b10"): 2.3,
    ("blocked", "mlp-b128"): 1.45,
    ("blocked", "mlp-49m"): 1.5,
    ("blocked", "resnet18"): 1.03,
    ("blocked", "gpt"): 1.03,
    **{("blocked", name): 1.05 for name in LARGE},
    ("numba", "mlp-b10"): 1.9,
    ("numba", "mlp-b128"): 1.3,
    ("numba", "mlp-49m"): 1.3,
    ("numba", "resnet18"): 1.02,
    ("numba", "gpt"): 1.02,
    **{("numba", name): 1.03 for name in LARGE},
}
"""What we aim at: a step with any rule over a plain one with fused Adam, on one thread, by backend and case."""


class Sample(NamedTuple):
    """Seconds of a step in one round: a variant's, plain training's and its base's."""

    own: float
    plain: float
    base: float


def measure(
    name: str,
    optimizer: str,
    variants: dict[str, Variant],
    rounds: int,
    seed: int,
    say: Callable[[str], None],
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Return the figures of each variant on one case, as plain values for a record."""
    chosen = {key: variant for key, variant in variants.items() if not variant.cases or name in variant.cases}
    seen: dict[str, list[Sample]] = {key: [] for key in chosen}
    case = CASES[name].on(device)
    for keys in groups(chosen, case.apart):
        say(f"{name}, {optimizer}: {keys[-1] if len(keys) < len(chosen) else 'all'}, {rounds} rounds")
        if case.apart:
            times = child.run("benchmarks.speed", name, optimizer, rounds, seed, *keys)
        else:
            times = alternate({key: chosen[key] for key in keys}, case, optimizer, rounds, seed)
        for key in keys:
            seen[key] += map(Sample, times[key], times["plain"], times[chosen[key].base])
    target = TARGETS if device == "cpu" and optimizer == "adam" else {}
    return [
        row(name, optimizer, key, chosen[key], samples) | {"target": target.get((chosen[key].backend, name))}
        for key, samples in seen.items()
    ]


def groups(variants: dict[str, Variant], apart: bool) -> Iterator[list[str]]:
    """Return the variants that are measured together: all, or each with those that it is compared with."""
    if not apart:
        yield list(variants)
        return
    for key, variant in variants.items():
        if key != "plain":
            yield list(dict.fromkeys(["plain", variant.base, key]))


def alternate(variants: dict[str, Variant], case: Case, optimizer: str, rounds: int, seed: int) -> dict[str, list[float]]:
    """Return the seconds of a step, for each variant and round; every time round, the order is another."""
    loops = {key: variant.start(case, optimizer, seed) for key, variant in variants.items()}
    times: dict[str, list[float]] = {key: [] for key in loops}
    order, shuffle = list(loops), random.Random(seed).shuffle
    with tidy():
        for _ in range(rounds):
            shuffle(order)
            for key in order:
                times[key].append(one_round(loops[key]) / ROUND)
    return times


@contextmanager
def tidy() -> Iterator[None]:
    """Collect garbage only when told to, so that no variant pays for what another left behind."""
    gc.collect()
    gc.freeze()  # what lives now need not be looked through after every round
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()


def one_round(loop: Loop) -> float:
    """Return the seconds of a round."""
    loop.prepare()
    gc.collect()
    now = waited if loop.pool[0][0].is_cuda else time.process_time
    before = now()
    loop.steps(ROUND)
    return now() - before


def waited() -> float:
    """Read the clock when the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def row(name: str, optimizer: str, key: str, variant: Variant, samples: list[Sample]) -> dict[str, Any]:
    """Return a variant's figures: the quartiles of its times, and of their ratios to what ran in the same time round."""
    return {
        "model": name,
        "optimizer": optimizer,
        "variant": key,
        "about": variant.about,
        "tasks": variant.tasks,
        "rounds": len(samples),
        "ms": spread([1e3 * s.own for s in samples]),
        "mean_ms": 1e3 * fmean(s.own for s in samples),
        "ratio": spread([s.own / s.plain for s in samples]),
        "base": variant.base,
        "ratio_to_base": spread([s.own / s.base for s in samples]),
    }


def spread(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return list(quantiles(values, n=4, method="inclusive")) if len(values) > 1 else values * 3


def main(name: str, optimizer: str, rounds: str, seed: str, *keys: str) -> None:
    torch.set_num_threads(1)
    known = everything()
    print(json.dumps(alternate({key: known[key] for key in keys}, CASES[name], optimizer, int(rounds), int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
