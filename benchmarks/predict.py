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
    return plan.Setup(plan.Weights.of(model.parameters()), tokens=y.numel(), backend=backend, flops=counter.get_total_flops())


def figures(name: str, key: str, rounds: int) -> dict[str, Any]:
    """Predict and measure a case; seconds of a step. Calibrations stand before, amid and after what is measured."""
    case = setup(name, BACKENDS[key])
    variants = {k: v for k, v in ours().items() if k in ("plain", key)}
    times: dict[str, list[float]] = {k: [] for k in variants}
    machines = [calibrate.here(case.tokens, backend=case.backend)]
    for half in (rounds // 2, rounds - rounds // 2):
        for k, more in alternate(variants, CASES[name], "adam", half, 0).items():
            times[k] += more
        machines.append(calibrate.here(case.tokens, backend=case.backend))
    predicted = [(plan.seconds(case, m, ours=False).total, plan.seconds(case, m).total) for m in machines]
    ratios = [own / plain for own, plain in zip(times[key], times["plain"], strict=True)]
    return {
        "predicted": sorted(predicted, key=lambda pair: pair[1] / pair[0]),
        "measured": [median(times["plain"]), median(times[key])],
        "spread": spread(ratios),
        "machines": [m._asdict() for m in machines],
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
    title = "A step with RWalk over a plain one, fused Adam, second task"
    ratios = ("predicted", "least, most", "measured", "quartiles", "off")
    table = grid(title, *ratios, "plain ms", "measured", "ours ms", "measured")
    progress = Console(stderr=True)
    for name in options.models.split(","):
        rounds = options.rounds or max(CASES[name].rounds // 2, 2)
        for key in BACKENDS:
            progress.print(f"{name}, {key}: {rounds} rounds of {ROUND} steps; load {os.getloadavg()[0]:.1f}")
            found = child.run("benchmarks.predict", "--one", name, key, rounds)
            table.add_row(f"{name}, {key}", *cells(found))
            Console().print(table)


def cells(found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    (plain, whole), (plain_seen, whole_seen) = found["predicted"][1], found["measured"]
    least, *_, most = [b / a for a, b in found["predicted"]]
    low, middle, high = found["spread"]
    ratio = whole / plain
    mine = [f"{1e3 * s:.2f}" for s in (plain, plain_seen, whole - plain, whole_seen - plain_seen)]
    return [
        f"{ratio:.2f}",
        f"{least:.2f}–{most:.2f}",
        f"{middle:.2f}",
        f"{low:.2f}–{high:.2f}",
        f"{ratio / middle - 1:+.0%}",
        *mine,
    ]


if __name__ == "__main__":
    main()
