"""The runs of a command: which there are, and how each is done, here or by a worker that is sent the command's words."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from rwalk import kernels
from rwalk._errors import explain
from rwalk.bench import models, ranks, tuning
from rwalk.bench.comparators import Rehearsal
from rwalk.bench.data import load
from rwalk.bench.experience import Experience, make, parse
from rwalk.bench.grid import Failure, once, outcomes
from rwalk.bench.learners import Training
from rwalk.bench.record import Record
from rwalk.bench.runner import LEARNERS, record_name, refuse
from rwalk.bench.trackers import tracker
from rwalk.commands import RULES, Run, Tune, parsed
from rwalk.importance.base import Importance


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
        name = record_name(stream, method, job.strength, job.seed, self._training(job), **self.options(job.method))
        return self.command.out / name

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
        return outcomes(there, sent, command.workers, address)

    def _here(self, _: None, job: Job, progress: Progress) -> tuple[Record, bool]:
        return self.one(job, progress)


_one_at_a_time = threading.Lock()
_remembered = lru_cache(maxsize=1)(load)


def there(_: None, words: list[str], places: dict[str, Any], job: Job) -> tuple[Record, bool]:
    """Do one run in a worker, which loads the data once; its threads take turns, as torch has one random state for them."""
    with _one_at_a_time:
        return Runs(replace(parsed(words), **places), words, _remembered).one(job)


def _replay(command: Run, name: str) -> Rehearsal | None:
    """Return what a method keeps: replay and agem always, rules and the recipe if the command says how much."""
    rules_too = command.replay is not None and name not in LEARNERS
    size = 200 if command.replay is None else command.replay
    rehearsal = Rehearsal(size, command.per, command.select, command.replay_batch)
    return rehearsal if rules_too or name in ("replay", "agem") else None


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


def _result(record: Record | None, there: bool) -> str:
    if record is None:
        return "failed; the cause comes at the end"
    bits = "" if record.final_bits is None else f", {record.final_bits:.3f} bits per character"
    when = "(on disk)" if there else f"in {record.timings['train_seconds']:.1f} s"
    return f"average accuracy {record.average_accuracy:.2%}{bits} {when}"
