"""Where the default helps and what strength it wants: small settings over images, text and tables, several optimisers.

`python -m reproduce.transfer --out runs/transfer` does what has no record yet and prints the tables; it may be stopped and
started again at any moment. Data sets are looked up below `RWALK_DATA`, else downloaded.

`--ablation` changes one ingredient of the default at a time, `--diagonal` one of the diagonal recipe, on the first setting.

"Best" is the best strength of the scan by
the very test accuracy that is shown, which flatters it: the default is compared with what nobody can know beforehand.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from reproduce.runs import chosen_seeds, kept, seed_options, spread
from reproduce.together import Together
from reproduce.variants import OneSide, RecipeVariant, SummedWalk
from rwalk import EWC, L2, MAS, SI, Kronecker, RWalk, TaskFisher, bench, kernels
from rwalk.bench import Experience, Record, Training
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.models import build
from rwalk.bench.pool import run_or_load
from rwalk.bench.sealed import file_name
from rwalk.bench.spec import RunSpec

DEFAULT = Kronecker.defaults.strength
HELD = {"pull": TaskFisher.defaults.pull, "average": TaskFisher.defaults.average}
"""What goes with the recipe's rule, for other rules too."""


class Setting(NamedTuple):
    """What is learned, and how.

    Args:
        stream: makes the tasks of a seed.
        training: how every method trains.
    """

    stream: Callable[[int], list[Experience]]
    training: Training


class Method(NamedTuple):
    """A way to learn.

    Args:
        method: as for `rwalk.bench.run`; None for joint training.
        strengths: what is scanned.
        options: `pull` and `average`.
    """

    method: Any
    strengths: tuple[float | None, ...] = (None,)
    options: dict[str, Any] = {}  # noqa: RUF012


METHODS = {
    "fine-tuning": Method("finetune"),
    "averaging alone": Method(L2(), (0.0,), {"average": "tail"}),
    "RWalk": Method(RWalk(), (0.1, 1, 10, 100)),
    "EWC, averaged": Method(EWC(samples=1000), (1, 10, 100, 1000), HELD),
    "recipe": Method(TaskFisher(), (0.015, 0.05, 0.1, 0.15, 0.5, 1.5, 5)),
    "default": Method(Kronecker(), (0.025, 0.05, DEFAULT, 0.2, 0.4)),
    "joint": Method(None),
}

SCAN = METHODS["recipe"].strengths[:-1]
FIRST = (0.0005, 0.0015, 0.005, 0.015, 0.05)
"""Strengths in the unit of the first task's mean, whatever the length of tasks."""
ABLATION = {
    "the default": Method(Kronecker(), (DEFAULT,)),
    "all directions": Method(Kronecker(share=1.0, rank=None), (DEFAULT,)),
    "90 % of each trace, no limit": Method(Kronecker(rank=None), (DEFAULT,)),
    "rank 16": Method(Kronecker(rank=16), (DEFAULT,)),
    "rank 64": Method(Kronecker(rank=64), (DEFAULT,)),
    "measured at every step": Method(Kronecker(m=1), (DEFAULT,)),
    "measured at every 50th step": Method(Kronecker(m=50), (DEFAULT,)),
    "pulled at every step": Method(Kronecker(every=1), (DEFAULT,)),
    "pulled at every 50th step": Method(Kronecker(every=50), (DEFAULT,)),
    "measured on data, labels drawn": Method(Kronecker(measure="data", samples=1000), (DEFAULT,)),
    "no averaging": Method(Kronecker(), (DEFAULT,), {"average": "none"}),
    "inputs alone (G is the identity)": Method(OneSide(kept="inputs"), (DEFAULT,)),
    "outputs alone (A is the identity)": Method(OneSide(kept="outputs"), (DEFAULT,)),
    "the average of G over tasks, not the sum": Method(OneSide(kept="both", mean_outputs=True), (DEFAULT,)),
    "the sum of A over tasks, not the average": Method(OneSide(kept="both", sum_inputs=True), (DEFAULT,)),
}
DIAGONAL = {
    "the recipe": Method(TaskFisher(), SCAN, HELD),
    "no averaging": Method(TaskFisher(), SCAN, HELD | {"average": "none"}),
    "gradient pull": Method(TaskFisher(), SCAN, HELD | {"pull": "gradient"}),
    "the last task's importance alone": Method(RecipeVariant(accumulate=False), SCAN, HELD),
    "running Fisher information, alpha .01": Method(RecipeVariant(alpha=0.01), SCAN, HELD),
    "running Fisher information, alpha .9": Method(RecipeVariant(alpha=0.9), SCAN, HELD),
    "in the unit of the first task": Method(RecipeVariant(unit="first"), FIRST, HELD),
    "in units of each tensor's maximum": Method(RecipeVariant(unit="tensor"), (0.1, 1, 10, 100), HELD),
    "path score beside it (RWalk)": Method(SummedWalk(), FIRST, HELD),
    "path integral over distance (SI)": Method(SI(), (0.01, 0.1, 1, 10), HELD),
    "sensitivity of the output (MAS)": Method(MAS(samples=1000), (0.01, 0.1, 1, 10), HELD),
    "Fisher information over the data (EWC)": METHODS["EWC, averaged"],
}


@lru_cache
def some(name: str, train: int, test: int = 2000, **options: Any) -> DataSet:
    """Return a data set with `train` and `test` examples, chosen at random, the same ones each time."""
    data = load(name, **options)
    kept = {}
    for part, most in (("train", train), ("test", test)):
        rows = torch.randperm(len(getattr(data, f"{part}_y")), generator=torch.Generator().manual_seed(0))[:most].sort().values
        columns = (f"{part}_{column}" for column in ("x", "y", "domain"))
        kept |= {column: value[rows] for column in columns if (value := getattr(data, column)) is not None}
    return replace(data, **kept)


def permuted(name: str, train: int, tasks: int = 10) -> Callable[[int], list[Experience]]:
    """Return what makes the permuted stream of a seed."""
    return lambda seed: bench.permuted(some(name, train), tasks=tasks, seed=seed)


def same(
    make: Callable[..., list[Experience]], data: Callable[[], DataSet], **options: Any
) -> Callable[[int], list[Experience]]:
    """Return what makes a stream that is the same for every seed."""
    return lambda _: make(data(), **options)


SETTINGS = {
    "permuted MNIST, SGD": Setting(permuted("mnist", 2000), Training(lr=0.1)),
    "permuted MNIST, Adam": Setting(permuted("mnist", 3000), Training(2, 32, 0.001, "adam")),
    "permuted digits, momentum": Setting(permuted("digits", 2000), Training(5, 32, 0.03, "momentum")),
    "rotated MNIST, SGD": Setting(same(bench.rotated, partial(some, "mnist", 3000)), Training(lr=0.1)),
    "rotated MNIST, Adam": Setting(same(bench.rotated, partial(some, "mnist", 4000)), Training(2, 32, 0.001, "adam")),
    "split MNIST, task-incremental, SGD": Setting(same(bench.split, partial(some, "mnist", 10000)), Training(lr=0.1)),
    "split MNIST, domain-incremental, Adam": Setting(
        same(bench.split, partial(some, "mnist", 20000), scenario="domain"), Training(1, 64, 0.001, "adam")
    ),
    "split CIFAR-10, CNN, momentum": Setting(
        same(bench.split, partial(some, "cifar10", 6000)), Training(1, 32, 0.01, "momentum")
    ),
    "split CIFAR-10, ResNet with BatchNorm, SGD": Setting(
        same(bench.split, partial(some, "cifar10", 2000)), Training(1, 16, 0.1, "sgd", "resnet")
    ),
    "split Tiny-ImageNet, 10 tasks, CNN, Adam": Setting(
        same(bench.split, partial(some, "tinyimagenet100a_32", 6000), tasks=10), Training(1, 32, 0.001, "adam")
    ),
    "clinc150, 10 domains, task-incremental, SGD": Setting(
        same(bench.domain, partial(some, "clinc150", 15100, 5500, by="domain"), tasks=10, scenario="task"), Training(4, 10, 0.1)
    ),
    "clinc150, 10 domains, class-incremental, Adam": Setting(
        same(bench.domain, partial(some, "clinc150", 15100, 5500, by="domain"), tasks=10, scenario="class"),
        Training(4, 32, 0.001, "adam"),
    ),
    "NOAA weather, 10 stretches, SGD": Setting(same(bench.drift, partial(load, "noaa_weather")), Training(2, 10, 0.1)),
}


def one(setting: Setting, method: Method, strength: float | None, seed: int, out: Path) -> Record:
    """Return the record of one run: from disk if it is there, else by running it."""
    stream, training = setting.stream(seed), setting.training
    if method.method is not None:
        return run_or_load(RunSpec(stream, method.method, strength, seed, training, **method.options), out).result
    place = out / file_name(
        stream[0].stream["name"], "together", seed, RunSpec(stream, "joint", training=training).configuration
    )

    def make() -> tuple[list[Experience], Together]:
        return stream, Together(len(stream), lambda: build(training.model, stream[0], training.hidden), training, seed)

    return kept(place, "together", make, seed, training, {})


def accuracies(
    setting: Setting, methods: Mapping[str, Method], seeds: Iterable[int], out: Path
) -> dict[str, dict[float | None, list[float]]]:
    """Return average accuracies over seeds in percent, by method and strength."""
    found: dict[str, dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for name, method in methods.items():
            for strength in method.strengths:
                found[name][strength].append(accuracy(setting, method, strength, seed, out))
    return found


def accuracy(setting: Setting, method: Method, strength: float | None, seed: int, out: Path) -> float:
    """Return the average accuracy of a run in percent; 0 if it diverges, as a gradient pull does that overshoots."""
    try:
        return 100 * (one(setting, method, strength, seed, out).average or 0)
    except FloatingPointError:
        return 0.0


def row(about: str, found: dict[str, dict[float | None, list[float]]]) -> list[str]:
    """Return the cells of a setting: each method at its best strength, and the default at its own."""
    means = {name: {strength: fmean(values) for strength, values in runs.items()} for name, runs in found.items()}
    cells = [about, *(f"{means[name][s]:.1f}" for name, s in (("fine-tuning", None), ("averaging alone", 0.0)))]
    for name in ("RWalk", "EWC, averaged", "recipe"):
        best = max(means[name], key=lambda s: means[name][s])
        cells.append(f"{means[name][best]:.1f} ({best:g})")
    default = means["default"][DEFAULT]
    below = default - max(means["default"].values())
    return [*cells, f"{default:.1f}", f"{below:+.1f}", f"{means['joint'][None]:.1f}"]


HEADINGS = ["", "fine-tuning", "averaging alone", "RWalk, best", "EWC, averaged, best", "diagonal recipe, best",
            "default", "default − best", "joint"]  # fmt: skip


def main() -> None:
    """Do the runs that have no record yet, and print a line for each setting as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--ablation", action="store_true", help="change one ingredient of the default at a time instead")
    parser.add_argument(
        "--diagonal", action="store_true", help="change one ingredient of the diagonal recipe at a time instead"
    )
    seed_options(parser, 2)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels.use("auto")
    warnings.filterwarnings(
        "ignore", message="The gradient pull overshoots"
    )  # a gradient pull that overshoots is part of a scan
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = chosen_seeds(options)
    if options.ablation or options.diagonal:
        print("| | strength | average accuracy |\n|---|---|---|")
        for name, method in (DIAGONAL if options.diagonal else ABLATION).items():
            found = accuracies(SETTINGS[options.settings[0]], {name: method}, seeds, options.out)[name]
            best = max(found, key=lambda strength: fmean(found[strength]))
            print(f"| {name} | {best:g} | {spread(found[best], options.seeds)} |", flush=True)
        return
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name in options.settings:
        cells = row(name, accuracies(SETTINGS[name], METHODS, seeds, options.out))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
