"""What a set of records says: runs of one setting side by side, each method as mean and spread over its seeds."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rwalk._errors import explain
from rwalk.bench.record import Record
from rwalk.bench.tuned import SUFFIX, Tuned

REFERENCES = ("cumulative", "joint")
"""Methods that train on the data of all tasks at once: what is within reach, and not what is compared."""


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Line:
    """One method in a comparison.

    Args:
        method: name of the method.
        strength: factor of the penalty, None for methods without one.
        fields: the rule's fields, pull, averaging and replay.
        seeds: the seeds that were run.
        records: their records, in the same order.
        kept: share of the best accuracies on earlier tasks that is left in the end.
        learned: accuracy on tasks right after learning them, a fraction.
        bits: bits per character, for streams of characters.
        average_accuracy, forgetting, intransigence, backward_transfer, forward_transfer: fractions; None where not defined.
        seconds: training time of a run.
        step_ratio: CPU time of a step over that of fine-tuning, in runs of the same seed.
        state: bytes of the method's state over those of the model's parameters.
        stored_examples: examples of earlier tasks that the method keeps.
    """

    method: str
    strength: float | None
    fields: dict[str, Any]
    seeds: list[int]
    records: list[Record] = field(repr=False)
    average_accuracy: Spread | None
    forgetting: Spread | None
    intransigence: Spread | None
    backward_transfer: Spread | None
    forward_transfer: Spread | None
    kept: Spread | None
    learned: Spread | None
    bits: Spread | None
    seconds: Spread | None
    step_ratio: Spread | None
    state: Spread | None
    stored_examples: Spread | None


@dataclass(frozen=True)
class Comparison:
    """Methods that were trained in the same way on the same stream."""

    stream: str
    setting: dict[str, Any]
    lines: list[Line]

    def varying(self, line: Line) -> dict[str, Any]:
        """Return the fields that tell a line from others of the same method."""
        others = [o for o in self.lines if o.method == line.method and o.fields != line.fields]
        return {k: v for k, v in line.fields.items() if any(o.fields.get(k) != v for o in others)}

    def facts(self) -> dict[str, str]:
        """Return every setting that moves the numbers of all methods, by name."""
        about, training = self.setting.get("stream", {}), self.setting.get("training", {})
        hidden = training.get("hidden") if training.get("model", "mlp") == "mlp" else None
        facts = {
            "tasks": about.get("tasks"),
            "skipped": about.get("skipped"),
            "scenario": f"{about['scenario']}-incremental" if "scenario" in about else None,
            "softmax mask": training.get("mask"),
            "epochs": training.get("epochs"),
            "batch": training.get("batch_size"),
            "optimiser": training.get("optimizer"),
            "learning rate": training.get("lr"),
            "model": training.get("model"),
            "hidden": " + ".join(map(str, hidden)) if isinstance(hidden, list) else None,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}

    def describe(self) -> str:
        """Name every setting that moves the numbers, in one line."""
        return ", ".join(value if name == "scenario" else f"{name}: {value}" for name, value in self.facts().items())


def read(folder: str | Path) -> tuple[list[Record], list[str]]:
    """Read all records below a folder; return them and a message for each file that is left out.

    Left out are JSON files that hold no record, results of tuning that cannot be read, and copies of records, which would count
    twice: they are equal to the last digit of their times.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no JSON file.
    """
    below = sorted(Path(folder).rglob("*")) if Path(folder).is_dir() else []
    files = [file for file in below if file.suffix == ".json"]
    if not files:
        raise FileNotFoundError(
            explain(f"`{folder}`, in which there are no records", "a folder written by `rwalk run --out`", "Correct the path.")
        )
    records: dict[str, tuple[Path, Record]] = {}
    problems = []
    for file in files:
        try:
            record = Record.load(file)
            first, _ = records.setdefault(canonical(asdict(record)), (file, record))
            if first != file:
                raise ValueError(explain(f"`{file}`, a copy of `{first}`", "each run once", "Move one of them away."))
        except (ValueError, OSError) as error:  # of one file that is gone, or may not be read, as of one that is broken
            problems.append(_problem(file, error))
    for file in below:
        try:
            if file.suffix == SUFFIX:
                Tuned.load(file)
        except (ValueError, OSError) as error:
            problems.append(_problem(file, error))
    return [record for _, record in records.values()], problems


def _problem(file: Path, error: ValueError | OSError) -> str:
    """Say why a file is left out."""
    if isinstance(error, ValueError):
        return str(error)
    came = f"`{file}`, which cannot be read ({error.strerror or error})"
    return explain(came, "a file that can be", "Move it away, or correct its permissions.")


def summarise(records: Iterable[Record]) -> list[Comparison]:
    """Group records by stream and training, then by method, strength and fields of the rule, and average over seeds."""
    comparisons: dict[str, list[Record]] = {}
    for record in records:
        about = {k: v for k, v in record.config.get("stream", {}).items() if k != "seed"}
        setting = {"stream": about, "training": record.config.get("training", {})}
        comparisons.setdefault(canonical([record.stream, setting]), []).append(record)
    return [_compare(group) for group in comparisons.values()]


def _compare(records: list[Record]) -> Comparison:
    methods: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (_rank(r.method), r.config.get("strength") or 0, r.seed)):
        mine = canonical([record.method, record.config.get("strength"), _fields(record)])
        methods.setdefault(mine, []).append(record)
    references = {name: {r.seed: r for r in records if r.method == name} for name in ("finetune", "joint")}
    lines = [_line(group, **references) for group in methods.values()]
    return Comparison(records[0].stream, records[0].config, lines)


def _fields(record: Record) -> dict[str, Any]:
    """Return the rule's fields, the options of its consolidator, and what is replayed."""
    options = {key: record.config[key] for key in ("pull", "average") if key in record.config}
    replayed = {"replay": _replayed(record.config["replay"])} if "replay" in record.config else {}
    return dict(record.config.get("rule", {})) | options | replayed


def _replayed(kept: dict[str, Any]) -> str:
    share = "in total" if kept.get("per") == "total" else f"per {kept.get('per')}"
    return f"{kept.get('size')} {share}, {kept.get('select')}" + (f", {kept['batch']} a step" if kept.get("batch") else "")


def _rank(method: str) -> tuple[int, str]:
    """Order methods: plain training first, training on all data last."""
    ranks = {"finetune": 0} | {name: 2 + i for i, name in enumerate(REFERENCES)}
    return ranks.get(method, 1), method


def _line(records: list[Record], finetune: dict[int, Record], joint: dict[int, Record]) -> Line:
    first = records[0]
    return Line(
        method=first.method,
        strength=first.config.get("strength"),
        fields=_fields(first),
        seeds=[r.seed for r in records],
        records=records,
        average_accuracy=spread(r.average_accuracy for r in records),
        forgetting=spread(None if r.method == "joint" else r.forgetting for r in records),
        intransigence=spread(r.intransigence(joint[r.seed]) if r.seed in joint else None for r in records),
        backward_transfer=spread(None if r.method == "joint" else r.backward_transfer for r in records),
        forward_transfer=spread(None if r.method == "joint" else r.forward_transfer for r in records),
        kept=spread(r.kept for r in records),
        learned=spread(r.learned for r in records),
        bits=spread(r.final_bits for r in records),
        seconds=spread(r.timings.get("train_seconds") for r in records),
        step_ratio=spread(_ratio(r, finetune.get(r.seed)) for r in records),
        state=spread(_over(r.memory.get("state_bytes"), r.memory.get("model_bytes")) for r in records),
        stored_examples=spread(r.memory.get("stored_examples") for r in records),
    )


def _ratio(record: Record, reference: Record | None) -> float | None:
    return _over(record.timings.get("step_ms"), reference.timings.get("step_ms")) if reference else None


def _over(a: float | None, b: float | None) -> float | None:
    ratio = a / b if a is not None and b else math.inf
    return ratio if math.isfinite(ratio) else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and deviation of the values that are defined; None if there are none."""
    known = [v for v in values if v is not None]
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None) if known else None


def canonical(content: Any) -> str:
    """Return text that is the same for the same JSON content."""
    return json.dumps(content, sort_keys=True)
