"""Permuted MNIST as in the first author's released code: 17 tasks, one epoch of 55,000 examples each, one head.

`python -m reproduce.permuted_mnist --seeds 5 --out runs/permuted` trains what has no record yet and prints the table; it may be
stopped and started again at any moment, and several of them may work into one folder with different `--methods` or seeds. The
complete MNIST is looked up below `RWALK_DATA`, else downloaded. `--tune` prints how strengths do on three other tasks, on
examples that are neither trained on nor tested: so were those below chosen that no paper gives.

The published figures are those of the released notebook: mean and standard deviation over 5 runs.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reproduce.released import ReleasedAGEM, ReleasedEWC, ReleasedMAS, ReleasedRWalk, network
from reproduce.runs import chosen_seeds, kept, percent, seed_options, spread
from reproduce.together import Together
from reproduce.variants import RecipeVariant
from rwalk import EWC, L2, Kronecker, RWalk, TaskFisher, kernels
from rwalk.bench import Experience, Record, Training, permuted
from rwalk.bench.baselines import AGEM, Addition, Rehearsal, Replay
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.sealed import file_name
from rwalk.bench.training import Batch, Learner
from rwalk.consolidation.settings import Pull, Settings, resolve
from rwalk.rules.base import Rule

TASKS = 17
"""Of the 20 tasks, the first three served to choose learning rates and strengths."""
TUNING = 3, 100
"""Number of tasks and seed of the stream that strengths are chosen on."""
KEPT = 5_000
"""Examples that the released code sets aside for validation."""
MEMORY = Rehearsal(25, "class", batch=256)
"""What A-GEM keeps and draws there."""


class Method(NamedTuple):
    """A way to learn, with its settings in the released script, or our own.

    Args:
        learn: makes the learner from the strength, the builder of the network, the training and the seed.
        lr: learning rate of SGD.
        strength: factor of the penalty; 0 where there is none.
        about: what it is.
        published: average accuracy in percent, its standard deviation, and forgetting, where published.
        scan: the strengths that were tried.
    """

    learn: Callable[..., Learner]
    lr: float
    strength: float
    about: str
    published: tuple[float, float, float] | None = None
    scan: tuple[float, ...] = ()


def ruled(rule: Rule[Any] | None, pull: Pull | None = None) -> Callable[..., Learner]:
    """Return what makes a learner under a rule; with a pull it ends a task at the average of its later iterates."""
    return lambda strength, *args: Learner(*args, memory=resolve(rule, strength, pull, "tail" if pull else None))


def unruled(
    added: Callable[[Rehearsal, int], Addition] | None = None,
    rehearsal: Rehearsal | None = None,
    memory: Settings | None = None,
) -> Callable[..., Learner]:
    """Return what makes a learner without a strength, from what it adds to plain training."""

    def learn(_: float, build: Callable[[], nn.Module], training: Training, seed: int) -> Learner:
        addition = added(rehearsal, seed) if added and rehearsal else None
        return Learner(build, training, seed, memory=memory, addition=addition)

    return learn


class Smoothed(Learner):
    """A rule with label smoothing of .1: the softmax never saturates, and gradients keep showing what matters."""

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return the smoothed cross-entropy over all outputs."""
        return F.cross_entropy(self.model(batch.x), batch.y, label_smoothing=0.1)


def smoothed(strength: float, *args: Any) -> Learner:
    """Make the learner of the default with label smoothing."""
    return Smoothed(*args, memory=resolve(None, strength))


AVERAGED: Settings = resolve(L2(), 0.0, None, "tail")
"""No pull, and averaging."""

METHODS = {
    "sgd": Method(unruled(), 0.03, 0, "plain SGD", (47.95, 1.32, 0.511)),
    "ewc-released": Method(ruled(ReleasedEWC()), 0.03, 10, "their EWC, strength 10", (68.35, 0.69, 0.288)),
    "mas-released": Method(ReleasedMAS, 0.1, 0.1, "their MAS, strength .1", (69.85, 0.93, 0.269)),
    "rwalk-released": Method(ruled(ReleasedRWalk()), 0.1, 1, "their RWALK, strength 1", (85.80, 0.57, 0.082)),
    "agem-released": Method(
        unruled(ReleasedAGEM, MEMORY), 0.1, 0, "their A-GEM, the last 25 of each class stored", (89.12, 0.15, 0.070)
    ),
    "agem": Method(unruled(AGEM, MEMORY), 0.1, 0, "A-GEM, any 25 of each class stored", (89.12, 0.15, 0.070)),
    "rwalk": Method(ruled(RWalk()), 0.1, 1, "RWalk as in the paper, strength 1"),
    "recipe": Method(
        ruled(TaskFisher()), 0.2, TaskFisher.defaults.strength, "the diagonal recipe, its default strength",
        scan=(0.01, 0.03, 0.1, 0.3),
    ),
    "recipe-first": Method(
        ruled(RecipeVariant(unit="first"), "proximal"), 0.2, 0.0005, "the recipe in the unit of the first task, tuned",
        scan=(0.00025, 0.0005, 0.001, 0.0025, 0.005),
    ),
    "default": Method(ruled(None), 0.2, Kronecker.defaults.strength, "the default"),
    "default-smoothed": Method(smoothed, 0.2, Kronecker.defaults.strength, "the default, label smoothing .1"),
    "default-32": Method(ruled(Kronecker(rank=32)), 0.2, Kronecker.defaults.strength, "the default, rank 32"),
    "default-whole": Method(
        ruled(Kronecker(rank=None, share=1.0)), 0.2, Kronecker.defaults.strength, "the default, all directions"
    ),
    "sgd-averaged": Method(unruled(memory=AVERAGED), 0.2, 0, "SGD, averaged"),
    "ewc-averaged": Method(
        ruled(EWC(samples=1000), "proximal"), 0.2, 10, "EWC, averaged, proximal, tuned", scan=(1, 3, 10, 30, 100)
    ),
    "agem-averaged": Method(unruled(AGEM, MEMORY, AVERAGED), 0.2, 0, "A-GEM, averaged"),
    "replay-averaged": Method(
        unruled(Replay, replace(MEMORY, batch=None), AVERAGED), 0.2, 0, "replay, averaged, as many stored"
    ),
    "joint-averaged": Method(lambda _, *args: Together(TASKS, *args, memory=AVERAGED), 0.2, 0, "joint, averaged"),
}  # fmt: skip


def stream(data: DataSet, seed: int) -> list[Experience]:
    """Return the 17 tasks of a seed."""
    return permuted(replace(data, train_x=data.train_x[KEPT:], train_y=data.train_y[KEPT:]), tasks=TASKS, seed=seed)


def early(data: DataSet) -> list[Experience]:
    """Return tasks to choose a strength on, with the examples set aside in place of the test examples."""
    columns = {"train_x": data.train_x[KEPT:], "train_y": data.train_y[KEPT:]}
    held = {"test_x": data.train_x[:KEPT], "test_y": data.train_y[:KEPT]}
    return permuted(replace(data, name="mnist-validation", **columns, **held), *TUNING)


def one(
    tasks: Callable[[], list[Experience]],
    name: str,
    method: Method,
    seed: int,
    out: Path,
    device: str = "cpu",
    about: str = "permuted-mnist",
) -> Record:
    """Return the record of one run on the tasks of a stream of this name: from disk if it is there, else by running it."""
    training = Training(lr=method.lr)
    settings = {"lr": method.lr, "about": method.about, "strength": method.strength}
    place = out / file_name(about, name, seed, settings)
    there = place.exists()
    added: dict[str, Any] = {"about": method.about, "model": "784-256-256-10, as released"}
    added |= {"strength": method.strength} if method.strength else {}

    def make() -> tuple[list[Experience], Learner]:
        return tasks(), method.learn(method.strength, lambda: network(784, 10).to(device), training, seed)

    record = kept(place, name, make, seed, training, added, place.with_suffix(".checkpoint"), device)
    if not there:
        accuracy, seconds = 100 * (record.average or 0), record.timings["train_seconds"]
        print(f"{name}, {method.about}, seed {seed}: {accuracy:.2f} in {seconds:.0f} s", flush=True)
    return record


def scanned(method: Method) -> Iterable[Method]:
    """Yield a method with each strength of its scan."""
    for strength in method.scan:
        yield method._replace(strength=strength, about=f"tuning, strength {strength:g}")


def table(records: dict[str, list[Record]]) -> str:
    """Lay out the results as a Markdown table, the published figures beside them."""
    lines = ["| method | average accuracy | published | forgetting | published |", "|---|---|---|---|---|"]
    for name, runs in records.items():
        method = METHODS[name]
        accuracy, forgetting = percent(runs)
        theirs = method.published
        cells = [f"{method.about}, lr {method.lr:g}", spread(accuracy), f"{theirs[0]:.2f} ± {theirs[1]:.2f}" if theirs else "–"]
        cells += ["–" if name == "joint-averaged" else spread(forgetting), f"{100 * theirs[2]:.1f}" if theirs else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Do the runs that have no record yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, of " + ", ".join(METHODS))
    seed_options(parser)
    parser.add_argument("--tune", action="store_true", help="try the methods' strengths on other tasks instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/permuted-mnist"), help="folder of the records")
    options = parser.parse_args()
    names = options.methods.split(",")
    if unknown := set(names) - METHODS.keys():
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; choose of {', '.join(METHODS)}")
    torch.set_num_threads(1)
    kernels.use("auto")
    options.out.mkdir(parents=True, exist_ok=True)
    data = load("mnist")
    if options.tune:
        for name in names:
            for method in scanned(METHODS[name]):
                one(partial(early, data), name, method, TUNING[1], options.out, options.device, "permuted-mnist-validation")
        return
    seeds = chosen_seeds(options)
    runs = {
        name: [one(partial(stream, data, seed), name, METHODS[name], seed, options.out, options.device) for seed in seeds]
        for name in names
    }
    print(table(runs))


if __name__ == "__main__":
    main()
