"""The runs of a command: which there are, and how each is done, here or by a worker that is sent the command's words."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from rwalk import kernels
from rwalk._errors import explain
from rwalk.bench import models, ranks, tuning
from rwalk.bench.comparators import Rehearsal
from rwalk.bench.data import load
from rwalk.bench.experience import Experience, make, parse
from rwalk.bench.grid import Failure, once, outcomes
from rwalk.bench.learners import Training, refuse_single
from rwalk.bench.record import Record
from rwalk.bench.runner import LEARNERS, record_name, refuse
from rwalk.bench.trackers import accuracies, tracker
from rwalk.bench.underway import measured
from rwalk.commands import RULES, Run, Tune, parsed
from rwalk.importance.base import Importance
from rwalk.progress import Display


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
        training = self.command.training
        refuse_single(models.build(training.model, first[0], training.hidden), first, training)
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

    def one(self, job: Job, display: Display | None = None) -> tuple[Record, bool]:
        """Return the record of one run, and whether it was on disk already."""
        stream, method, place = self.stream(job.seed), self.methods[job.method], self.place(job)
        options = self.options(job.method)
        with tracker(self.command.log, place.with_suffix("")) as track:
            if display is not None:
                display.begin(place, measured(place.with_suffix(".checkpoint")))
                options["tick"] = display.tick(place)

            def both(scalars: dict[str, float], tasks: int) -> None:
                track(scalars, tasks)
                if display is not None:
                    display.learned(place, accuracies(scalars, tasks))

            options |= {"track": both, "device": self.command.device}
            return once(place, stream, method, job.strength, job.seed, self._training(job), **options)

    def _training(self, job: Job) -> Training:
        return replace(self.command.training, lr=job.lr)

    def outcomes(self, jobs: Mapping[Path, Job], display: Display) -> Iterator[tuple[Path, Record | Failure]]:
        """Do runs, show each one's end, and yield its place with its record or why there is none."""
        left = {place: job for place, job in jobs.items() if not place.exists()}
        with display.expecting({place: (job.label(jobs), self._steps(job)) for place, job in left.items()}):
            for place, outcome in self._outcomes(jobs, display):
                display.end(place)
                record, there = (None, False) if isinstance(outcome, Failure) else outcome
                if record is not None and not place.exists() and ranks.number() == 0:  # of a worker without our folder
                    record.save(place.parent)
                display.say(f"{jobs[place].label(jobs)}: {_result(record, there)}")
                yield place, record or outcome

    def _outcomes(self, jobs: Mapping[Path, Job], display: Display) -> Iterator[tuple[Path, Any]]:
        command = self.command
        address = command.address if command.backend == "dask" else None
        if command.workers == 1 and address is None:
            yield from outcomes(self._here, {place: (job, display) for place, job in jobs.items()})
            return
        places = {"out": command.out.resolve(), "data": command.data and command.data.resolve()}
        sent = {place: (self.words, places, job) for place, job in jobs.items()}
        with display.following({place: place.with_suffix(".checkpoint") for place in jobs}):
            yield from outcomes(there, sent, command.workers, address)

    def _here(self, _: None, job: Job, display: Display) -> tuple[Record, bool]:
        return self.one(job, display)

    def _steps(self, job: Job) -> list[int]:
        """Count the steps of each task; joint and cumulative training see all earlier data again at each."""
        sizes, training = [len(e.train) for e in self.stream(job.seed)], self.command.training
        seen = list(accumulate(sizes)) if job.method in ("joint", "cumulative") else sizes
        return [-(-size // training.batch_size) * training.epochs for size in seen]


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
    accuracy = "unknown" if record.average_accuracy is None else f"{record.average_accuracy:.2%}"
    bits = "" if record.final_bits is None else f", {record.final_bits:.3f} bits per character"
    when = "(on disk)" if there else f"in {record.timings['train_seconds']:.1f} s"
    return f"average accuracy {accuracy}{bits} {when}"
