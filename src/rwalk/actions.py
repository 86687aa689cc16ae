"""Does what a command says, and prints it: runs, tuning, lists and plans."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from rwalk import files, plan, reading, report
from rwalk._errors import explain
from rwalk.bench import devices, models, ranks, tuning
from rwalk.bench.data import HUB
from rwalk.bench.experience import STREAMS
from rwalk.bench.grid import Failure
from rwalk.bench.record import Record
from rwalk.bench.runner import LEARNERS, configuration
from rwalk.bench.trackers import tracker
from rwalk.bench.tuned import Tuned
from rwalk.commands import RULES, List, Plan, Run, Tune, parsed
from rwalk.consolidator import resolve
from rwalk.progress import Display
from rwalk.report import costs, tuned
from rwalk.report.plain import complain, say, shown
from rwalk.runs import Job, Runs

LIMITS = {"seeds": range(1, 10_001), "threads": range(1, 1025), "workers": range(1, 1025), "first_seed": range(2**62)}
"""Whole numbers that torch or the machine would choke on if they were larger."""


def do(words: list[str], console: Console) -> int:
    """Do the command that words say, and return the exit status: 0, 1 for a mistake of ours, 2 for a user's."""
    command = parsed(words)
    if isinstance(command, Run):
        devices.chosen(command.device)
        with ranks.launched(command.device):
            console.quiet = ranks.number() > 0
            return _tune(command, words, console) if isinstance(command, Tune) else _run(command, words, console)
    if isinstance(command, Plan):
        _plan(command, console)
    elif isinstance(command, List):
        _list(console)
    else:
        return reading.do(command, console)
    return 0


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
    files.folder(command.out)
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
    with Display(console) as display:
        ended = dict(runs.outcomes(jobs, display))
    done = [record for place in jobs if isinstance(record := ended[place], Record)]
    place = None
    try:
        if done and ranks.number() == 0:
            place = report.write(command.out)
    finally:
        if done:
            report.show(report.summarise(done), console)
            say(console, f"Records: {command.out}")
        status = _failures({jobs[key].label(jobs): why for key, why in ended.items() if isinstance(why, Failure)})
    if place is not None:
        reading.show_page(place, command.open, console)
    return status


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
        complain(f"{failure.cause}\n  failed: {', '.join(labels)}")
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
        with Display(console) as display:
            chosen = search.result(partial(_trials, runs, name, display, failures))
        chosen.save(command.out)
        tuned.show(chosen, _command(command, words, chosen), console)
    _failures(failures)
    return 0 if all(failure.known for failure in failures.values()) else 1  # a strength that is too large may well fail


def _trials(
    runs: Runs, name: str, display: Display, failures: dict[str, Failure], candidates: Sequence[tuning.Candidate]
) -> Iterator[tuple[tuning.Candidate, Record | Failure]]:
    """Do the runs of some candidates, and gather what has failed."""
    jobs = {c: Job(name, c.strength, c.seed, c.lr) for c in candidates}
    places = {runs.place(job): candidate for candidate, job in jobs.items()}
    for place, outcome in runs.outcomes({place: jobs[candidate] for place, candidate in places.items()}, display):
        if isinstance(outcome, Failure):
            failures[jobs[places[place]].label(jobs)] = outcome
        yield places[place], outcome


def _command(command: Tune, words: list[str], chosen: Tuned) -> str:
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
        about = (text or "").strip().splitlines()[0]
        console.print(shown(console, f"  {name}  ", "bold").append_text(shown(console, about, "not bold")))


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
