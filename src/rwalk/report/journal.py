"""A journal writes the record of a training loop of one's own, for reports and comparisons beside all others."""

import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwalk import __version__
from rwalk._errors import printable, warn
from rwalk._io import files
from rwalk.bench.record import ACCURACY, Record
from rwalk.report.names import listed

RECOMMENDED = {"kronecker": "default", "task_fisher": "recipe"}
"""What `rwalk run` calls rules with the fields that they have by themselves."""
_written: dict[Path, object] = {}
"""The mark of the journal of this process that has written a record last; a mark is of one journal, also after it is gone."""


class Journal:
    """Writes what a training loop measures as a `Record`: after each task one row of scores, and the file is whole again.

    `rwalk report` and `rwalk compare` show records of the same stream, metric and settings side by side. A journal of the same
    method, stream, seed and settings replaces the record of an earlier one. Of several processes that train one model, only the
    first writes.

    Args:
        folder: where the record goes.
        method: what learns, such as "mine"; None for the rule of `memory`, else "finetune", to which reports compare.
        stream: the name of the tasks together.
        metric: what a score is. An "accuracy" is a fraction, shown in percent; any other number is shown as it is.
        higher: whether a higher score is better; has to be given for metrics other than accuracy.
        seed: the seed of this run.
        settings: of the training, the same for all methods of a comparison, as JSON values: `{"lr": 1e-3, "epochs": 3}`.
        memory: the consolidator, whose settings and bytes are recorded.
        tasks: names of the tasks in their order, if they are known.
        stored_examples: how many examples of earlier tasks the method keeps.
        resume: whether to continue the record that is there, after an interruption.

    Raises:
        TypeError: if settings are no JSON values.
        ValueError: if `higher` is missing, or a name occurs twice.
    """

    def __init__(
        self,
        folder: str | Path,
        method: str | None = None,
        stream: str = "tasks",
        *,
        metric: str = ACCURACY,
        higher: bool | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        memory: Any = None,
        tasks: Sequence[str] = (),
        stored_examples: int | None = None,
        resume: bool = False,
    ) -> None:
        if higher is None and metric != ACCURACY:
            given = printable(f"metric={metric!r}", "")
            raise ValueError(f"Journal({given}) needs to know whether a higher score is better. Pass `higher=True` or `False`.")
        if higher is False and metric == ACCURACY:
            raise ValueError('A higher accuracy is better. Leave out `higher`, or name the metric, as in metric="error".')
        self.folder, self.method, self.stream, self.seed = Path(folder), method, str(stream), int(seed)
        self.metric, self.higher, self.memory = str(metric), higher is not False, memory
        self.settings = _json(settings or {})
        self.stored_examples, self.names = stored_examples, _different(tasks)
        self._mark = object()
        self._rows: dict[str, dict[str, float | None]] = {}
        self._untrained: dict[str, float | None] = {}
        self._diagnostics: list[dict[str, Any]] = []
        self._resume, self._seconds, self._since = resume, 0.0, time.perf_counter()

    def __repr__(self) -> str:
        """Say what was noted so far."""
        return f"<journal of {self.record.method} on {self.stream}, seed {self.seed}: {len(self._rows)} tasks>"

    def log(self, task: str | int | None, scores: Mapping[Any, float], *, summary: Any = None) -> Record:
        """Note the scores after a task, write the record and return it.

        Args:
            task: the task that was trained last: its name among `scores`, or its number from 0 where no name is that number;
                None before any training. The last task again replaces its scores.
            scores: a score by each task's name, also of tasks yet to come.
            summary: `memory.summary(loss)` from before the task was consolidated, with figures and layers for the report.

        Raises:
            ValueError: if the task is not among the scores or was logged before, or a score is not of the metric.
            TypeError: if a score is not a number.
        """
        self._seconds += time.perf_counter() - self._since
        self._continue()
        found = {str(name): self._score(name, score) for name, score in scores.items()}
        if task is None:
            self._untrained = found
        else:
            self._note(self._name(str(task) if task in scores else task, list(found)), found, summary)
        record = self.record
        if record.scores and _is_first_rank():
            self._warn_of_another(record)
            record.save(self.folder)
        self._since = time.perf_counter()
        return record

    def evaluate(
        self,
        task: str | int | None,
        tasks: Mapping[Any, Any],
        score: Callable[[Any], float] = lambda evaluation: evaluation(),
        *,
        summary: Any = None,
    ) -> Record:
        """Score each task, and log the scores; the time that this takes is not counted as training.

        Args:
            task: as for `log`.
            summary: as for `log`.
            tasks: by each task's name what `score` takes, such as its test data; without `score`, functions that return scores.
            score: returns the score on a task.
        """
        self._seconds += time.perf_counter() - self._since
        scores = {name: score(each) for name, each in tasks.items()}
        self._since = time.perf_counter()
        return self.log(task, scores, summary=summary)

    @property
    def done(self) -> list[str]:
        """The names of the tasks that were logged, also by a journal that this one continues."""
        self._continue()
        return list(self._rows)

    @property
    def path(self) -> Path:
        """The file of the record."""
        return self.folder / self.record.name

    @property
    def record(self) -> Record:
        """What was logged so far."""
        every = (name for row in (self._untrained, *self._rows.values()) for name in row)
        tasks = list(dict.fromkeys([*self._rows, *self.names, *every]))
        rows = [[row.get(name) for name in tasks] for row in self._rows.values()]
        untrained = [self._untrained.get(name) for name in tasks] if self._untrained else []
        method, config = self._configuration()
        return Record(
            method, self.stream, self.seed, rows, untrained if rows else [], self.metric, self.higher, tasks if rows else [],
            config=config, timings={"train_seconds": self._seconds}, memory=self._bytes(), diagnostics=self._diagnostics,
            versions=_versions(), device=self._device(),
        )  # fmt: skip

    def _score(self, name: Any, score: Any) -> float | None:
        """Return a score as a number; None, with a warning, if it is not finite."""
        try:
            value = float(score)
        except (TypeError, ValueError):
            came = printable(f"The score of `{name}` is {score!r:.80}", "")
            raise TypeError(f"{came}. Pass one number for each task, as in {{'jan': 0.91}}.") from None
        if not math.isfinite(value):
            warn(printable(f"The score of `{name}` is {value}, and is recorded as not evaluated."))
            return None
        if self.metric == ACCURACY and not 0 <= value <= 1:
            came = printable(f"The accuracy of `{name}` is {value:g}", "")
            raise ValueError(f"{came}, and has to be a fraction from 0 to 1. Divide percent by 100, or name another metric.")
        return value

    def _name(self, task: str | int, scored: list[str]) -> str:
        """Return the name of the task that was trained."""
        known = list(dict.fromkeys([*self._rows, *self.names, *scored])) if self.names else scored
        name = known[task] if isinstance(task, int) and 0 <= task < len(known) else str(task)
        if name not in scored:
            came = printable(f"There is no score of task `{name}`, which was trained, among {', '.join(scored) or 'none'}", "")
            raise ValueError(f"{came}. Name a task that is among the scores, or give its number from 0.")
        if name in self._rows and name != list(self._rows)[-1]:
            came = printable(f"Task `{name}` was logged before, and other tasks after it", "")
            raise ValueError(
                f"{came}. If it was trained again, score it under another name, such as `{printable(name)} again`."
            )
        return name

    def _note(self, name: str, scores: dict[str, float | None], summary: Any) -> None:
        """Keep a row, in place of one of the same name."""
        again = name in self._rows
        self._rows[name] = scores
        layers = [] if summary is None else [asdict(layer) for layer in summary.layers]
        noted = {"figures": {} if summary is None else dict(summary.figures), "layers": layers}
        self._diagnostics = [*self._diagnostics[: -1 if again else None], noted]

    def _continue(self) -> None:
        """Take up the record that is there, once, if this journal resumes."""
        if not self._resume:
            return
        self._resume = False
        path = self.path
        if not path.exists():
            self._warn_of_others(path)
        else:
            _written[path.absolute()] = self._mark
            found = Record.load(path)
            self._rows = {
                name: {task: score for task, score in zip(found.tasks, row, strict=True) if score is not None}
                for name, row in zip(found.tasks, found.scores, strict=False)
            }
            self._untrained = dict(zip(found.tasks, found.untrained, strict=False))
            self._diagnostics = found.diagnostics
            self._seconds += found.timings.get("train_seconds") or 0.0

    def _configuration(self) -> tuple[str, dict[str, Any]]:
        """Return the method's name and all settings."""
        config: dict[str, Any] = {"stream": {"name": self.stream, "journal": True}, "training": self.settings}
        if self.memory is None:
            return self.method or "finetune", config
        memory, rule = self.memory, self.memory.rule
        config |= {"rule": _json(asdict(rule)), "strength": memory.strength, "pull": memory.pull, "average": memory.average}
        module = type(rule).__module__
        name = module.rpartition(".")[2] if module.startswith("rwalk.rules.") else type(rule).__name__.lower()
        short = RECOMMENDED.get(name, name) if rule == type(rule)() else name
        return self.method or short, config

    def _bytes(self) -> dict[str, float]:
        stored = {} if self.stored_examples is None else {"stored_examples": float(self.stored_examples)}
        if self.memory is None:
            return stored
        model = sum(p.numel() * p.element_size() for p in self.memory.model.parameters())
        return {"model_bytes": model, "state_bytes": self.memory.state_bytes} | stored

    def _device(self) -> str:
        parameters = () if self.memory is None else self.memory.model.parameters()
        return next((str(p.device.type) for p in parameters), "cpu")

    def _warn_of_others(self, path: Path) -> None:
        """Warn if what is to be continued is there with other settings."""
        stem = path.name.rpartition("-")[0]
        others = sorted(p for p in path.parent.glob("*.json") if p.name.rpartition("-")[0] == stem)
        if others:
            mine, theirs = self.record.config, Record.load(others[0]).config
            keys = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            came = f"`{others[0].name}` is of the same method, stream and seed, with another {listed(keys)}"
            warn(printable(f"There is no record of these settings to continue, and a new one begins. {came}."))

    def _warn_of_another(self, record: Record) -> None:
        """Warn if another journal has written the same record: an earlier one, or in a loop over seeds without `seed=`."""
        path = (self.folder / record.name).absolute()
        if path not in _written and path.exists():
            warn(printable(
                f"There is a record `{path.name}` of an earlier journal, and this one replaces it. Pass `resume=True` to "
                "continue it. Where runs differ, say so by `method`, `seed` or `settings`."
            ))  # fmt: skip
        if _written.setdefault(path, self._mark) is not self._mark:
            warn(printable(
                f"Another journal of this process wrote `{path.name}`, and this one replaces it. Where runs differ, say so by "
                "`method`, `seed` or `settings`."
            ))  # fmt: skip
            _written[path] = self._mark


def _json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON content, or raise a TypeError."""
    try:
        found: dict[str, Any] = files.as_json(dict(settings))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`settings` have to be JSON values by name, such as {{'lr': 1e-3}} ({error}).") from None
    return found


def _different(names: Sequence[str]) -> list[str]:
    found = [str(name) for name in names]
    if twice := [name for name in found if found.count(name) > 1]:
        raise ValueError(printable(f"The task `{twice[0]}` is named twice. Give each task a name of its own.", ""))
    return found


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "rwalk": __version__}
    try:
        return found | {"torch": version("torch")}
    except PackageNotFoundError:
        return found


def _is_first_rank() -> bool:
    """Return whether this process is the first of those that train, or alone."""
    distributed = sys.modules.get("torch.distributed")
    ready = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return not ready or distributed is None or distributed.get_rank() == 0
