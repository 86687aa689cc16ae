"""Split MNIST, split CIFAR-10 and a stand-in for split CIFAR-100, beside fine-tuning, replay, joint training and Avalanche.

`python -m reproduce.split mnist-heads --out runs/split` trains what has no record yet and prints a table; it may be stopped and
started again at any moment. Data sets are looked up below `RWALK_DATA`, else downloaded. Avalanche's own RWalkPlugin is shown
where it is installed (`make peers`).
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reproduce.runs import chosen_seeds, kept, percent, seed_options, spread
from reproduce.together import Together
from rwalk import EWC, SI, RWalk, bench, kernels
from rwalk.bench import Experience, Record, Training
from rwalk.bench.baselines import Rehearsal
from rwalk.bench.holdout import later
from rwalk.bench.models import build
from rwalk.bench.pool import run_or_load
from rwalk.bench.sealed import file_name
from rwalk.bench.spec import RunSpec
from rwalk.bench.training import Learner
from rwalk.consolidation.settings import resolve


class Target(NamedTuple):
    """What is learned, how, and what others have published.

    Args:
        about: what it is.
        stream: makes the tasks.
        training: how every method trains.
        strengths: of the rules, and of Avalanche's plugin.
        published: average accuracy in percent, by method.
    """

    about: str
    stream: Callable[[], list[Experience]]
    training: Training
    strengths: dict[str, float]
    published: dict[str, float] = {}  # noqa: RUF012


MNIST = Training(10, 64, 0.001, "adam")
CIFAR10 = Training(1, 32, 0.01, "momentum")
IN_EVAL = "RWalk in eval mode"
STRENGTHS = {
    "RWalk": 1.0, "RWalk at eps 1.2e-7": 1.0, IN_EVAL: 1.0, "EWC": 10.0, "SI": 1.0, "Avalanche's RWalkPlugin": 1.0
}  # fmt: skip


def undropped(task: Experience) -> torch.nn.Module:
    """Make the convolutional network without its dropout: so Avalanche's plugin trains it, which leaves it in eval mode."""
    model = build("cnn", task, ())
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


def single(mask: Any) -> Target:
    """Return class-incremental split MNIST under a softmax mask."""
    about = f"split MNIST, one head, 5 tasks of 2 classes, 10 epochs, softmax mask {mask}"
    return Target(about, lambda: bench.split("mnist", scenario="class"), replace(MNIST, mask=mask), STRENGTHS)


TARGETS = {
    "mnist-heads": Target(
        "split MNIST, a head for each task, 5 tasks of 2 classes, 10 epochs", lambda: bench.split("mnist"), MNIST, STRENGTHS,
        {"RWalk": 99.0},
    ),
    **{f"mnist-{mask}": single(mask) for mask in ("task", "seen", "all")},
    "cifar10": Target(
        "split CIFAR-10, a head for each task, 5 tasks of 2 classes, one epoch, convolutional network",
        lambda: bench.split("cifar10"), CIFAR10, STRENGTHS,
    ),
    "cifar10-undropped": Target(
        "the same without dropout, as Avalanche's plugin trains it",
        lambda: bench.split("cifar10"), replace(CIFAR10, model="reproduce.split:undropped"), STRENGTHS,
    ),
    "hundred": Target(
        "100 classes of Tiny-ImageNet at 32 x 32 in place of CIFAR-100: 17 tasks of 5 classes after 3 left out, one epoch, "
        "reduced ResNet-18",
        lambda: later(bench.split("tinyimagenet100a_32", tasks=20), 3), Training(1, 10, 0.03, "sgd", "resnet"),
        STRENGTHS,
        {"fine-tuning": 43.00, "EWC": 42.39, "SI": 47.12, "RWalk": 40.87, "A-GEM": 62.27},
    ),
}  # fmt: skip

METHODS: dict[str, Any] = {
    "fine-tuning": "finetune",
    "RWalk": RWalk(),
    "RWalk at eps 1.2e-7": RWalk(eps=1.2e-7),
    IN_EVAL: None,
    "EWC": EWC(samples=1000),
    "SI": SI(),
    "recipe": "recipe",
    "default": "default",
    "A-GEM": "agem",
    "replay": "replay",
    "replay beside the default": "default",
    "Avalanche's RWalkPlugin": None,
    "joint": None,
}
"""None are those that are learners of this folder. The second RWalk has Avalanche's constant, the third trains in its mode."""
KEPT = Rehearsal(200)
"""What A-GEM and replay keep: 200 examples in all."""


class InEvalMode(Learner):
    """A rule's learner that trains as Avalanche's plugin does: in eval mode from the second step of each task on."""

    def fit(self, experience: Experience) -> None:
        """Train on one task: one step as usual, and the others without dropout and by BatchNorm's running statistics."""
        self.model.train()
        self.tick = self.model.eval
        super().fit(experience)


def learner(name: str, target: Target, tasks: list[Experience], seed: int, device: str) -> Any:
    """Make one of our own learners."""
    training = target.training

    def make() -> torch.nn.Module:
        return build(training.model, tasks[0], training.hidden).to(device)

    if name == "joint":
        return Together(len(tasks), make, training, seed)
    if name == IN_EVAL:
        return InEvalMode(make, training, seed, memory=resolve(RWalk(), target.strengths[name]))
    from reproduce.avalanche_rwalk import AvalancheRWalk

    return AvalancheRWalk(target.strengths[name], make, training, seed)


def one(name: str, target: Target, seed: int, out: Path, device: str = "cpu") -> Record:
    """Return the record of one run: from disk if it is there, else by running it."""
    tasks, method, training, strength = target.stream(), METHODS[name], target.training, target.strengths.get(name)
    if method is not None:
        replay = KEPT if method == "agem" or name.startswith("replay") else None
        return run_or_load(RunSpec(tasks, method, strength, seed, training, replay=replay, device=device), out).result
    added = {"strength": strength}
    config = RunSpec(tasks, training=training).configuration | added
    place = out / file_name(tasks[0].stream["name"], name, seed, config)
    return kept(place, name, lambda: (tasks, learner(name, target, tasks, seed, device)), seed, training, added, device=device)


def several(name: str, target: Target, seeds: Iterable[int], out: Path, device: str = "cpu") -> list[Record] | None:
    """Return the records of some seeds; None where one diverges, as a gradient pull does that overshoots."""
    try:
        return [one(name, target, seed, out, device) for seed in seeds]
    except FloatingPointError:
        return None


def row(name: str, target: Target, records: list[Record] | None) -> str:
    """Lay out one line of the table; without records the method has diverged."""
    accuracy, forgetting = ([], []) if records is None else percent(records)
    strength = f", strength {target.strengths[name]:g}" if name in target.strengths else ""
    published = f"{target.published[name]:.1f}" if name in target.published else "–"
    fades = "–" if name == "joint" or records is None else spread(forgetting)
    reached = "diverges" if records is None else spread(accuracy)
    return f"| {name}{strength} | {reached} | {fades} | {published} |"


def main() -> None:
    """Do the runs that have no record yet, and print a table for each target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, of " + ", ".join(METHODS))
    seed_options(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/split"), help="folder of the records")
    options = parser.parse_args()
    names = [name for name in options.methods.split(",") if "Avalanche" not in name or find_spec("avalanche")]
    if unknown := (set(options.targets) - TARGETS.keys()) | (set(names) - METHODS.keys()):
        parser.error(f"unknown {', '.join(sorted(unknown))}; see --help")
    torch.set_num_threads(1)
    kernels.use("auto")
    options.out.mkdir(parents=True, exist_ok=True)
    for key in options.targets:
        target = TARGETS[key]
        print(f"\n{target.about}\n\n| method | average accuracy | forgetting | published |\n|---|---|---|---|", flush=True)
        for name in names:
            seeds = chosen_seeds(options)
            print(row(name, target, several(name, target, seeds, options.out, options.device)), flush=True)


if __name__ == "__main__":
    main()
