"""What keeping state in bfloat16 costs in accuracy: permuted MNIST with state in float32 and in bfloat16, same seeds.

    python -m benchmarks.precision --data FOLDER

FOLDER holds a folder `mnist` of parquet files. Prints average accuracy for each method, seed and precision.
"""

import argparse
from functools import partial
from statistics import fmean, stdev

import torch

from rwalk import Consolidator, EWCpp, RWalk, bench, kernels
from rwalk.bench.data import load
from rwalk.bench.learners import Protected, Training
from rwalk.bench.models import mlp
from rwalk.consolidator import resolve

METHODS = {"RWalk": RWalk(), "RWalk alpha .01": RWalk(alpha=0.01), "EWC++ alpha .01": EWCpp(alpha=0.01), "recipe": None}
STRENGTH = {"EWC++ alpha .01": 100.0}


class Kept(Protected):
    """Training under a rule whose state is kept in a given precision."""

    def __init__(self, settings, dtype, build, training, seed):
        super().__init__(settings, build, training, seed)
        self.memory.detach()
        self.memory = Consolidator(self.model, *settings[:2], pull=settings.pull, average=settings.average, state_dtype=dtype)
        self.memory.attach(self.optimizer)


def one(data, method, strength, dtype, seed, tasks, batch):
    """Return the average accuracy of one run."""
    stream = bench.permuted(data, tasks=tasks, seed=seed)
    torch.manual_seed(seed)
    training = Training(batch_size=batch)
    build = partial(mlp, stream[0].train.read()[0].shape[1:], stream[0].outputs, training.hidden)
    learner = Kept(resolve(method, strength), dtype, build, training, seed)
    return bench.run(stream, learner, seed=seed, training=training).average_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels.use("auto")
    data = load("mnist", options.data)
    for name in options.methods.split(","):
        method = METHODS[name]
        for dtype in (None, torch.bfloat16):
            args = (data, method, STRENGTH.get(name), dtype)
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            found = [100 * one(*args, seed, options.tasks, options.batch) for seed in seeds]
            spread = stdev(found) if len(found) > 1 else 0.0
            each = " ".join(f"{value:.2f}" for value in found)
            print(f"{name:16} {'bfloat16' if dtype else 'float32':9} {fmean(found):.2f} ± {spread:.2f}  ({each})", flush=True)


if __name__ == "__main__":
    main()
