"""What a folder says of runs that have no record yet: how far each has come, read without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwalk import files
from rwalk.bench.record import is_matrix


@dataclass(frozen=True)
class Underway:
    """A run that has begun.

    Args:
        name: that of its record's file, without the ending.
        accuracy: its accuracy matrix so far, as in a record: one row for each finished task.
        alive: whether a process is at it; if not, it was stopped, and the same command goes on.
    """

    name: str
    accuracy: list[list[float | None]]
    alive: bool

    def __str__(self) -> str:
        done = f"{len(self.accuracy)} of {len(self.accuracy[0])} tasks" if self.accuracy else "first task"
        return f"{self.name}: {done}{'' if self.alive else ', stopped'}"


def underway(folder: str | Path) -> Iterator[Underway]:
    """Yield the runs below a folder that have begun and have no record, in the order of their names."""
    begun = {path.with_suffix("") for kind in ("checkpoint", "lock") for path in Path(folder).rglob(f"*.{kind}")}
    for place in sorted(begun):
        alive, rows = files.held(f"{place}.lock"), measured(f"{place}.checkpoint")
        if (alive or rows) and not Path(f"{place}.json").exists():
            yield Underway(place.name, rows, alive)


def measured(checkpoint: str | Path) -> list[list[float | None]]:
    """Return the accuracy matrix in a checkpoint; none where there is no file, or no sense in it.

    Its checksum is not looked at: whoever goes on from it does so.
    """
    try:
        with files.opened(checkpoint) as file:
            header = files.parse(files.header(file))
        content = files.parse(header["__metadata__"]["content"])
        rows = content["measured"]["accuracy"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return rows if is_matrix(rows) else []
