"""The command line: `run` and `tune` train methods on streams of tasks; `report`, `watch` and `compare` read the results."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rwalk import plan, reading
from rwalk.bench.experience import Scenario
from rwalk.bench.learners import Training
from rwalk.consolidator import Average, Pull
from rwalk.importance import rules
from rwalk.importance.base import Importance
from rwalk.replay.buffer import Per

RULES = rules()


def _fields(kind: type[Importance[Any]]) -> Any:
    """Return a dataclass of a rule's fields without their check, which the parser would report in words of its own."""
    return make_dataclass(kind.__name__, [(f.name, f.type, f) for f in fields(kind)], namespace={"__doc__": kind.__doc__})


FIELDS = {name: _fields(kind) for name, kind in RULES.items()}
RuleFields: Any = make_dataclass("RuleFields", [(name, kind, field(default_factory=kind)) for name, kind in FIELDS.items()])


@dataclass(frozen=True)
class Run:
    """Train methods on a stream of tasks, write one record per run, and print a table.

    Started again with the same arguments, it goes on after the last finished task of the first run that has no record yet.
    Under torchrun all ranks train one model together, each on its part of every batch.
    """

    stream: tyro.conf.Positional[str]
    """Kind and data set: split-, domain-, drift-, permuted- or rotated-, then digits, a name such as mnist, or a folder of
    parquet files."""
    methods: str = "finetune,rwalk"
    """Comma-separated: finetune, joint, cumulative, replay, agem, lwf, recipe, and rules (see `rwalk list`)."""
    seeds: int = 3
    """Number of seeds; each one sets initial weights, batch order and permutations."""
    first_seed: int = 0
    """The first seed."""
    strength: str | None = None
    """Factor of the penalty, several ones with commas between, or tuned: what `rwalk tune` has found with the same settings;
    default: 1 for rules and lwf, 0.1 for the recipe, 0.0015 for kronecker."""
    pull: Pull | None = None
    """How rules pull: by the penalty's gradient, or by a proximal step; default: gradient; recipe and kronecker: proximal."""
    average: Average | None = None
    """Whether rules end a task at the average of its later iterates; default: none; recipe and kronecker: tail."""
    replay: int | None = None
    """Examples of earlier tasks that replay and agem keep; default: 200. If given, rules and the recipe replay them, too."""
    per: Per = "total"
    """Whether all classes share that number, or each one has it."""
    select: Literal["uniform", "plane", "entropy", "herding", "reservoir"] = "uniform"
    """Which examples are kept."""
    replay_batch: int | None = None
    """How many of them join each step; default: as many as the batch has."""
    out: Path = Path("runs")
    """Folder for the records."""
    open: bool = False
    """Show the report in a browser at the end."""
    data: Path | None = None
    """Folder in which folders of data sets lie; default: the environment variable RWALK_DATA."""
    tasks: int | None = None
    """Number of tasks; default: 5 for split and rotated, 10 for permuted and drift, all for domain."""
    scenario: Scenario | None = None
    """For split and domain streams: what is known at test time; default: task for split, domain for domain."""
    label: str | None = None
    """Column of labels; default: one of a usual name, such as label, or marked as such."""
    by: str | None = None
    """For domain streams: the column whose values are the tasks, or folder, if each is a folder in the data set's; default:
    domain."""
    log: Literal["tensorboard"] | None = None
    """Also write each task's figures for TensorBoard, into a folder beside each record; tensorboard --logdir OUT shows them."""
    kernels: Literal["auto", "blocked", "numba", "triton", "reference"] = "blocked"
    """How the arithmetic is done: see `rwalk.kernels.use`; results agree to rounding."""
    device: str = "cpu"
    """Where models are trained: cpu, cuda, or one GPU such as cuda:1; under torchrun each rank takes a GPU in turn."""
    threads: int = 1
    """CPU threads of a run; small networks are fastest with one, and equal results need equal numbers."""
    skip: int = 0
    """Leave out the first tasks of the stream: those that a strength was tuned on."""
    workers: int = 1
    """Processes of this machine that do runs side by side."""
    backend: Literal["processes", "dask"] = "processes"
    """Where runs are done: in processes of this machine, or on a Dask cluster, whose workers load the data themselves."""
    address: str | None = None
    """Of the Dask scheduler, such as tcp://host:8786."""
    training: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)
    rules: Annotated[RuleFields, tyro.conf.arg(name="")] = field(default_factory=RuleFields)


@dataclass(frozen=True)
class Tune(Run):
    """Choose the strength of methods: try values on the first tasks of a stream, and judge them on held-out training examples.

    No test example is read. Started again with the same arguments, it goes on. `rwalk run --strength tuned` takes the result.
    """

    methods: Annotated[str, tyro.conf.arg(aliases=["--method"])] = "rwalk"
    """Comma-separated: recipe, and rules (see `rwalk list`)."""
    seeds: int = 1
    """Number of seeds, over which accuracies are averaged."""
    strength: str | None = None
    """Strengths to try, with commas between; default: 0.01, 0.03, 0.1, ... 100 times the method's default."""
    learning_rates: str | None = None
    """Learning rates to try with each strength, with commas between; default: that of --lr."""
    tune_tasks: int = 3
    """How many of the stream's first tasks to try on."""
    validation: float = 0.2
    """Which share of their training examples is held out."""
    refine: int = 0
    """How many further values to try between those, where Optuna expects better."""


@dataclass(frozen=True)
class List:
    """List streams, data sets and methods."""


@dataclass(frozen=True)
class Plan:
    """Say what training with a rule will hold, move and take at a given size, without training."""

    model: tyro.conf.Positional[str | None] = None
    """A size such as 350M or 7b, or package.module:factory, a function without arguments that makes the network."""
    rule: str = "rwalk"
    """One of the rules (see `rwalk list`), or recipe."""
    optimizer: str = "adam"
    """sgd, momentum or adam, fused."""
    devices: int = 1
    """How many devices train."""
    sharded: bool = False
    """Each device holds an equal part of all tensors (FSDP2), and not a copy."""
    tokens: int = 1024
    """Tokens or examples in the batch of one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters, where a size is given."""
    state_dtype: Literal["bfloat16"] | None = None
    """As for `Consolidator`."""
    state_device: Literal["cpu"] | None = None
    """As for `Consolidator`."""
    backend: plan.Backend = "fused"
    """Of the kernels: fused is triton on a GPU and numba on a CPU."""
    machine: str = "h200"
    """h200, a100, laptop, or here: this machine's processor is measured."""
    bandwidth: float | None = None
    """Of the memory, in GB/s, in place of the machine's."""
    compute: float | None = None
    """Arithmetic, in TFLOP/s, in place of the machine's."""
    utilisation: float | None = None
    """Which share of the arithmetic training reaches; default: 0.4 of a published figure, 1 of a measured one."""
    table: bool = False
    """One line for each of several sizes."""


COMMANDS: Any = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | reading.COMMANDS
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


def parsed(words: Sequence[str]) -> Any:
    """Return the command that words say, as one of the classes above; exit with a message where they say none."""
    return tyro.cli(COMMANDS, prog="rwalk", description=__doc__, args=words)
