"""The run command: describes the runs of a command line, does those without a record, and prints a table of all."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from rwalk import kernels, report
from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.builtin import parse, takes
from rwalk.bench.optimisation import Training
from rwalk.bench.pool import Failure, outcomes
from rwalk.bench.record import Record
from rwalk.bench.spec import RunSpec
from rwalk.bench.stream_spec import StreamSpec, forget_data
from rwalk.bench.tuned import Tuned, tuned_name
from rwalk.cli.checks import TUNED, check, method_names, numbers, rehearsal, rule, strength_text
from rwalk.cli.groups import (
    RULES,
    FieldOptions,
    MachineOptions,
    MethodOptions,
    OutputOptions,
    ReplayOptions,
    StreamOptions,
    TrainingOptions,
)
from rwalk.cli.progress import Display
from rwalk.cli.report import LivePage, show_page
from rwalk.report.metric import score_in_words
from rwalk.report.plain import complain, print_plain


@dataclass(frozen=True)
class Run:
    """Train methods on a stream of tasks, write one record per run, and print a table.

    Started again with the same arguments, it continues after the last finished task of the first run that has no record yet.

    The first of these lines needs no data of your own, the second a data set below --data or RWALK_DATA:
      rwalk run permuted-digits --methods finetune,default,joint --tasks 3 --open
      rwalk run split-mnist --methods replay,rwalk --rwalk.strength 10 --optimizer adam --lr 0.001 --out runs/mnist
    """

    stream: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STREAM", help_behavior_hint="(required)")] = ""
    """A kind (split, domain, drift, permuted or rotated), a hyphen, and a data set: digits, a name as mnist, or a folder."""
    source: Annotated[StreamOptions, tyro.conf.arg(name="stream")] = field(default_factory=StreamOptions)
    methods: Annotated[MethodOptions, tyro.conf.arg(name="method")] = field(default_factory=MethodOptions)
    training: Annotated[TrainingOptions, tyro.conf.arg(name="training")] = field(default_factory=TrainingOptions)
    replay: Annotated[ReplayOptions, tyro.conf.arg(name="replay")] = field(default_factory=ReplayOptions)
    machine: Annotated[MachineOptions, tyro.conf.arg(name="machine")] = field(default_factory=MachineOptions)
    output: Annotated[OutputOptions, tyro.conf.arg(name="output")] = field(default_factory=OutputOptions)
    fields: Annotated[FieldOptions, tyro.conf.arg(name="")] = field(default_factory=FieldOptions)

    def do(self, words: Sequence[str], console: Console) -> int:
        """Do the runs that have no record yet, print the table of all of them and what failed, and return the status."""
        runs, out = describe(self, words), self.output.out
        make_folder(out)
        page = LivePage(out)
        try:
            results = dict(done(self, runs, console, page))
        except BaseException:
            page.close()
            raise
        records = [result for result in results.values() if isinstance(result, Record)]
        failures = {spec: result for spec, result in results.items() if isinstance(result, Failure)}
        try:
            place = report.write(out) if records else None
        finally:
            if records:
                report.show(report.summarise(records), console)
                print_plain(console, f"Records: {out}")
            complain_of(failures, runs)
        if place is not None:
            show_page(place, self.output.open, console)
        return 0 if not failures else 2 if all(failure.known for failure in failures.values()) else 1


def describe(command: Run, words: Sequence[str] = ()) -> list[RunSpec]:
    """Return the runs of a command, each once, or refuse those that cannot be done before anything is written."""
    check(command)
    prepare(command)
    first, runs = command.machine.first_seed, dict[str, RunSpec]()
    for seed in range(first, first + command.machine.seeds):
        for method in method_names(command):
            spec = spec_of(command, words, method, seed)
            if seed == first:
                spec.check()
            if not runs:
                spec.check_model()
            for value in strengths(command, method) or [tuned_strength(command, spec)]:
                run = spec if value is None else replace(spec, strength=value)
                runs.setdefault(run.name, run)
    return list(runs.values())


def prepare(command: Run) -> None:
    """Set up this process for the runs of a command."""
    torch.set_num_threads(command.machine.threads)
    kernels.use(command.machine.kernels)
    forget_data()


def make_folder(out: Path) -> None:
    """Make the folder of the records, and remove what writers that were killed left there."""
    files.folder(out)
    files.sweep(out)


def spec_of(command: Run, words: Sequence[str], name: str, seed: int, tuning: tuple[int, float] | None = None) -> RunSpec:
    """Return the run of a method with a seed, at the method's default strength."""
    source, machine, (kind, data) = command.source, command.machine, parse(command.stream)
    root = source.data and source.data.resolve()
    options = {name: value for name, value in vars(source).items() if name != "data"}
    stream = StreamSpec(kind, data, root, seed=seed if takes(kind, "seed") else 0, tuning=tuning, **options)
    return RunSpec(
        stream, rule(command, name) if name in RULES else name, None, seed, Training(**vars(command.training)),
        command.methods.pull, command.methods.average, rehearsal(command, name),
        machine.device, machine.threads, machine.kernels, shlex.join(["rwalk", *words]) if words else "",
    )  # fmt: skip


def strengths(command: Run, name: str) -> list[float] | list[None]:
    """Return the strengths that a method is to run with: None is its default, and none at all are those that were tuned."""
    text = strength_text(command, name)
    return [None] if text is None else [] if text == TUNED else numbers("--strength", text)


def tuned_strength(command: Run, spec: RunSpec) -> float | None:
    """Return the strength that was tuned for a run; None for methods without one."""
    if "strength" not in spec.configuration:
        return None
    name = spec.tasks[0].stream["name"]
    path = command.output.out / tuned_name(name, spec.method_name, spec.configuration)
    if not path.exists():
        text = f"`{command.output.out}` has no tuned strength for `{spec.method_name}` on {name} with these settings"
        raise ValueError(printable(f"{text}; run `rwalk tune` with them, or pass a number."))
    tuned = Tuned.load(path, exact=True)
    if tuned.lr != spec.training.lr:
        raise ValueError(f"The strength was tuned with --lr {tuned.lr:g}, not {spec.training.lr:g}; pass that, or tune again.")
    return tuned.strength


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
    names, out, machine = labels(runs), command.output.out, command.machine
    display, warned = Display(console, names, out, page.look), dict[str, str]()
    with display.progress:
        found = outcomes(runs, out.resolve(), machine.workers, machine.address, log=command.output.log, watcher=display)
        for spec, (result, existed, warnings) in found:
            display.end(spec)
            _pass_on(warnings, names[spec], warned)
            if isinstance(result, Record) and not (out / spec.name).exists():  # of a worker without our folder
                result.save(out)
            print_plain(console, f"{names[spec]}: {_in_words(result, existed)}")
            page.changed()
            yield spec, result


def _pass_on(warnings: Sequence[str], name: str, warned: dict[str, str]) -> None:
    """Print the warnings of a run with its name; a text that another run has brought already, in short."""
    for text in warnings:
        complain(f"warning from {name}: {f'the same as from {warned[text]}' if text in warned else text}")
        warned.setdefault(text, name)


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
