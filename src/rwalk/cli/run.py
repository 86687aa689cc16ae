"""The run command: describes the runs of a command line, does those without a record, and prints a table of all."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from rwalk import kernels, report
from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench import devices
from rwalk.bench.baselines import BASELINES, RECIPES, Rehearsal
from rwalk.bench.builtin import parse
from rwalk.bench.pool import Failure, outcomes
from rwalk.bench.record import Record
from rwalk.bench.spec import RunSpec, StreamSpec, forget_data
from rwalk.bench.streams import Scenario
from rwalk.bench.trackers import tracker
from rwalk.bench.training import Training
from rwalk.bench.tuned import Tuned, tuned_name
from rwalk.cli.progress import Display
from rwalk.cli.report import LivePage, show_page
from rwalk.consolidation.settings import Average, Pull, check_strength
from rwalk.replay.buffer import Per
from rwalk.report.metric import score_in_words
from rwalk.report.plain import complain, print_plain
from rwalk.rules import rules
from rwalk.rules.base import Rule

RULES = rules()
LIMITS = {"seeds": range(1, 10_001), "threads": range(1, 1025), "workers": range(1, 1025), "first_seed": range(2**62)}
"""Whole numbers that torch or the machine would choke on if they were larger."""


def _unchecked(kind: type[Rule[Any]]) -> Any:
    """Return a dataclass of a rule's fields without their check, which the parser would report in words of its own."""
    return make_dataclass(kind.__name__, [(f.name, f.type, f) for f in fields(kind)], namespace={"__doc__": kind.__doc__})


KINDS = {name: _unchecked(kind) for name, kind in RULES.items()}
RuleFields: Any = make_dataclass("RuleFields", [(name, kind, field(default_factory=kind)) for name, kind in KINDS.items()])


@dataclass(frozen=True)
class Run:
    """Train methods on a stream of tasks, write one record per run, and print a table.

    Started again with the same arguments, it continues after the last finished task of the first run that has no record yet.
    """

    stream: tyro.conf.Positional[str]
    """Kind and data set: split-, domain-, drift-, permuted- or rotated-, then digits, a name such as mnist, or a folder of
    parquet files."""
    methods: str = "finetune,rwalk"
    """Comma-separated: finetune, joint, cumulative, replay, agem, lwf, default, recipe, and rules (see `rwalk list`)."""
    seeds: int = 3
    """Number of seeds; each one sets initial weights, batch order and permutations."""
    first_seed: int = 0
    """The first seed."""
    strength: str | None = None
    """Factor of the penalty, several ones with commas between, or tuned: what `rwalk tune` has found with the same settings;
    default: 1 for rules and lwf, 0.1 for default, recipe and kronecker."""
    pull: Pull | None = None
    """How rules pull: by the penalty's gradient, or by a proximal step; default: as in their papers, or proximal."""
    average: Average | None = None
    """Whether rules end a task at the average of its later iterates; default: none; default, recipe and kronecker: tail."""
    replay: int | None = None
    """Examples of earlier tasks that replay and agem keep; default: 200. If given, rules and default replay them, too."""
    per: Per = "total"
    """Whether all classes share that number, or each one has it."""
    select: Literal["uniform", "plane", "entropy", "herding", "reservoir"] = "uniform"
    """Which examples are kept."""
    replay_batch: int | None = None
    """How many of them join each step; default: as many as the batch has."""
    out: Path = Path("runs")
    """Folder for the records and the report."""
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
    target: str | None = None
    """Column of numbers that are to be met in place of labels, a regression, for domain and drift streams; scores are R²."""
    limit: int | None = None
    """Examples of each task to keep for training and as many for testing, at random, for quick tries; default: all."""
    by: str | None = None
    """For domain streams: the column whose values are the tasks, or folder, if each is a folder in the data set's; default:
    domain."""
    log: Literal["tensorboard"] | None = None
    """Also write each task's figures for TensorBoard, into a folder beside each record; tensorboard --logdir OUT shows them."""
    kernels: Literal["auto", "blocked", "numba", "triton", "reference"] = "auto"
    """How the arithmetic is done: see `rwalk.kernels.use`; results agree to rounding."""
    device: str = "cpu"
    """Where models are trained: cpu, cuda, or one GPU such as cuda:1."""
    threads: int = 1
    """CPU threads of a run; small networks are fastest with one, and equal results need equal numbers."""
    skip: int = 0
    """Leave out the first tasks of the stream: those that a strength was tuned on."""
    workers: int = 1
    """Processes of this machine that do runs side by side."""
    backend: Literal["processes", "dask"] = "processes"
    """Where runs are done: in processes of this machine, or on a Dask cluster, whose workers load the data themselves."""
    address: str | None = None
    """Address of the Dask scheduler, such as tcp://host:8786."""
    training: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)
    rules: Annotated[RuleFields, tyro.conf.arg(name="")] = field(default_factory=RuleFields)

    def do(self, words: Sequence[str], console: Console) -> int:
        """Do the runs that have no record yet, print the table of all of them and what failed, and return the status."""
        runs = describe(self, words)
        make_folder(self.out)
        page = LivePage(self.out)
        try:
            results = dict(done(self, runs, console, page))
        except BaseException:
            page.close()
            raise
        records = [result for result in results.values() if isinstance(result, Record)]
        failures = {spec: result for spec, result in results.items() if isinstance(result, Failure)}
        try:
            place = report.write(self.out) if records else None
        finally:
            if records:
                report.show(report.summarise(records), console)
                print_plain(console, f"Records: {self.out}")
            complain_of(failures, runs)
        if place is not None:
            show_page(place, self.open, console)
        return 0 if not failures else 2 if all(failure.known for failure in failures.values()) else 1


def describe(command: Run, words: Sequence[str] = ()) -> list[RunSpec]:
    """Return the runs of a command, each once, or refuse those that cannot be done before anything is written."""
    check(command)
    strengths: list[float | None] = [*numbers("--strength", command.strength)] if command.strength != "tuned" else []
    for strength in strengths:
        check_strength(strength or 0.0)
    prepare(command)
    runs: dict[str, RunSpec] = {}
    for seed in range(command.first_seed, command.first_seed + command.seeds):
        for method in method_names(command):
            spec = spec_of(command, words, method, seed)
            if seed == command.first_seed:
                spec.check()
            if not runs:
                spec.check_model()
            values = strengths or ([None] if command.strength is None else [tuned_strength(command, spec)])
            for run in (spec if value is None else replace(spec, strength=value) for value in values):
                runs.setdefault(run.name, run)
    return list(runs.values())


def check(command: Run) -> None:
    """Refuse options that do not fit together, before anything is loaded."""
    devices.chosen(command.device)
    for option, allowed in LIMITS.items():
        if (value := getattr(command, option)) not in allowed:
            raise ValueError(f"--{option.replace('_', '-')} {value} is out of range; pass {allowed[0]} to {allowed[-1]}.")
    if (command.backend == "dask") != (command.address is not None):
        raise ValueError("--backend dask and --address belong together; pass both or neither.")
    kind, _ = parse(command.stream)
    if command.by and kind != "domain":
        raise ValueError(f"--by {printable(command.by, '')} is for domain streams, not for {kind}; leave it out.")
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(printable(f"`--out {command.out}` is a file; name a folder."))
    _rehearsal(command, "replay")
    method_names(command)
    for name, rule in RULES.items():  # of rules that are not run, too
        rule(**vars(getattr(command.rules, name)))
    with tracker(command.log, command.out):
        pass  # raises an error now if its package is missing


def prepare(command: Run) -> None:
    """Set up this process for the runs of a command."""
    torch.set_num_threads(command.threads)
    kernels.use(command.kernels)
    forget_data()


def make_folder(out: Path) -> None:
    """Make the folder of the records, and remove what writers that were killed left there."""
    files.folder(out)
    files.sweep(out)


def method_names(command: Run) -> list[str]:
    """Return the methods of a command, each once."""
    names = [name.strip().replace("-", "_").lower() for name in command.methods.split(",")]
    for name in names:
        if name not in {*BASELINES, *RECIPES, *RULES}:
            known = ", ".join([*BASELINES, *RECIPES, *RULES])
            raise ValueError(f"There is no method `{printable(name, '')}`; pass some of {known}. `rwalk list` explains them.")
    return list(dict.fromkeys(names))


def spec_of(command: Run, words: Sequence[str], name: str, seed: int, tuning: tuple[int, float] | None = None) -> RunSpec:
    """Return the run of a method with a seed, at the method's default strength."""
    kind, data = parse(command.stream)
    root = command.data and command.data.resolve()
    permutation = seed if kind == "permuted" else 0
    stream = StreamSpec(
        kind,
        data,
        root,
        command.label,
        command.by,
        permutation,
        command.scenario,
        command.tasks,
        command.skip,
        tuning,
        command.target,
        command.limit,
    )
    method = RULES[name](**vars(getattr(command.rules, name))) if name in RULES else name
    return RunSpec(
        stream, method, None, seed, command.training, command.pull, command.average, _rehearsal(command, name),
        command.device, command.threads, command.kernels, shlex.join(["rwalk", *words]) if words else "",
    )  # fmt: skip


def _rehearsal(command: Run, name: str) -> Rehearsal | None:
    """Return what a method keeps: replay and agem always, rules, default and recipe if the command asks for it."""
    if name not in ("replay", "agem") and (command.replay is None or name in BASELINES):
        return None
    return Rehearsal(200 if command.replay is None else command.replay, command.per, command.select, command.replay_batch)


def tuned_strength(command: Run, spec: RunSpec) -> float | None:
    """Return the strength that was tuned for a run; None for methods without one."""
    if "strength" not in spec.configuration:
        return None
    name = spec.tasks[0].stream["name"]
    path = command.out / tuned_name(name, spec.method_name, spec.configuration)
    if not path.exists():
        text = f"`{command.out}` has no tuned strength for `{spec.method_name}` on {name} with these settings"
        raise ValueError(printable(f"{text}; run `rwalk tune` with them, or pass a number."))
    tuned = Tuned.load(path, exact=True)
    if tuned.lr != spec.training.lr:
        raise ValueError(f"The strength was tuned with --lr {tuned.lr:g}, not {spec.training.lr:g}; pass that, or tune again.")
    return tuned.strength


def numbers(option: str, text: str | None) -> list[float]:
    """Return the numbers that an option gives."""
    try:
        return [] if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {printable(str(text), '')} is no list of numbers with commas between.") from None


def labels(runs: Sequence[RunSpec]) -> dict[RunSpec, str]:
    """Name each run, with what tells it apart from the others."""
    rates = {run.training.lr for run in runs}
    strengths: dict[str, set[float | None]] = {}
    for run in runs:
        strengths.setdefault(run.base_name, set()).add(run.strength)
    found = {}
    for run in runs:
        words = [run.base_name] + ([f"strength {run.strength:g}"] if len(strengths[run.base_name]) > 1 else [])
        found[run] = " ".join(words + ([f"lr {run.training.lr:g}"] if len(rates) > 1 else []) + [f"seed {run.seed}"])
    return found


def done(command: Run, runs: Sequence[RunSpec], console: Console, page: LivePage) -> Iterator[tuple[RunSpec, Record | Failure]]:
    """Do runs, print a line at the end of each, and yield each with its record, or why it has none."""
    names = labels(runs)
    display = Display(console, names, command.out, page.look)
    with display.progress:
        found = outcomes(runs, command.out.resolve(), command.workers, command.address, log=command.log, watcher=display)
        for spec, (result, existed) in found:
            display.end(spec)
            if isinstance(result, Record) and not (command.out / spec.name).exists():  # of a worker without our folder
                result.save(command.out)
            print_plain(console, f"{names[spec]}: {_in_words(result, existed)}")
            page.changed()
            yield spec, result


def _in_words(result: Record | Failure, existed: bool) -> str:
    if isinstance(result, Failure):
        return "failed; the cause comes at the end"
    score = "unknown" if result.average is None else score_in_words(result.average, result.metric, 2)
    bits = "" if result.final_bits is None else f", {result.final_bits:.3f} bits per character"
    when = "(on disk)" if existed else f"in {result.timings['train_seconds']:.1f} s"
    return f"average {result.metric} {score}{bits} {when}"


def complain_of(failures: dict[RunSpec, Failure], runs: Sequence[RunSpec]) -> None:
    """Print why runs failed, each cause once."""
    names, causes = labels(runs), dict[str, list[str]]()
    for spec, failure in failures.items():
        causes.setdefault(failure.cause, []).append(names[spec])
    for cause, failed in causes.items():
        complain(f"{cause}\n  failed: {', '.join(failed)}")
