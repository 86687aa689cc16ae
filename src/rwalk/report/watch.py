"""What changes in a folder while runs go on, and what there is to say about it."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rwalk.bench.record import Record
from rwalk.bench.underway import underway
from rwalk.report.plain import plain
from rwalk.report.summary import read

KINDS = (".json", ".tuned", ".checkpoint", ".lock")
"""Endings of what is left in a folder: records, what tuning has found, where a run stands, and that somebody is at it."""
NAMED = 3
"""Runs under way that are named in a line."""

Stamps = dict[Path, tuple[int, int]]


@dataclass(frozen=True)
class News:
    """What a folder holds after a change.

    Args:
        records: how many records there are.
        broken: a message for each file that should be a record and is none.
        changed: whether records have come, gone or changed since the last news.
        begun: runs that have begun and have no record, and how far they are.
    """

    records: int
    broken: tuple[str, ...]
    changed: bool
    begun: tuple[str, ...]

    def __str__(self) -> str:
        words = [f"{self.records} record{'s' * (self.records != 1)}" if self.records else "no record yet"]
        words += [f"{len(self.broken)} unreadable"] if self.broken else []
        if self.begun:
            more = f" and {len(self.begun) - NAMED} more" if len(self.begun) > NAMED else ""
            words.append("under way: " + "; ".join(plain(run, 200) for run in self.begun[:NAMED]) + more)
        return ", ".join(words)


def news(folder: Path, every: float) -> Iterator[News]:
    """Look at a folder every so many seconds, without end, and yield what it holds at first and after each change.

    A folder that is not there holds nothing.
    """
    last: Stamps | None = None
    while True:
        now = stamps(folder)
        if now != last:
            changed = last is None or _shown(now) != _shown(last)
            records, problems = _read(folder)
            yield News(len(records), tuple(problems), changed, tuple(map(str, underway(folder))))
            last = now
        time.sleep(every)


def stamps(folder: Path) -> Stamps:
    """Return when each file that runs leave was changed, and its size, or of one out of reach that it is there.

    Files that vanish in between are left out.
    """
    found: Stamps = {}
    with suppress(OSError):  # of a folder that vanishes meanwhile the next look knows
        for path in folder.rglob("*"):
            if path.suffix in KINDS:
                try:
                    about = path.stat()
                    found[path] = about.st_mtime_ns, about.st_size
                except FileNotFoundError:
                    continue
                except OSError:  # a circle of links, or a place that may not be looked at
                    found[path] = 0, 0
    return found


def _read(folder: Path) -> tuple[list[Record], list[str]]:
    try:
        return read(folder)
    except FileNotFoundError:
        return [], []


def _shown(found: Stamps) -> Stamps:
    """Return what the report shows: records, and what tuning has found."""
    return {path: stamp for path, stamp in found.items() if path.suffix in (".json", ".tuned")}
