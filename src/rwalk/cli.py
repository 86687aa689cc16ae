"""The command line: `rwalk run`, `rwalk list`, `rwalk report` and `rwalk plan`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

try:
    import tyro
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    raise SystemExit(f"rwalk: the command line needs the extra `bench` ({error}). Run: pip install 'rwalk[bench]'") from None

import torch

from rwalk import files, kernels, plan
from rwalk._errors import explain
from rwalk.bench import models, ranks
from rwalk.bench.comparators import Rehearsal
from rwalk.bench.data import HUB, load
from rwalk.bench.experience import STREAMS, Experience, Scenario, make, parse
from rwalk.bench.learners import Training
from rwalk.bench.record import Record, file_name
from rwalk.bench.runner import LEARNERS, called, configuration, refuse, run
from rwalk.bench.trackers import tracker
from rwalk.consolidator import Average, Pull, resolve
from rwalk.importance import rules
from rwalk.importance.base import Importance
from rwalk.replay.buffer import Per
from rwalk.report import costs, read, show, summarise

RULES = rules()


def _fields(kind: type[Importance[Any]]) -> Any:
    """Return a dataclass of a rule's fields without their check, which the parser would report in words of its own."""
    return make_dataclass(kind.__name__, [(f.name, f.type, f) for f in fields(kind)], namespace={"__doc__": kind.__doc__})


FIELDS = {name: _fields(kind) for name, kind in RULES.items()}
RuleFields: Any = make_dataclass("RuleFields", [(name, kind, field(default_factory=kind)) for name, kind in FIELDS.items()])


LIMITS = {"seeds": range(1, 10_001), "threads": range(1, 1025), "first_seed": range(2**62)}
"""Whole numbers that torch or the machine would choke on if they were larger."""


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
    strength: float | None = None
    """Factor of the penalty; default: 1 for rules and lwf, 0.005 for the recipe, 0.0015 for kronecker."""
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
    threads: int = 1
    """CPU threads; small networks are fastest with one, and equal results need equal numbers."""
    training: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)
    rules: Annotated[RuleFields, tyro.conf.arg(name="")] = field(default_factory=RuleFields)


@dataclass(frozen=True)
class List:
    """List streams, data sets and methods."""


@dataclass(frozen=True)
class Report:
    """Print tables of all records in a folder."""

    folder: tyro.conf.Positional[Path]
    """Folder written by `rwalk run --out`."""


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
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    console = Console()
    try:
        command = tyro.cli(COMMANDS, prog="rwalk", description=__doc__, args=arguments)
        if isinstance(command, Run):
            with ranks.launched():
                console.quiet = ranks.number() > 0
                _run(command, console)
        elif isinstance(command, Report):
            _report(command.folder, console)
        elif isinstance(command, Plan):
            _plan(command, console)
        else:
            _list(console)
    except (ValueError, OSError, ImportError) as error:
        print(f"rwalk: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rwalk: interrupted. The same command continues after the last finished task.", file=sys.stderr)
        return 130
    return 0


def _run(command: Run, console: Console) -> None:
    """Do the runs that have no record yet, then print the table of all of them."""
    ruled = {name: kind(**vars(getattr(command.rules, name))) for name, kind in RULES.items()}
    methods = [_method(name.strip(), ruled) for name in command.methods.split(",")]
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    for option, allowed in LIMITS.items():
        if getattr(command, option) not in allowed:
            came = f"--{option.replace('_', '-')} {getattr(command, option)}"
            raise ValueError(explain(came, f"{allowed[0]} to {allowed[-1]}", "Pass such a number."))
    resolve(None, command.strength)
    rehearsals = [_replay(command, name) for name in ("replay", *(name for name, _ in methods))]
    with tracker(command.log, command.out):
        pass  # says now if its package is missing
    torch.set_num_threads(command.threads)
    kernels.use(command.kernels)
    kind, name = parse(command.stream)
    if command.by and kind != "domain":
        raise ValueError(explain(f"`--by {command.by}` for a {kind} stream", "a domain stream", "Leave `--by` out."))
    by = {"by": command.by or "domain"} if kind == "domain" else {}
    data = load(name, command.data, command.label, **by)
    streams = {seed: make(kind, data, seed, command.scenario, tasks=command.tasks, **by) for seed in seeds}
    models.build(command.training.model, streams[seeds[0]][0], command.training.hidden)  # says now if it cannot
    for _, method in methods:
        refuse(streams[seeds[0]], method)
    for rehearsal in rehearsals[1:]:
        if rehearsal is not None:
            rehearsal.check(streams[command.first_seed])
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(explain(f"`--out {command.out}`, which is a file", "a folder", "Name another folder."))
    command.out.mkdir(parents=True, exist_ok=True)
    files.sweep(command.out)
    done = []
    with _progress(console) as progress:
        overall = progress.add_task("all runs", total=len(seeds) * len(methods))
        for seed, stream in streams.items():
            for name, method in methods:
                done.append(_one(command, stream, name, method, seed, progress))
                progress.advance(overall)
    show(summarise(done), console)
    console.print(f"Records: {command.out}", highlight=False)


def _one(
    command: Run, stream: list[Experience], name: str, method: str | Importance[Any], seed: int, progress: Progress
) -> Record:
    """Return the record of one run: from disk if it is there, else by running it."""
    options: dict[str, Any] = {"pull": command.pull, "average": command.average, "replay": _replay(command, name)}
    config = configuration(stream, method, command.strength, command.training, **options)
    steps, name = _steps(stream, name, command.training), called(method, options["replay"])
    path = command.out / file_name(stream[0].stream["name"], name, seed, config)
    checkpoint = path.with_suffix(".checkpoint")
    if ranks.agreed(path.exists()):
        record = Record.load(path)
        checkpoint.unlink(missing_ok=True)
        progress.console.print(f"{name} seed {seed}: {_result(record)} (on disk)", highlight=False)
        return record
    bar = progress.add_task(f"{name} seed {seed}", total=steps)
    options |= {"checkpoint": checkpoint, "tick": lambda: progress.advance(bar)}
    with tracker(command.log, path.with_suffix("")) as track:
        record = run(stream, method, command.strength, seed, command.training, track=track, **options)
    progress.remove_task(bar)
    if ranks.number() == 0:
        record.save(command.out)
        checkpoint.unlink(missing_ok=True)
    seconds = record.timings["train_seconds"]
    progress.console.print(f"{name} seed {seed}: {_result(record)} in {seconds:.1f} s", highlight=False)
    return record


def _replay(command: Run, name: str) -> Rehearsal | None:
    """Return what a method keeps: replay and agem always, rules and the recipe if the command says how much."""
    rules_too = command.replay is not None and name not in LEARNERS
    size = 200 if command.replay is None else command.replay
    rehearsal = Rehearsal(size, command.per, command.select, command.replay_batch)
    return rehearsal if rules_too or name in ("replay", "agem") else None


def _result(record: Record) -> str:
    bits = f", {fmean(record.bits[-1]):.3f} bits per character" if record.bits else ""
    return f"average accuracy {record.average_accuracy:.2%}{bits}"


def _steps(stream: list[Experience], name: str, training: Training) -> int:
    """Count the steps of a run; joint and cumulative training see all earlier data again at each task."""
    sizes = [len(e.train) for e in stream]
    parts = [sum(sizes[: k + 1]) for k in range(len(sizes))] if name in ("joint", "cumulative") else sizes
    return sum(-(-size // training.batch_size) * training.epochs for size in parts)


def _method(name: str, ruled: dict[str, Importance[Any]]) -> tuple[str, str | Importance[Any]]:
    """Return a method's name and what `rwalk.bench.run` takes for it."""
    key = name.replace("-", "_").lower()
    if key not in {*LEARNERS, "recipe", *RULES}:
        known = ", ".join([*LEARNERS, "recipe", *RULES])
        raise ValueError(explain(f"method `{name}`", f"one of {known}", "Correct `--methods`; `rwalk list` explains them."))
    return key, ruled.get(key, key)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _list(console: Console) -> None:
    """Print what the other commands know."""
    console.print("Streams (STREAM is a kind, a hyphen, and a data set):", style="bold")
    _entries(console, {kind: function.__doc__ for kind, function in STREAMS.items()})
    console.print("\nData sets:", style="bold")
    _entries(console, {"digits": "Comes with scikit-learn.", "FOLDER": "Parquet files in the Hugging Face schema.",
                       ", ".join(HUB): "A folder of that name below --data or RWALK_DATA, else a download."})  # fmt: skip
    console.print("\nModels:", style="bold")
    _entries(console, {name: build.__doc__ for name, build in models.MODELS.items()})
    console.print("\nMethods:", style="bold")
    recipe = "The recommended recipe, `Consolidator(model)`: summed Fisher information, proximal pull, tail averaging."
    docs = {name: kind.__doc__ for name, kind in {**LEARNERS, **RULES}.items()}
    _entries(console, docs | {"recipe": recipe})


def _entries(console: Console, entries: dict[str, str | None]) -> None:
    for name, text in entries.items():
        console.print(f"  [bold]{name}[/bold]  {(text or '').strip().splitlines()[0]}", highlight=False)


def _report(folder: Path, console: Console) -> None:
    """Print the tables of a folder, and name files that are no records."""
    records, problems = read(folder)
    for problem in problems:
        print(f"rwalk: {problem}", file=sys.stderr)
    if records:
        show(summarise(records), console)


def _plan(command: Plan, console: Console) -> None:
    """Print what a setup costs, or a table over sizes."""
    if command.model is None and not command.table:
        raise ValueError(explain("no model", "a size such as 7b, `package.module:factory`, or `--table`", "Pass one of them."))

    def setup(model: str) -> plan.Setup:
        return plan.Setup(
            plan.weights(model, 2 if command.dtype == "bfloat16" else 4),
            command.rule,
            command.optimizer,
            command.tokens,
            command.devices,
            command.sharded,
            command.state_dtype is not None,
            command.state_device is not None,
            command.backend,
        )

    one = setup(command.model or costs.SIZES[0])
    machine = _machine(command)
    if command.table:
        costs.sizes(setup, machine, console)
    else:
        costs.costs(one, machine, console)


def _machine(command: Plan) -> plan.Machine:
    """Return a preset, or measure this machine, with what the user knows better."""
    known = (command.bandwidth, command.compute, command.utilisation)
    if command.machine != "here":
        return plan.machine(command.machine, *known)
    plan.check_figures(*known)
    from rwalk import calibrate

    try:
        measured = calibrate.here(command.tokens, command.rule, command.optimizer, command.backend)
    except ImportError as error:
        raise ValueError(str(error)) from None
    return plan.adjusted(measured, *known)
