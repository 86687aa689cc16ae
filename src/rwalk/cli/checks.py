"""What `rwalk run` and `rwalk tune` refuse before anything is loaded: options out of range, or that do not fit together."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rwalk._errors import printable, suggestion
from rwalk.bench import devices
from rwalk.bench.baselines import BASELINES, RECIPES, Rehearsal
from rwalk.bench.builtin import MOST, parse
from rwalk.bench.optimisation import Training
from rwalk.bench.trackers import tracker
from rwalk.cli.groups import KINDS, RULES
from rwalk.consolidation.settings import check_strength
from rwalk.rules.base import Rule

if TYPE_CHECKING:
    from rwalk.cli.run import Run

TUNED = "tuned"
"""The strength that stands for what `rwalk tune` has found."""
LIMITS = {
    "tasks": range(1, MOST + 1), "skip": range(MOST), "limit": range(1, 2**62), "seeds": range(1, 10_001),
    "first_seed": range(2**62), "threads": range(1, 1025), "workers": range(1, 1025),
    "tune_tasks": range(1, MOST + 1), "refine": range(MOST + 1),
}  # fmt: skip
"""Whole numbers beyond which an option makes no sense, or torch or the machine would choke on it."""


def check(command: "Run") -> None:
    """Refuse options that are out of range or do not fit together."""
    if not command.stream:
        raise ValueError("No stream is given. Name one, such as permuted-digits; `rwalk list` shows what there is.")
    kind, _ = parse(command.stream)
    devices.chosen(command.machine.device)
    for group in vars(command).values():
        check_ranges(group)
    if (command.machine.backend == "dask") != (command.machine.address is not None):
        raise ValueError("--backend dask and --address belong together; pass both or neither.")
    if command.source.by and kind != "domain":
        raise ValueError(f"--by {printable(command.source.by, '')} is for domain streams, not for {kind}; leave it out.")
    if command.source.lower and not command.source.metric:
        raise ValueError("--lower is for a metric of your own; pass it with --metric.")
    if command.output.out.exists() and not command.output.out.is_dir():
        raise ValueError(printable(f"`--out {command.output.out}` is a file; name a folder."))
    Training(**vars(command.training))
    rehearsal(command, "replay")
    for name in RULES:  # those that are not run, too
        rule(command, name)
    for name in ("", *KINDS):
        for strength in numbers("--strength", strength_text(command, name)):
            check_strength(strength)
    _refuse_unused(command, method_names(command))
    with tracker(command.output.log, command.output.out):
        pass  # raises an error now if its package is missing


def check_ranges(group: Any) -> None:
    """Refuse whole numbers out of range among the options of a group."""
    for option, allowed in LIMITS.items():
        value = getattr(group, option, None)
        if value is not None and value not in allowed:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} {value} is out of range; pass {allowed[0]:,} to {allowed[-1]:,}.")


def method_names(command: "Run") -> list[str]:
    """Return the methods of a command, each once."""
    words = [name.strip() for name in command.methods.names.split(",")]
    names = [word if ":" in word else word.replace("-", "_").lower() for word in words]
    for name in names:
        if ":" not in name and name not in (known := [*BASELINES, *RECIPES, *RULES]):
            came = f"There is no method `{printable(name, '')}`.{suggestion(name, known)} Pass some of {', '.join(known)}"
            raise ValueError(f"{came}, which `rwalk list` explains, or package.module:name.")
    return list(dict.fromkeys(names))


def rule(command: "Run", name: str) -> Rule[Any]:
    """Return a rule with the fields that a command gives it."""
    given: dict[str, Any] = vars(getattr(command.fields, name))
    return RULES[name](**{field: value for field, value in given.items() if field != "strength"})


def rehearsal(command: "Run", name: str) -> Rehearsal | None:
    """Return what a method keeps: replay and agem always, rules, default and recipe if the command asks for it."""
    given = command.replay
    if name not in ("replay", "agem") and (given.size is None or name in BASELINES):
        return None
    return Rehearsal(200 if given.size is None else given.size, given.per, given.select, given.batch)


def strength_text(command: "Run", name: str) -> str | None:
    """Return the strength that a command gives to a method: its own, else that of all."""
    own: str | None = getattr(getattr(command.fields, name, None), "strength", None)
    return command.methods.strength if own is None else own


def numbers(option: str, text: str | None) -> list[float]:
    """Return the numbers that an option gives; none for `tuned`, which `--strength` alone can be."""
    if text is None or (text == TUNED and option == "--strength"):
        return []
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        also = f", or {TUNED}" if option == "--strength" else ""
        raise ValueError(f"{option} {printable(text, '')} is not understood; pass numbers with commas between{also}.") from None


def _refuse_unused(command: "Run", names: Sequence[str]) -> None:
    """Refuse options that none of a command's methods uses."""
    for name in KINDS.keys() - set(names):
        for field in _changed(getattr(command.fields, name)):
            option = f"--{name}.{field}".replace("_", "-")
            raise ValueError(f"{option} is for `{name}`, which is not among --methods; add it, or leave the option out.")
    ruled = {*RULES, *RECIPES}
    users = {"strength": set(KINDS), "pull": ruled, "average": ruled}
    own = any(":" in name for name in names)
    for option in _changed(command.methods):
        if option in users and not own and not users[option] & set(names):
            raise ValueError(f"--{option} is for rules, and there is none among --methods; add one, or leave the option out.")
    if _changed(command.replay) and not any(rehearsal(command, name) for name in names):
        came = "No method keeps examples of earlier tasks, so that the options of replay have no effect"
        raise ValueError(f"{came}. Add --replay for rules, or the method replay or agem, or leave them out.")


def _changed(group: Any) -> list[str]:
    """Return the options of a group that are not at their defaults."""
    return [field.name for field in fields(group) if getattr(group, field.name) != field.default]
