"""Predictions of `rwalk plan` beside measured steps: `python -m benchmarks.predict` calibrates, measures and compares.

Nothing is fitted to these networks: the machine's figures come from `rwalk.calibrate`, the operations of a plain step from
PyTorch's own counter, and everything else from the tables of `rwalk.plan`.
"""

import argparse
import json
import os
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import child
from benchmarks.models import CASES
from benchmarks.speed import ROUND, alternate, spread
from benchmarks.table import grid
from benchmarks.variants import ours
from rwalk import calibrate, plan

BACKENDS: dict[str, plan.Backend] = {"rwalk-numba": "fused", "rwalk-blocked": "blocked"}
"""Measured variants, and the backend whose costs are predicted."""


def setup(name: str, backend: plan.Backend) -> plan.Setup:
    """Describe a case: its parameters, its batch, and the operations of its step."""
    torch.manual_seed(0)
    model = CASES[name].build()
    x, y = CASES[name].batch()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    count = sum(p.numel() for p in model.parameters())
    weights = plan.Weights({4: count}, len(list(model.parameters())))
    return plan.Setup(weights, tokens=y.numel(), backend=backend, flops=counter.get_total_flops())


def figures(name: str, key: str, rounds: int) -> dict[str, Any]:
    """Predict and measure a case, the calibration right before the measurement; seconds of a step."""
    case = setup(name, BACKENDS[key])
    machine = calibrate.here(case.tokens, backend=case.backend)
    parts = plan.seconds(case, machine, ours=False), plan.seconds(case, machine)
    variants = {k: v for k, v in ours().items() if k in ("plain", key)}
    times = alternate(variants, name, "adam", rounds, 0)
    ratios = [own / plain for own, plain in zip(times[key], times["plain"], strict=True)]
    return {
        "predicted": [p.total for p in parts],
        "measured": [median(times["plain"]), median(times[key])],
        "spread": spread(ratios),
        "parts": [p._asdict() for p in parts],
        "machine": machine._asdict(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--models", default=",".join(name for name in CASES if name != "tiny"))
    parser.add_argument("--rounds", type=int, help="rounds of ten steps; by default those of the benchmark, halved")
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "VARIANT", "ROUNDS"), help="measure one in this process, print JSON"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(figures(options.one[0], options.one[1], int(options.one[2]))))
        return
    table = grid("A step with RWalk over a plain one, fused Adam, second task", "predicted", "measured", "quartiles", "off",
                 "plain ms", "measured", "ours ms", "measured")  # fmt: skip
    progress = Console(stderr=True)
    for name in options.models.split(","):
        rounds = options.rounds or max(CASES[name].rounds // 2, 2)
        for key in BACKENDS:
            progress.print(f"{name}, {key}: {rounds} rounds of {ROUND} steps; load {os.getloadavg()[0]:.1f}")
            found = child.run("benchmarks.predict", "--one", name, key, rounds)
            progress.print(found["parts"], found["machine"])
            table.add_row(f"{name}, {key}", *cells(found))
            Console().print(table)


def cells(found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    (plain, whole), (plain_seen, whole_seen) = found["predicted"], found["measured"]
    low, middle, high = found["spread"]
    ratio = whole / plain
    mine = [f"{1e3 * s:.2f}" for s in (plain, plain_seen, whole - plain, whole_seen - plain_seen)]
    return [f"{ratio:.2f}", f"{middle:.2f}", f"{low:.2f}–{high:.2f}", f"{ratio / middle - 1:+.0%}", *mine]


if __name__ == "__main__":
    main()
