"""The commands that repeat the runs of a comparison, from the settings in their records."""

import pkgutil
import shlex
from importlib.util import find_spec
from typing import Any, NamedTuple

from rwalk.bench.record import Record
from rwalk.report.names import REPLAY, method_name
from rwalk.report.summary import Line, MethodComparison

KINDS = ("split", "permuted", "rotated", "domain", "drift")
"""Kinds of streams that the command line makes."""
PLAIN = ("finetune", "joint", "cumulative", "replay", "agem", "lwf")
"""Methods of the command line other than the rules and the recipe."""
SETTINGS = {"stream", "training", "rule", "strength", "pull", "average", "replay", "temperature"}
"""Parts of the configuration that the command line can set."""
VALIDATION = "-validation"
"""The suffix of streams for tuning."""
DEGREES = 180.0
"""The angle of rotated streams of the command line."""
Flags = dict[str, Any]
"""The value of each flag; None for a flag that must not be given."""


class Commands(NamedTuple):
    """Command lines, and notes on runs that no command repeats."""

    lines: list[str]
    notes: list[str]


def commands(comparison: MethodComparison) -> Commands:
    """Return the fewest commands that repeat all runs of a comparison, and a note for each run that none repeats."""
    groups: list[tuple[list[str], Flags]] = []
    notes: list[str] = []
    for line in comparison.lines:
        for record in _firsts(line):
            if why := _inexpressible(record):
                notes.append(f"{method_name(line.method)}, seed {record.seed}: {why}.")
            else:
                _join(groups, record.method.removesuffix(REPLAY), _flags(record) | _seeds(line, record))
    lines = [_command(comparison.stream, methods, flags) for methods, flags in groups]
    return Commands(list(dict.fromkeys(lines)), list(dict.fromkeys(notes)) + _about_data(comparison))


def _firsts(line: Line) -> list[Record]:
    """Return the first record of each stretch of consecutive seeds."""
    seeds = {record.seed: record for record in line.records}
    return [record for seed, record in sorted(seeds.items()) if seed - 1 not in seeds]


def _seeds(line: Line, first: Record) -> Flags:
    last = first.seed
    while last + 1 in line.seeds:
        last += 1
    return {"--first-seed": first.seed, "--seeds": last - first.seed + 1}


def _join(groups: list[tuple[list[str], Flags]], method: str, flags: Flags) -> None:
    """Add a method to the first command whose flags agree with its own, or else to a new one."""
    for methods, common in groups:
        if method not in methods and all(common.get(flag, value) == value for flag, value in flags.items()):
            methods.append(method)
            common.update(flags)
            return
    groups.append(([method], flags))


def _inexpressible(record: Record) -> str:
    """Return why the command line cannot do a run, or nothing."""
    about, method = record.config.get("stream", {}), record.method.removesuffix(REPLAY)
    counts = about.get("tasks"), about.get("skipped", 0)
    if "training" not in record.config or not all(isinstance(count, int) for count in counts):
        return "its record does not hold all settings"
    if record.stream.endswith(VALIDATION):
        return "`rwalk tune` made it"
    if not record.stream.startswith(tuple(f"{kind}-" for kind in KINDS)):
        return "its stream was made in Python"
    if method not in {*PLAIN, "recipe", *_rules()}:
        return "its method was made in Python"
    if unknown := record.config.keys() - SETTINGS:
        return f"its {', '.join(sorted(unknown))} came from Python"
    if record.ranks > 1:
        return f"{record.ranks} processes trained the model together"
    if about.get("seed", record.seed) != record.seed:
        return "its stream has another seed than its training"
    return "its stream turns by another angle" if about.get("degrees", DEGREES) != DEGREES else ""


def _rules() -> set[str]:
    """Return the names of the rules: those of their modules."""
    spec = find_spec("rwalk.rules")
    found = pkgutil.iter_modules(spec.submodule_search_locations if spec else ())
    return {module.name for module in found if module.name[0] != "_"} - {"base"}


def _flags(record: Record) -> Flags:
    """Return every setting of a run as flags."""
    config, about = record.config, record.config["stream"]
    kind, skipped = record.stream.split("-")[0], about.get("skipped", 0)
    flags: Flags = {"--tasks": about["tasks"] + skipped, "--skip": skipped or None}
    flags |= {"--scenario": about.get("scenario") if kind in ("split", "domain") else None, "--by": about.get("by")}
    flags |= {_flag(name): value for name, value in config["training"].items()}
    flags |= {"--threads": record.threads if record.threads > 1 else None}
    flags |= {"--device": None if record.device == "cpu" else record.device}
    backend = record.versions.get("kernels", "blocked")
    flags |= {"--kernels": None if backend == "blocked" else "auto" if "+" in backend else backend}
    return flags | _options(record)


def _options(record: Record) -> Flags:
    """Return the flags of the method itself; None where a flag for another method would change this one."""
    config, method = record.config, record.method.removesuffix(REPLAY)
    flags: Flags = {"--strength": config["strength"]} if "strength" in config else {}
    if method not in PLAIN:
        flags |= {"--pull": config.get("pull"), "--average": config.get("average"), "--replay": None}
    if "replay" in config:
        kept = config["replay"]
        flags |= {"--replay": kept.get("size"), "--per": kept.get("per"), "--select": kept.get("select")}
        flags |= {"--replay-batch": kept.get("batch")}
    fields = config.get("rule", {}) if method in _rules() else {}
    return flags | dict(_field(method, name, value) for name, value in fields.items())


def _field(method: str, name: str, value: Any) -> tuple[str, Any]:
    """Return the flag of a rule's field and its value; a switch has no value, and another name when it is off."""
    if isinstance(value, bool):
        return _flag(f"{method}.{name}" if value else f"{method}.no-{name}"), []
    return _flag(f"{method}.{name}"), str(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _command(stream: str, methods: list[str], flags: Flags) -> str:
    given = [word for flag, value in flags.items() if value is not None for word in (flag, *_words(value))]
    return shlex.join(["rwalk", "run", stream, "--methods", ",".join(methods), *given])


def _words(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else [str(value)]


def _about_data(comparison: MethodComparison) -> list[str]:
    name, rows = comparison.stream.partition("-")[2], comparison.setting.get("stream", {}).get("rows")
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
