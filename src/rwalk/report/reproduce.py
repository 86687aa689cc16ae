"""The commands that repeat the runs of a comparison: those in their records, else what their settings say."""

import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from rwalk.bench.record import Record
from rwalk.report.names import REPLAY, method_name, rule_names
from rwalk.report.summary import MethodComparison

KINDS = ("split", "permuted", "rotated", "domain", "drift")
"""Kinds of streams that the command line makes."""
PLAIN = ("finetune", "joint", "cumulative", "replay", "agem", "lwf")
"""Methods of the command line other than the rules, default and recipe."""
SETTINGS = {"stream", "training", "rule", "strength", "pull", "average", "replay", "temperature", "code"}
"""Parts of the configuration that the command line can set."""
VALIDATION = "-validation"
"""The suffix of streams for tuning."""
DEGREES = 180.0
"""The angle of rotated streams of the command line."""


class Commands(NamedTuple):
    """Command lines, and notes on runs that no command repeats."""

    lines: list[str]
    notes: list[str]


def commands(comparison: MethodComparison) -> Commands:
    """Return the commands that repeat all runs of a comparison, and a note for each run that none repeats."""
    if comparison.journal:
        return Commands([], ["Journals of training loops wrote these records."])
    lines, notes = dict[str, None](), dict[str, None]()
    for line in comparison.lines:
        lines |= dict.fromkeys(filter(None, map(_recorded, line.records)))
        for first, count in _stretches([record for record in line.records if not _recorded(record)]):
            if why := _inexpressible(first):
                notes[f"{method_name(first.method)}, seed {first.seed}: {why}."] = None
            else:
                lines[_command(first, count)] = None
    return Commands([*lines], [*notes, *_about_data(comparison)])


def _recorded(record: Record) -> str:
    """Return the command line in a record, quoted anew; empty if there is none of this program."""
    try:
        words = shlex.split(record.command)
    except ValueError:
        return ""
    return shlex.join(words) if words[:2] in (["rwalk", "run"], ["rwalk", "tune"]) else ""


def _stretches(records: list[Record]) -> Iterator[tuple[Record, int]]:
    """Yield the first record of each stretch of consecutive seeds, and the number of seeds."""
    by_seed = {record.seed: record for record in records}
    for seed in sorted(by_seed):
        if seed - 1 not in by_seed:
            count = 1
            while seed + count in by_seed:
                count += 1
            yield by_seed[seed], count


def _inexpressible(record: Record) -> str:
    """Return why the command line cannot do a run, or nothing."""
    about, method = record.config.get("stream", {}), record.method.removesuffix(REPLAY)
    counts = about.get("tasks"), about.get("skipped", 0)
    if "training" not in record.config or not all(isinstance(count, int) for count in counts):
        return "its record does not hold all settings"
    if record.stream.endswith(VALIDATION):
        return "`rwalk tune` made it"
    if not record.stream.startswith(tuple(f"{kind}-" for kind in KINDS)) or about.keys() & {"order", "blurry"}:
        return "its stream was made in Python"
    if not _is_path(method) and method not in {*PLAIN, "default", "recipe", *rule_names()}:
        return "its method was made in Python"
    if ":" in (model := str(record.config["training"].get("model"))) and not _is_path(model):
        return "its model was made in Python"
    if unknown := record.config.keys() - SETTINGS:
        return f"its {', '.join(sorted(unknown))} came from Python"
    if record.ranks > 1:
        return f"{record.ranks} processes trained the model together"
    if about.get("seed", record.seed) != record.seed:
        return "its stream has another seed than its training"
    return "its stream turns by another angle" if about.get("degrees", DEGREES) != DEGREES else ""


def _is_path(name: str) -> bool:
    """Return whether a method or model is named by an import path that any process finds."""
    return bool(re.fullmatch(r"(?!__main__:)[\w.]+:[\w.]+", name))


def _command(record: Record, seeds: int) -> str:
    """Return the command for the settings of a run, and for the seeds that follow its own."""
    config, about, method = record.config, record.config["stream"], record.method.removesuffix(REPLAY)
    kind, skipped, backend = record.stream.split("-")[0], about.get("skipped", 0), record.versions.get("kernels", "blocked")
    kept = config.get("replay", {})
    values = {
        "methods": method, "tasks": about["tasks"] + skipped, "skip": skipped or None,
        "scenario": about.get("scenario") if kind in ("split", "domain") else None, "by": about.get("by"),
        "target": about.get("target"), "limit": about.get("limit"), "metric": about.get("metric"),
        "lower": None if about.get("higher", True) else [],
        **config["training"],
        "threads": record.threads if record.threads > 1 else None,
        "device": None if record.device == "cpu" else record.device,
        "kernels": None if "+" in backend else backend,
        "strength": config.get("strength"), "pull": config.get("pull"), "average": config.get("average"),
        "replay": kept.get("size"), "per": kept.get("per"), "select": kept.get("select"), "replay-batch": kept.get("batch"),
        **(_fields(method, config.get("rule", {})) if method in rule_names() else {}),
        "first-seed": record.seed, "seeds": seeds,
    }  # fmt: skip
    given = [word for name, value in values.items() if value is not None for word in _flag(name, value)]
    return shlex.join(["rwalk", "run", record.stream, *given])


def _fields(method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a rule's fields; a switch has no value, and another name when it is off."""
    names = {name: f"no-{name}" if value is False else name for name, value in fields.items()}
    return {f"{method}.{names[name]}": [] if isinstance(value, bool) else str(value) for name, value in fields.items()}


def _flag(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]


def _about_data(comparison: MethodComparison) -> list[str]:
    name, about = comparison.stream.partition("-")[2], comparison.setting.get("stream", {})
    rows = about.get("rows")
    if name == "digits":
        return []
    size = f", of {rows[0]} training and {rows[1]} test examples," if isinstance(rows, list) and len(rows) == 2 else ""
    where = "has to lie in --data or RWALK_DATA, or be named by its path; --label as it was, if it was given."
    return [f"The data set {name}{size} {where}"]


def versions(comparison: MethodComparison) -> list[str]:
    """Return the software and hardware of the runs, each combination once."""
    found = [r for line in comparison.lines for r in line.records]
    ways = [r.versions | {"device": r.device, "threads": str(r.threads), "ranks": str(r.ranks)} for r in found]
    return list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in way.items()) for way in ways))
