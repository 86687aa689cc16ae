"""In which settings two sets of records differ, as a flat list."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rwalk.bench.record import Record
from rwalk.report.summary import canonical

DEEPEST = 20
"""Levels of a configuration that are taken apart; what lies deeper is one value."""
SHOWN = ("method", "stream", "config", "versions", "threads", "ranks", "device")
"""The parts of a record that are settings, and not results."""


@dataclass(frozen=True)
class Difference:
    """A setting that differs.

    Args:
        setting: its place, with dots between: `training.lr`.
        a, b: the values of each side, each once; none where it is not recorded.
    """

    setting: str
    a: tuple[Any, ...]
    b: tuple[Any, ...]


def differences(a: Sequence[Record], b: Sequence[Record]) -> tuple[Difference, ...]:
    """Return the settings in which records differ, in the order of a record; seeds are none."""
    ours, theirs = (_values(map(settings, records)) for records in (a, b))
    known = dict.fromkeys([*ours, *theirs])
    found = (Difference(key, *(tuple(side.get(key, {}).values()) for side in (ours, theirs))) for key in known)
    return tuple(one for one in found if _keys(one.a) != _keys(one.b))


def settings(record: Record) -> dict[str, Any]:
    """Return every setting of a record under its place."""
    flat = dict(_flat({key: getattr(record, key) for key in SHOWN}))
    named = {key.removeprefix("config."): value for key, value in flat.items()}
    named.pop("stream.seed", None)  # that of the run
    return named


def same_stream(a: Sequence[Record], b: Sequence[Record]) -> bool:
    """Tell whether results can be held against each other: no setting of the stream that both have recorded differs."""
    about = [one for one in differences(a, b) if one.setting == "stream" or one.setting.startswith("stream.")]
    return not any(one.a and one.b for one in about)


def _values(all_settings: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each setting its values, each once."""
    values: dict[str, dict[str, Any]] = {}
    for one in all_settings:
        for key, value in one.items():
            values.setdefault(key, {})[canonical(value)] = value
    return values


def _flat(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        elif value != {}:
            yield f"{prefix}{key}", value


def _keys(values: Iterable[Any]) -> set[str]:
    return {canonical(value) for value in values}
