"""What the two pulls do over seven decades of strength: permuted MNIST, RWalk, SGD and Adam.

    python benchmarks/pulls.py --data FOLDER --out runs/pulls

FOLDER holds a folder `mnist` of parquet files. Runs that are on disk are not run again. Prints average accuracy (mean over
seeds) for each pull and strength.
"""

import argparse
import sys
import warnings
from collections import defaultdict
from statistics import fmean

import torch

from rwalk import RWalk, bench
from rwalk.bench import Record, Training
from rwalk.bench.data import load
from rwalk.bench.sealed import file_name
from rwalk.bench.spec import RunSpec

STRENGTHS = [10.0**k for k in range(-1, 7)]
OPTIMIZERS = {"sgd": 0.1, "adam": 0.001}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--out", default="runs/pulls")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The gradient pull overshoots")
    data, results = load("mnist", options.data), defaultdict(list)
    for seed in range(options.seeds):
        stream = bench.permuted(data, tasks=options.tasks, seed=seed)
        for optimizer, lr in OPTIMIZERS.items():
            training = Training(batch_size=64, optimizer=optimizer, lr=lr)
            for strength in STRENGTHS:
                for pull in ("gradient", "proximal"):
                    record = one(stream, strength, seed, training, pull, options.out)
                    results[optimizer, strength, pull].append(record.average)
                    print(optimizer, strength, pull, seed, f"{record.average:.3f}", file=sys.stderr, flush=True)
    for optimizer in OPTIMIZERS:
        print(f"{optimizer:8}" + "".join(f"{s:>8g}" for s in STRENGTHS))
        for pull in ("gradient", "proximal"):
            print(f"{pull:8}" + "".join(f"{100 * fmean(results[optimizer, s, pull]):8.1f}" for s in STRENGTHS))


def one(stream, strength, seed, training, pull, out):
    """Return the record of one run, from disk or by running it."""
    from pathlib import Path

    path = Path(out) / file_name(
        stream[0].stream["name"], "rwalk", seed, RunSpec(stream, RWalk(), strength, training=training, pull=pull).configuration
    )
    if path.exists():
        return Record.load(path)
    record = bench.run(stream, RWalk(), strength, seed, training, pull=pull)
    record.save(out)
    return record


if __name__ == "__main__":
    main()
