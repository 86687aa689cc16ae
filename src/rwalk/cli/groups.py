"""The options of `rwalk run` and `rwalk tune`, in the groups that their help shows."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rwalk.bench.baselines import BASELINES, RECIPES_ABOUT
from rwalk.bench.optimisation import Training
from rwalk.bench.streams import Scenario
from rwalk.cli.options import UNSET
from rwalk.consolidation.settings import Average, Pull
from rwalk.replay.buffer import Per
from rwalk.rules import rules

grouped = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
"""Of a group, whose options do not begin with its name."""


@grouped
@dataclass(frozen=True)
class StreamOptions:
    """Which data, and how they become tasks.

    Args:
        data: Folder in which folders of data sets lie; default: the environment variable RWALK_DATA.
        tasks: Number of tasks; default: 5 for split and rotated, 10 for permuted and drift, all for domain.
        skip: Leave out the first tasks of the stream: those that a strength was tuned on.
        scenario: For split and domain streams: what is known at test time; default: task for split, domain for domain.
        label: Column of labels; default: one of a usual name, such as label, or marked as such.
        target: Column of numbers that are to be met in place of labels, a regression, for domain and drift streams; scores are
            R².
        limit: Examples of each task to keep for training and as many for testing, at random, for quick tries; default: all.
        metric: A function of true and predicted labels, in place of accuracy or R², as package.module:name, such as
            sklearn.metrics:balanced_accuracy_score.
        lower: A lower score of the metric is better.
        by: For domain streams: the column whose values are the tasks, or folder, if each is a folder in the data set's;
            default: domain.
    """

    data: Annotated[Path | None, UNSET] = None
    tasks: Annotated[int | None, UNSET] = None
    skip: int = 0
    scenario: Annotated[Scenario | None, UNSET] = None
    label: Annotated[str | None, UNSET] = None
    target: Annotated[str | None, UNSET] = None
    limit: Annotated[int | None, UNSET] = None
    metric: Annotated[str | None, UNSET] = None
    lower: bool = False
    by: Annotated[str | None, UNSET] = None


@grouped
@dataclass(frozen=True)
class MethodOptions:
    """What learns the stream, and how hard rules hold; the fields of each rule follow at the end.

    Args:
        names: With commas between: finetune, joint, cumulative, replay, agem, lwf, default, recipe, and rules (`rwalk
            list` shows all); or package.module:name of a rule or learner of your own.
        strength: Factor of the penalty; several ones with commas between; or tuned, for what `rwalk tune` has found with the
            same settings. A method's own, such as --ewc.strength, goes before it. Default: 1 for rules and lwf, 0.1 for
            default, recipe and kronecker.
        pull: How rules pull: by the penalty's gradient, or by a proximal step; default: as in their papers, or proximal.
        average: Whether rules end a task at the average of its later iterates; default: none; for default, recipe and
            kronecker: tail.
    """

    names: Annotated[str, tyro.conf.arg(name="methods", metavar="NAMES")] = "finetune,rwalk"
    strength: Annotated[str | None, UNSET] = None
    pull: Annotated[Pull | None, UNSET] = None
    average: Annotated[Average | None, UNSET] = None


@grouped
@dataclass(frozen=True)
class ReplayOptions:
    """Examples of earlier tasks that replay and agem keep, and rules too if --replay is given.

    Args:
        size: How many; default: 200 for replay and agem, none for rules.
        per: Whether all classes share that number, or each one has it.
        select: Which examples are kept.
        batch: How many of them join each step; default: as many as the batch has.
    """

    size: Annotated[int | None, tyro.conf.arg(name="replay", help_behavior_hint="")] = None
    per: Per = "total"
    select: Literal["uniform", "plane", "entropy", "herding", "reservoir"] = "uniform"
    batch: Annotated[int | None, tyro.conf.arg(name="replay-batch", help_behavior_hint="")] = None


@grouped
@dataclass(frozen=True)
class MachineOptions:
    """How many runs, and where and how they are computed.

    Args:
        seeds: Number of seeds; each one sets initial weights, batch order and permutations.
        first_seed: The first seed.
        workers: Processes of this machine that do runs side by side.
        backend: Where runs are done: in processes of this machine, or on a Dask cluster, whose workers load the data
            themselves.
        address: Address of the Dask scheduler, such as tcp://host:8786.
        device: Where models are trained: cpu, cuda, or one GPU such as cuda:1.
        threads: CPU threads of a run; small networks are fastest with one, and equal results need equal numbers.
        kernels: How the arithmetic is done: see `rwalk.kernels.use`; results agree to rounding.
    """

    seeds: int = 3
    first_seed: int = 0
    workers: int = 1
    backend: Literal["processes", "dask"] = "processes"
    address: Annotated[str | None, UNSET] = None
    device: str = "cpu"
    threads: int = 1
    kernels: Literal["auto", "blocked", "numba", "triton", "reference"] = "auto"


@grouped
@dataclass(frozen=True)
class OutputOptions:
    """What is written, and what is shown.

    Args:
        out: Folder for the records and the report.
        open: Show the report in a browser at the end.
        log: Also write each task's figures for TensorBoard, into a folder beside each record; tensorboard --logdir OUT shows
            them.
    """

    out: Path = Path("runs")
    open: bool = False
    log: Annotated[Literal["tensorboard"] | None, UNSET] = None


@grouped
@dataclass(frozen=True)
class TunedMethodOptions(MethodOptions):
    """What is tuned; the fields of each rule follow at the end.

    Args:
        names: With commas between: default, recipe, and rules (`rwalk list` shows all); or package.module:name of a rule
            of your own.
        strength: Strengths to try, with commas between; default: 0.01, 0.03, 0.1, ... 100 times the method's default. Those of
            one method, such as --ewc.strength, go before them.
    """

    names: Annotated[str, tyro.conf.arg(name="methods", aliases=["--method"], metavar="NAMES")] = "rwalk"
    strength: Annotated[str | None, UNSET] = None


@grouped
@dataclass(frozen=True)
class TunedMachineOptions(MachineOptions):
    """How many runs a trial has, and where and how they are computed.

    Args:
        seeds: Number of seeds, over which accuracies are averaged.
    """

    seeds: int = 1


@grouped
@dataclass(frozen=True)
class TuningOptions:
    """What is tried, and how it is judged.

    Args:
        learning_rates: Learning rates to try with each strength, with commas between; default: that of --lr.
        tune_tasks: How many of the stream's first tasks to try on.
        validation: Which share of their training examples is held out.
        refine: How many further values to try between those, where Optuna expects better.
    """

    learning_rates: Annotated[str | None, UNSET] = None
    tune_tasks: int = 3
    validation: float = 0.2
    refine: int = 0


def _unchecked(kind: type, *more: Any, **types: Any) -> Any:
    """Return a dataclass of another one's fields without their check, which the parser would report in words of its own."""
    found = [(f.name, types.get(f.name, f.type), f) for f in fields(kind)]
    return make_dataclass(kind.__name__, [*found, *more], frozen=True, namespace={"__doc__": kind.__doc__})


OWN = tyro.conf.arg(help="Factor of this method's penalty, in place of --strength.", help_behavior_hint="")
STRENGTH = ("strength", Annotated[str | None, OWN, tyro.conf.DisallowNone], field(default=None))
"""The option of each method that has a strength."""
RULES = rules()
TrainingOptions = grouped(_unchecked(Training, model=str))
KINDS = {name: _unchecked(kind, STRENGTH) for name, kind in RULES.items()} | {
    name: make_dataclass(name, [STRENGTH], frozen=True, namespace={"__doc__": about})
    for name, about in (RECIPES_ABOUT | {"lwf": BASELINES["lwf"]}).items()
}
FieldOptions: Any = make_dataclass("FieldOptions", [(name, kind, field(default_factory=kind)) for name, kind in KINDS.items()])
"""What belongs to single methods: the fields of a rule, and a strength of its own."""
