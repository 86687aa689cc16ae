"""The command line: `rwalk run`, `rwalk tune`, `rwalk list`, `rwalk report` and `rwalk plan`."""

import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import lru_cache, partial
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
from rwalk.bench import models, ranks, tuning
from rwalk.bench.comparators import Rehearsal
from rwalk.bench.data import HUB, load
from rwalk.bench.experience import STREAMS, Experience, Scenario, make, parse
from rwalk.bench.grid import Failure, once, outcomes
from rwalk.bench.learners import Training
from rwalk.bench.record import Record, file_name
from rwalk.bench.runner import LEARNERS, called, configuration, refuse
from rwalk.bench.trackers import tracker
from rwalk.consolidator import Average, Pull, resolve
from rwalk.importance import rules
from rwalk.importance.base import Importance
from rwalk.replay.buffer import Per
from rwalk.report import costs, read, show, summarise, tuned

RULES = rules()


def _fields(kind: type[Importance[Any]]) -> Any:
    """Return a dataclass of a rule's fields without their check, which the parser would report in words of its own."""
    return make_dataclass(kind.__name__, [(f.name, f.type, f) for f in fields(kind)], namespace={"__doc__": kind.__doc__})


FIELDS = {name: _fields(kind) for name, kind in RULES.items()}
RuleFields: Any = make_dataclass("RuleFields", [(name, kind, field(default_factory=kind)) for name, kind in FIELDS.items()])


LIMITS = {"seeds": range(1, 10_001), "threads": range(1, 1025), "workers": range(1, 1025), "first_seed": range(2**62)}
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
    strength: str | None = None
    """Factor of the penalty, several ones with commas between, or tuned: what `rwalk tune` has found with the same settings;
    default: 1 for rules and lwf, 0.005 for the recipe, 0.0015 for kronecker."""
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
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a mistake of ours, 2 for a user's, 130 after Ctrl-C."""
    console = Console()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parsed(words)
        if isinstance(command, Run):
            with ranks.launched():
                console.quiet = ranks.number() > 0
                return _tune(command, words, console) if isinstance(command, Tune) else _run(command, words, console)
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


def _parsed(words: list[str]) -> Any:
    return tyro.cli(COMMANDS, prog="rwalk", description=__doc__, args=words)


@dataclass(frozen=True)
class Job:
    """One run of a command: what its runs differ in."""

    method: str
    strength: float | None
    seed: int
    lr: float

    def label(self, jobs: Mapping[Any, "Job"]) -> str:
        """Name the run, with what tells it apart from the others."""
        strengths = {job.strength for job in jobs.values() if job.method == self.method}
        rates = {job.lr for job in jobs.values()}
        words = [self.method] + ([f"strength {self.strength:g}"] if len(strengths) > 1 else [])
        return " ".join(words + ([f"lr {self.lr:g}"] if len(rates) > 1 else []) + [f"seed {self.seed}"])


class Runs:
    """The runs of a command on its streams, done here or by workers that are sent the command's words.

    Args:
        command: what was parsed from the words, with absolute places.
        words: the command line.
        load: the function that loads a data set; a worker's remembers what it loaded.
    """

    def __init__(self, command: Run, words: list[str], load: Callable[..., Any] = load) -> None:
        torch.set_num_threads(command.threads)
        kernels.use(command.kernels)
        self.command, self.words = command, words
        ruled = {name: kind(**vars(getattr(command.rules, name))) for name, kind in RULES.items()}
        self.methods = dict(_method(name.strip(), ruled) for name in command.methods.split(","))
        self.kind, name = parse(command.stream)
        if command.by and self.kind != "domain":
            came = f"`--by {command.by}` for a {self.kind} stream"
            raise ValueError(explain(came, "a domain stream", "Leave `--by` out."))
        self.by = {"by": command.by or "domain"} if self.kind == "domain" else {}
        self.data = load(name, command.data, command.label, **self.by)
        self._streams: dict[int, list[Experience]] = {}

    @property
    def seeds(self) -> range:
        """The seeds of the command."""
        return range(self.command.first_seed, self.command.first_seed + self.command.seeds)

    def stream(self, seed: int) -> list[Experience]:
        """Return the tasks of a seed: those that come after tuning, or those to tune on."""
        command = self.command
        if seed not in self._streams:
            whole = make(self.kind, self.data, seed, command.scenario, tasks=command.tasks, **self.by)
            early = isinstance(command, Tune) and tuning.early(whole, command.tune_tasks, command.validation)
            self._streams[seed] = early or tuning.later(whole, command.skip)
        return self._streams[seed]

    def refuse(self) -> None:
        """Refuse a model or a method that does not fit the stream, before anything is written."""
        first = self.stream(self.seeds[0])
        models.build(self.command.training.model, first[0], self.command.training.hidden)
        _replay(self.command, "replay")  # says what is wrong with its settings, even where nobody replays
        for name, method in self.methods.items():
            refuse(first, method)
            if (rehearsal := _replay(self.command, name)) is not None:
                rehearsal.check(first)

    def options(self, name: str) -> dict[str, Any]:
        """Return what `rwalk.bench.run` takes for a method beside strength, seed and training."""
        return {"pull": self.command.pull, "average": self.command.average, "replay": _replay(self.command, name)}

    def place(self, job: Job) -> Path:
        """Return the file of a run's record; runs with the same settings have the same."""
        stream, method = self.stream(job.seed), self.methods[job.method]
        options = self.options(job.method)
        config = configuration(stream, method, job.strength, self._training(job), **options)
        name = called(method, options["replay"])
        return self.command.out / file_name(stream[0].stream["name"], name, job.seed, config)

    def one(self, job: Job, progress: Progress | None = None) -> tuple[Record, bool]:
        """Return the record of one run, and whether it was on disk already."""
        stream, method, training, place = self.stream(job.seed), self.methods[job.method], self._training(job), self.place(job)
        tick: Callable[[], None] = lambda: None  # noqa: E731
        if progress is not None:
            bar = progress.add_task(f"{job.method} seed {job.seed}", total=_steps(stream, job.method, training))
            tick = lambda: progress.advance(bar)  # noqa: E731
        try:
            with tracker(self.command.log, place.with_suffix("")) as track:
                options = self.options(job.method) | {"tick": tick, "track": track}
                return once(place, stream, method, job.strength, job.seed, training, **options)
        finally:
            if progress is not None:
                progress.remove_task(bar)

    def _training(self, job: Job) -> Training:
        return replace(self.command.training, lr=job.lr)

    def outcomes(self, jobs: Mapping[Path, Job], progress: Progress) -> Iterator[tuple[Path, Record | Failure]]:
        """Do runs, show each one's end, and yield its place with its record or why there is none."""
        overall = progress.add_task("all runs", total=len(jobs))
        for place, outcome in self._outcomes(jobs, progress):
            progress.advance(overall)
            record, there = (None, False) if isinstance(outcome, Failure) else outcome
            if record is not None and not place.exists() and ranks.number() == 0:  # of a worker without our folder
                record.save(place.parent)
            progress.console.print(f"{jobs[place].label(jobs)}: {_result(record, there)}", highlight=False)
            yield place, record or outcome

    def _outcomes(self, jobs: Mapping[Path, Job], progress: Progress) -> Iterator[tuple[Path, Any]]:
        command = self.command
        address = command.address if command.backend == "dask" else None
        if command.workers == 1 and address is None:
            return outcomes(self._here, {place: (job, progress) for place, job in jobs.items()})
        places = {"out": command.out.resolve(), "data": command.data and command.data.resolve()}
        sent = {place: (self.words, places, job) for place, job in jobs.items()}
        return outcomes(_there, sent, command.workers, address)

    def _here(self, _: None, job: Job, progress: Progress) -> tuple[Record, bool]:
        return self.one(job, progress)


_one_at_a_time = threading.Lock()
_remembered = lru_cache(maxsize=1)(load)


def _there(_: None, words: list[str], places: dict[str, Any], job: Job) -> tuple[Record, bool]:
    """Do one run in a worker, which loads the data once; its threads take turns, as torch has one random state for them."""
    with _one_at_a_time:
        return Runs(replace(_parsed(words), **places), words, _remembered).one(job)


def _check(command: Run) -> None:
    """Refuse what does not fit together, before anything is loaded."""
    for option, allowed in LIMITS.items():
        if getattr(command, option) not in allowed:
            came = f"--{option.replace('_', '-')} {getattr(command, option)}"
            raise ValueError(explain(came, f"{allowed[0]} to {allowed[-1]}", "Pass such a number."))
    if (command.backend == "dask") != (command.address is not None):
        came = f"--backend {command.backend} with{'' if command.address else 'out'} --address"
        raise ValueError(explain(came, "--backend dask with the address of its scheduler", "Pass both or neither."))
    if ranks.size() > 1 and (command.workers > 1 or command.address):
        came = "several workers under torchrun"
        raise ValueError(explain(came, "either", "Start `rwalk` by itself, or leave the workers out."))
    with tracker(command.log, command.out):
        pass  # says now if its package is missing


def _folder(command: Run) -> None:
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(explain(f"`--out {command.out}`, which is a file", "a folder", "Name another folder."))
    command.out.mkdir(parents=True, exist_ok=True)
    files.sweep(command.out)


def _run(command: Run, words: list[str], console: Console) -> int:
    """Do the runs that have no record yet, then print the table of all of them, and what has failed."""
    _check(command)
    _strengths(command.strength)
    runs = Runs(command, words)
    runs.refuse()
    jobs: dict[Path, Job] = {}
    for seed in runs.seeds:
        for name in runs.methods:
            for strength in _resolved(runs, name, seed):
                job = Job(name, strength, seed, command.training.lr)
                jobs.setdefault(runs.place(job), job)
    _folder(command)
    with _progress(console) as progress:
        ended = dict(runs.outcomes(jobs, progress))
    done = [record for place in jobs if isinstance(record := ended[place], Record)]
    if done:
        show(summarise(done), console)
        console.print(f"Records: {command.out}", highlight=False)
    return _failures({jobs[place].label(jobs): why for place, why in ended.items() if isinstance(why, Failure)})


def _replay(command: Run, name: str) -> Rehearsal | None:
    """Return what a method keeps: replay and agem always, rules and the recipe if the command says how much."""
    rules_too = command.replay is not None and name not in LEARNERS
    size = 200 if command.replay is None else command.replay
    rehearsal = Rehearsal(size, command.per, command.select, command.replay_batch)
    return rehearsal if rules_too or name in ("replay", "agem") else None


def _resolved(runs: Runs, name: str, seed: int) -> Sequence[float | None]:
    """Return the strengths to run a method with."""
    command = runs.command
    if command.strength != "tuned":
        return _strengths(command.strength) or [None]
    stream, method = runs.stream(seed), runs.methods[name]
    if "strength" not in configuration(stream, method, None, command.training, **runs.options(name)):
        return [None]
    return [tuning.find(command.out, stream, method, command.training, **runs.options(name)).strength]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(explain(f"{option} {text}", "numbers with commas between", "Correct it.")) from None


def _strengths(text: str | None) -> list[float]:
    """Return the strengths that the command line gives, none for those that are found elsewhere."""
    values = [] if text in (None, "tuned") else _numbers("--strength", str(text))
    for value in values:
        resolve(None, value)
    return values


def _failures(failures: Mapping[str, Failure]) -> int:
    """Print why runs failed, each cause once, and return the exit status."""
    runs: dict[Failure, list[str]] = {}
    for label, failure in failures.items():
        runs.setdefault(failure, []).append(label)
    for failure, labels in runs.items():
        print(f"rwalk: {failure.cause}\n  failed: {', '.join(labels)}", file=sys.stderr)
    return 0 if not runs else 2 if all(failure.known for failure in runs) else 1


def _tune(command: Tune, words: list[str], console: Console) -> int:
    """Tune each method, print its trials and what to do with what was chosen, and keep it beside the records."""
    _check(command)
    if command.strength == "tuned" or command.skip:
        came = "--strength tuned" if command.strength == "tuned" else f"--skip {command.skip}"
        raise ValueError(explain(f"{came} for tuning itself", "strengths to try on the first tasks", "Leave it out."))
    strengths = _strengths(command.strength)
    rates = _numbers("--learning-rates", command.learning_rates) if command.learning_rates else None
    runs = Runs(replace(command, out=command.out / "tuning"), words)
    runs.refuse()
    searches = {
        name: tuning.Search(
            runs.stream(command.first_seed), method, strengths, rates, runs.seeds, command.training, command.refine,
            **runs.options(name),
        )
        for name, method in runs.methods.items()
    }  # fmt: skip
    _folder(runs.command)
    failures: dict[str, Failure] = {}
    for name, search in searches.items():
        with _progress(console) as progress:
            chosen = search.result(partial(_trials, runs, name, progress, failures))
        chosen.save(command.out)
        tuned.show(chosen, _command(command, words, chosen), console)
    _failures(failures)
    return 0 if all(failure.known for failure in failures.values()) else 1  # a strength that is too large may well fail


def _trials(
    runs: Runs, name: str, progress: Progress, failures: dict[str, Failure], candidates: Sequence[tuning.Candidate]
) -> Iterator[tuple[tuning.Candidate, Record | Failure]]:
    """Do the runs of some candidates, and gather what has failed."""
    jobs = {c: Job(name, c.strength, c.seed, c.lr) for c in candidates}
    places = {runs.place(job): candidate for candidate, job in jobs.items()}
    for place, outcome in runs.outcomes({place: jobs[candidate] for place, candidate in places.items()}, progress):
        if isinstance(outcome, Failure):
            failures[jobs[places[place]].label(jobs)] = outcome
        yield places[place], outcome


def _command(command: Tune, words: list[str], chosen: tuning.Tuned) -> str:
    """Return the command that runs what was chosen on the tasks that are left."""
    ours = {"--method", "--methods", "--strength", "--lr", "--learning-rates", "--tune-tasks", "--validation", "--refine",
            "--seeds", "--first-seed", "--workers", "--backend", "--address"}  # fmt: skip
    left, taken = [], iter(words[1:])
    for word in taken:
        flag = word.split("=")[0].replace("_", "-")
        if flag not in ours:
            left.append(word)
        elif "=" not in word:
            next(taken, None)
    values = ["--methods", chosen.method, "--strength", repr(chosen.strength), "--lr", repr(chosen.lr)]
    return shlex.join(["rwalk", "run", *left, *values, "--skip", str(command.tune_tasks)])


def _result(record: Record | None, there: bool) -> str:
    if record is None:
        return "failed; the cause comes at the end"
    bits = f", {fmean(record.bits[-1]):.3f} bits per character" if record.bits else ""
    when = "(on disk)" if there else f"in {record.timings['train_seconds']:.1f} s"
    return f"average accuracy {record.average_accuracy:.2%}{bits} {when}"


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
