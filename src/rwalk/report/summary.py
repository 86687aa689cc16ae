"""Summaries of records: runs of one setting side by side, each method as mean and deviation over its seeds."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rwalk._errors import printable
from rwalk.bench.record import Record
from rwalk.bench.tuned import SUFFIX, Tuned
from rwalk.report.metric import ScoreMetric

REFERENCES = ("cumulative", "joint")
"""Methods that train on the data of all tasks at once: they show what can be reached, and are not compared."""


SHOWN = {"mask", "epochs", "batch_size", "optimizer", "lr", "model", "hidden"}
"""Settings of the training that have a place of their own among the facts; others follow under their names."""


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Line:
    """One method in a comparison, over the seeds it was run with.

    Args:
        method: name of the method.
        strength: factor of the penalty, None for methods without one.
        fields: the rule's fields, pull, averaging and replay.
        records: one for each seed.
        references: the runs of "finetune" and of "joint" in the same comparison, by seed.
        repeated: seeds that have more than one record with these settings; only the first is used.
    """

    method: str
    strength: float | None
    fields: dict[str, Any]
    records: list[Record] = field(repr=False)
    references: dict[str, dict[int, Record]] = field(repr=False)
    repeated: tuple[int, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return [record.seed for record in self.records]

    def over_seeds(self, figure: Callable[[Record], float | None]) -> Spread | None:
        """Return mean and deviation of a figure of each record; None if no record has it."""
        return spread(map(figure, self.records))

    def beside(self, reference: str, figure: Callable[[Record, Record], float | None]) -> Spread | None:
        """Return mean and deviation of a figure of each record and the reference's record of the same seed."""
        others = self.references[reference]
        return spread(figure(record, others[record.seed]) for record in self.records if record.seed in others)

    @cached_property
    def average(self) -> Spread | None:
        """Score over all tasks after the last one; for accuracies the average accuracy, a fraction."""
        return self.over_seeds(lambda record: record.average)

    @cached_property
    def forgetting(self) -> Spread | None:
        """Score lost on earlier tasks since their best; None for joint training."""
        return self.over_seeds(lambda record: None if record.method == "joint" else record.forgetting)

    @cached_property
    def kept(self) -> Spread | None:
        """Share of the best accuracies on earlier tasks that is left in the end."""
        return self.over_seeds(lambda record: record.kept)

    @cached_property
    def learned(self) -> Spread | None:
        """Score on tasks right after learning them."""
        return self.over_seeds(lambda record: record.learned)

    @cached_property
    def step_ratio(self) -> Spread | None:
        """CPU time of a step over that of fine-tuning with the same seed."""
        return self.beside("finetune", lambda mine, plain: ratio(mine.timings.get("step_ms"), plain.timings.get("step_ms")))

    @cached_property
    def stored_examples(self) -> Spread | None:
        """How many examples of earlier tasks the method keeps."""
        return self.over_seeds(lambda record: record.memory.get("stored_examples"))


@dataclass(frozen=True)
class MethodComparison:
    """Methods that were trained in the same way on the same stream.

    Args:
        stream: name of the stream.
        setting: settings that all share.
        lines: the methods.
        methods: every method of the report, so that each keeps its colour from one comparison to the next.
    """

    stream: str
    setting: dict[str, Any]
    lines: list[Line]
    methods: tuple[str, ...] = ()

    @cached_property
    def metric(self) -> ScoreMetric:
        """What the scores are."""
        return ScoreMetric.of(record for line in self.lines for record in line.records)

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks: as in the records, else their numbers from 1."""
        records = [record for line in self.lines for record in line.records]
        named = [record for record in records if record.tasks]
        return max((record.task_names for record in named or records), key=len)

    @property
    def journal(self) -> bool:
        """Whether journals of training loops wrote the records, and not `rwalk run`."""
        return bool(self.setting.get("stream", {}).get("journal"))

    @property
    def has_strengths(self) -> bool:
        """Whether any method has a strength."""
        return any(line.strength is not None for line in self.lines)

    def varying(self, line: Line) -> dict[str, Any]:
        """Return the fields that distinguish a line from others of the same method."""
        others = [o for o in self.lines if o.method == line.method and o.fields != line.fields]
        return {k: v for k, v in line.fields.items() if any(o.fields.get(k) != v for o in others)}

    def facts(self) -> dict[str, str]:
        """Return every setting that moves the numbers of all methods, by name."""
        about, training = self.setting.get("stream", {}), self.setting.get("training", {})
        hidden = training.get("hidden") if training.get("model", "mlp") == "mlp" else None
        facts = {
            "tasks": about.get("tasks", len(self.tasks)),
            "skipped": about.get("skipped"),
            "target": about.get("target"),
            "examples at most": about.get("limit"),
            "order of classes": " ".join(map(str, about["order"])) if isinstance(about.get("order"), list) else None,
            "blurry": _blurry(about.get("blurry")),
            "scenario": f"{about['scenario']}-incremental" if "scenario" in about else None,
            "softmax mask": training.get("mask") if self.metric.percent else None,
            "epochs": training.get("epochs"),
            "batch": training.get("batch_size"),
            "optimiser": training.get("optimizer"),
            "learning rate": training.get("lr"),
            "model": training.get("model"),
            "hidden": " + ".join(map(str, hidden)) if isinstance(hidden, list) else None,
        }
        facts |= {name.replace("_", " "): value for name, value in training.items() if name not in SHOWN}
        return {name: str(value) for name, value in facts.items() if value is not None}

    def describe(self) -> str:
        """Name every setting that moves the numbers, in one line."""
        return ", ".join(value if name == "scenario" else f"{name}: {value}" for name, value in self.facts().items())


class Records(list[Record]):
    """Records, which notebooks show as tables of methods."""

    def _repr_html_(self) -> str:
        return summarise(self)._repr_html_()


class Comparisons(list[MethodComparison]):
    """Comparisons, which notebooks show as tables of methods."""

    def _repr_html_(self) -> str:
        from rwalk.report.export import html

        return html(self)


def _blurry(about: Any) -> str | None:
    """Return the share of examples that tasks have from their neighbours, and its seed."""
    return f"{about.get('share')}, seed {about.get('seed')}" if isinstance(about, dict) else None


def read(folder: str | Path) -> tuple[Records, list[str]]:
    """Read all records below a folder; return them and a message for each file that is left out.

    Left out are JSON files that hold no record, results of tuning that cannot be read, and copies of records (equal to the last
    digit of their times), which would count twice.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no JSON file.
    """
    below = sorted(Path(folder).rglob("*")) if Path(folder).is_dir() else []
    if not any(file.suffix == ".json" for file in below):
        raise FileNotFoundError(
            printable(f"`{folder}` has no records. Name a folder written by `rwalk run --out` or a journal.")
        )
    records: dict[str, tuple[Path, Record]] = {}
    problems = []
    for file in below:
        try:
            if file.suffix == SUFFIX:
                Tuned.load(file, exact=True)
            if file.suffix == ".json":
                record = Record.load(file)
                first, _ = records.setdefault(canonical(asdict(record)), (file, record))
                if first != file:
                    raise ValueError(printable(f"`{file}` is a copy of `{first}`. Move one of them away."))
        except ValueError as error:
            problems.append(str(error))
        except OSError as error:
            came = f"`{file}` cannot be read ({error.strerror or error})"
            problems.append(printable(f"{came}. Move it away, or correct its permissions."))
    return Records(record for _, record in records.values()), problems


def summarise(records: Iterable[Record]) -> Comparisons:
    """Group records by stream, metric and training, then by method, strength and fields of the rule, and average over seeds."""
    comparisons: dict[str, list[Record]] = {}
    for record in records:
        about = {k: v for k, v in record.config.get("stream", {}).items() if k != "seed"}
        setting = {"stream": about, "training": record.config.get("training", {})}
        comparisons.setdefault(canonical([record.stream, record.metric, record.higher, setting]), []).append(record)
    every = sorted({record.method for group in comparisons.values() for record in group}, key=_rank)
    return Comparisons(_compare(group, tuple(every)) for group in comparisons.values())


def _compare(records: list[Record], every: tuple[str, ...]) -> MethodComparison:
    methods: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (_rank(r.method), r.config.get("strength") or 0, r.seed)):
        mine = canonical([record.method, record.config.get("strength"), _fields(record)])
        methods.setdefault(mine, []).append(record)
    references = {name: {r.seed: r for r in records if r.method == name} for name in ("finetune", "joint")}
    lines = [_line(group, references) for group in methods.values()]
    return MethodComparison(records[0].stream, records[0].config, lines, every)


def _line(group: list[Record], references: dict[str, dict[int, Record]]) -> Line:
    """Make the line of one method, with the first record of each seed."""
    by_seed: dict[int, Record] = {}
    for record in group:
        by_seed.setdefault(record.seed, record)
    repeated = tuple(sorted({record.seed for record in group if by_seed[record.seed] is not record}))
    first = group[0]
    return Line(first.method, first.config.get("strength"), _fields(first), [*by_seed.values()], references, repeated)


def _fields(record: Record) -> dict[str, Any]:
    """Return the fields of the rule or learner, the options of its consolidator, what is replayed, and which code it was."""
    options = {key: record.config[key] for key in ("pull", "average", "code") if key in record.config}
    replayed = {"replay": _replayed(record.config["replay"])} if "replay" in record.config else {}
    return dict(record.config.get("rule") or record.config.get("learner", {})) | options | replayed


def _replayed(kept: dict[str, Any]) -> str:
    share = "in total" if kept.get("per") == "total" else f"per {kept.get('per')}"
    return f"{kept.get('size')} {share}, {kept.get('select')}" + (f", {kept['batch']} a step" if kept.get("batch") else "")


def _rank(method: str) -> tuple[int, str]:
    """Order methods: plain training first, training on all data last."""
    ranks = {"finetune": 0} | {name: 2 + i for i, name in enumerate(REFERENCES)}
    return ranks.get(method, 1), method


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None if it is not defined."""
    found = a / b if a is not None and b else math.inf
    return found if math.isfinite(found) else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and deviation of the values that are defined; None if there are none."""
    known = [v for v in values if v is not None]
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None) if known else None


def canonical(content: Any) -> str:
    """Return text that is the same for the same JSON content."""
    return json.dumps(content, sort_keys=True)
