"""What the benchmark runner adds to an epoch: permuted MNIST at batch 10 against a bare training loop.

    RWALK_DATA=... python -m benchmarks.epoch

The bare loop takes its batches from the same tensors in memory. `learner` is that of `rwalk.bench.run`;
`command` is the same under the progress bar of `rwalk run`. Each permutes the task's data itself. Every time round all
three train a new network for an epoch, on one thread, in an order of its own; printed are CPU time and its ratio to the bare
loop of the same time round, median and quartiles.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks.speed import spread, tidy
from rwalk import bench
from rwalk.bench.builtin import make, parse
from rwalk.bench.data import load
from rwalk.bench.models import build
from rwalk.bench.spec import RunSpec
from rwalk.bench.training import Learner
from rwalk.cli.progress import Display

TARGET = 1.3
"""What we aim at: an epoch of the runner over one of the bare loop."""


def bare(task: bench.Experience, training: bench.Training) -> None:
    """Train for an epoch in a plain loop."""
    model = build(training.model, task, training.hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr)
    x, y = task.train.read()
    for rows in torch.randperm(len(y)).split(training.batch_size):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def learner(task: bench.Experience, training: bench.Training, tick: Callable[[], None] = lambda: None) -> None:
    """Train for an epoch as `rwalk.bench.run` does."""
    Learner(lambda: build(training.model, task, training.hidden), training, tick=tick).fit(task)


def command(task: bench.Experience, training: bench.Training) -> None:
    """Train for an epoch as `rwalk run` does."""
    spec = RunSpec([task], training=training)
    with open(os.devnull, "w") as nowhere:
        display = Display(Console(file=nowhere, force_terminal=True), {spec: "epoch"}, Path(), live=True)
        with display.progress:
            learner(task, training, display.hooks(spec)[0])


LOOPS: dict[str, Callable[[bench.Experience, bench.Training], None]] = {"bare": bare, "learner": learner, "command": command}


def measure(task: bench.Experience, training: bench.Training, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of an epoch, for each loop and time round."""
    times: dict[str, list[float]] = {key: [] for key in LOOPS}
    order, shuffle = list(LOOPS), random.Random(0).shuffle
    with tidy():
        for _ in range(rounds):
            shuffle(order)
            for key in order:
                torch.manual_seed(0)
                before = time.process_time()
                LOOPS[key](task, training)
                times[key].append(time.process_time() - before)
    return times


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", default="permuted-mnist")
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kind, name = parse(options.stream)
    task = make(kind, load(name, options.data))[0]
    times = measure(task, bench.Training(batch_size=options.batch), options.rounds)
    for key, found in times.items():
        low, middle, high = spread([own / plain for own, plain in zip(found, times["bare"], strict=True)])
        print(f"{key:8} {spread(found)[1]:6.2f} s  ratio {middle:.3f} ({low:.3f} to {high:.3f}), target {TARGET}")
    return times


if __name__ == "__main__":
    main()
