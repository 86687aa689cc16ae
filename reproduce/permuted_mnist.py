"""Permuted MNIST as in the first author's released code: 17 tasks, one epoch of 55,000 examples each, one head.

`python -m reproduce.permuted_mnist --seeds 5 --out runs/permuted` trains what has no record yet and prints the table; it may be
stopped and started again at any moment, and several of them may work into one folder with different `--methods` or seeds. The
complete MNIST is looked up below `RWALK_DATA`, else downloaded.

The published figures are those of the released notebook: mean and standard deviation over 5 runs.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from reproduce.released import ReleasedEWC, ReleasedMAS, ReleasedRWalk, network
from rwalk import RWalk
from rwalk.bench import Experience, FineTune, Learner, Protected, Record, Training, permuted, run
from rwalk.bench.data import DataSet, load
from rwalk.bench.record import file_name
from rwalk.consolidator import resolve
from rwalk.importance.base import Importance

TASKS = 17
"""Of 20, the first three of which served to choose learning rates and strengths."""
KEPT = 5_000
"""Examples that the released code sets aside for validation."""


class Method(NamedTuple):
    """A way to learn, with its settings in the released script.

    Args:
        learn: makes the learner from the builder of the network, the training and the seed.
        lr: learning rate of SGD.
        published: average accuracy in percent, its standard deviation, and forgetting, where published.
        about: what it is.
    """

    learn: Callable[..., Learner]
    lr: float
    published: tuple[float, float, float] | None
    about: str


def ruled(rule: Importance[Any] | None, strength: float | None = None) -> Callable[..., Learner]:
    """Return what makes a learner under a rule."""
    return lambda *args: Protected(resolve(rule, strength), *args)


METHODS = {
    "sgd": Method(FineTune, 0.03, (47.95, 1.32, 0.511), "plain SGD"),
    "ewc-released": Method(ruled(ReleasedEWC(), 10.0), 0.03, (68.35, 0.69, 0.288), "their EWC, strength 10"),
    "mas-released": Method(lambda *args: ReleasedMAS(0.1, *args), 0.1, (69.85, 0.93, 0.269), "their MAS, strength .1"),
    "rwalk-released": Method(ruled(ReleasedRWalk(), 1.0), 0.1, (85.80, 0.57, 0.082), "their RWALK, strength 1"),
    "rwalk": Method(ruled(RWalk(), 1.0), 0.1, None, "RWalk as in the paper, strength 1"),
    "recipe": Method(ruled(None), 0.1, None, "the default recipe"),
    "recipe-fast": Method(ruled(None), 0.2, None, "the default recipe, learning rate .2"),
}


def stream(data: DataSet, seed: int) -> list[Experience]:
    """Return the 17 tasks of a seed."""
    return permuted(replace(data, train_x=data.train_x[KEPT:], train_y=data.train_y[KEPT:]), tasks=TASKS, seed=seed)


def one(data: DataSet, name: str, seed: int, out: Path) -> Record:
    """Return the record of one run: from disk if it is there, else by running it."""
    method = METHODS[name]
    training = Training(lr=method.lr)
    path = out / file_name("permuted-mnist", name, seed, {"lr": method.lr, "about": method.about})
    if path.exists():
        return Record.load(path)
    tasks = stream(data, seed)
    torch.manual_seed(seed)
    learner = method.learn(lambda: network(784, 10), training, seed)
    record = run(tasks, learner, seed=seed, training=training, checkpoint=path.with_suffix(".checkpoint"))
    record = replace(
        record, method=name, config=record.config | {"about": method.about, "model": "784-256-256-10, as released"}
    )
    record.save(out)
    (out / record.name).rename(path)
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    print(
        f"{name} seed {seed}: {100 * (record.average_accuracy or 0):.2f} in {record.timings['train_seconds']:.0f} s", flush=True
    )
    return record


def table(records: dict[str, list[Record]]) -> str:
    """Lay out the results as a Markdown table, the published figures beside them."""
    lines = ["| method | average accuracy | published | forgetting | published |", "|---|---|---|---|---|"]
    for name, runs in records.items():
        method = METHODS[name]
        accuracy, forgetting = ([100 * (value or 0) for value in column] for column in zip(*map(figures, runs), strict=True))
        theirs = method.published
        cells = [f"{method.about}, lr {method.lr:g}", spread(accuracy), f"{theirs[0]:.2f} ± {theirs[1]:.2f}" if theirs else "–"]
        cells += [spread(forgetting), f"{100 * theirs[2]:.1f}" if theirs else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(record: Record) -> tuple[float | None, float | None]:
    """Return what is compared."""
    return record.average_accuracy, record.forgetting


def spread(values: list[float]) -> str:
    """Write a mean with its standard deviation, and the number of runs where it is not 5."""
    number = "" if len(values) == 5 else f" ({len(values)} run{'s' * (len(values) > 1)})"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") + number


def main() -> None:
    """Do the runs that have no record yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, of " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/permuted-mnist"), help="folder of the records")
    options = parser.parse_args()
    unknown = set(options.methods.split(",")) - METHODS.keys()
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; choose of {', '.join(METHODS)}")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load("mnist")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(table({name: [one(data, name, seed, options.out) for seed in seeds] for name in options.methods.split(",")}))


if __name__ == "__main__":
    main()
