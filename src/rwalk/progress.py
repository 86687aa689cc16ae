"""Shows runs while they are done: bars and accuracies so far in a terminal, a plain line now and then everywhere else."""

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from threading import Event, RLock, Thread
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from rwalk import files
from rwalk.bench.underway import measured
from rwalk.report.plain import say

REDRAW = 0.1
"""Seconds between two looks at how far a run is: bars are not drawn more often."""
LOOK = 0.5
"""Seconds between two looks at the checkpoints of workers."""
SILENCE = 10.0
"""Seconds that pass at least between two lines about tasks where there are no bars: a log stays short and does not stall."""
ROOM = 60
"""Characters of accuracies in a line of a log."""

Row = Sequence[float | None]


@dataclass
class _Run:
    """One run on the display; `steps` are those up to the end of each task, `begun` those of an earlier attempt."""

    label: str
    steps: list[int]
    bar: TaskID | None = None
    start: float = 0.0
    begun: int = 0
    done: int = 0
    drawn: float = 0.0
    row: Row = field(default_factory=list)


class Display:
    """Bars for all runs and for each that is under way, with its accuracy on each task so far and the time that is left.

    Args:
        console: where to; nothing is shown if it is quiet.
        live: whether to draw bars; default: in a terminal that can move its cursor, but for those of CI services, whose logs
            keep every frame.
    """

    def __init__(self, console: Console, live: bool | None = None) -> None:
        self.console = console
        can = console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("CI")
        self.live = not console.quiet and (can if live is None else live)
        self._runs: dict[Hashable, _Run] = {}
        self._all = _Run("all runs", [0])
        self._bars = _Bars(console, self._rows, self.live)
        self._lock, self._said = RLock(), time.monotonic()

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def expecting(self, jobs: Mapping[Any, tuple[str, Iterable[int]]]) -> Iterator[None]:
        """Show runs that are to be done, each given as its name and the steps of each of its tasks."""
        self._runs = {key: _Run(label, list(accumulate(steps))) for key, (label, steps) in jobs.items()}
        self._all = _Run("all runs", [max(1, sum(run.steps[-1] for run in self._runs.values()))])
        self._open(self._all)
        try:
            yield
        finally:
            for key in list(self._runs):
                self.end(key)
            self._close(self._all)

    def begin(self, key: Hashable, accuracy: Sequence[Row] = ()) -> None:
        """Show that a run begins, after those tasks of an earlier attempt that an accuracy matrix has rows for."""
        with self._lock:
            run = self._runs.get(key)
            if run is not None and run.bar is None:
                if 0 < len(accuracy) <= len(run.steps):
                    run.begun = run.done = run.steps[len(accuracy) - 1]
                    run.row = accuracy[-1][: len(accuracy)]
                self._all.begun += run.begun
                self._all.done += run.begun
                self._open(run)
                self._advance(run, 0)

    def tick(self, key: Hashable) -> Callable[[], None]:
        """Return what to call after each training step of a run."""
        run = self._runs.get(key)
        return (lambda: self._advance(run, 1)) if run is not None and self.live else lambda: None

    def learned(self, key: Hashable, row: Row) -> None:
        """Show the accuracy on each task so far, after a task."""
        with self._lock:
            run = self._runs.get(key)
            if run is None or not 0 < len(row) <= len(run.steps):
                return
            run.row = row
            self._advance(run, run.steps[len(row) - 1] - run.done, True)
            self._bars.refresh()
            if not self.live and time.monotonic() - self._said >= SILENCE:
                self.say(f"{run.label}: task {len(row)} of {len(run.steps)}, {shortened(row, ROOM)}")

    def end(self, key: Hashable) -> None:
        """Show a run no more."""
        with self._lock:
            run = self._runs.pop(key, None)
            if run is not None:
                self._advance(run, run.steps[-1] - run.done, True)
                self._close(run)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._said = time.monotonic()
        say(self.console, line)

    @contextmanager
    def following(self, checkpoints: Mapping[Any, Path]) -> Iterator[None]:
        """Show what other processes do, as far as the checkpoints of their runs say."""
        stop = Event()

        def follow() -> None:
            while not stop.wait(LOOK):
                for key, place in checkpoints.items():
                    if key in self._runs and files.held(place.with_suffix(".lock")):
                        self._look(key, measured(place))

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _look(self, key: Hashable, accuracy: Sequence[Row]) -> None:
        self.begin(key, accuracy)
        run = self._runs.get(key)
        if run is not None and len(accuracy) > len(run.row):
            self.learned(key, accuracy[-1][: len(accuracy)])

    def _open(self, run: _Run) -> None:
        run.start = time.monotonic()
        run.bar = self._bars.add_task(run.label, total=run.steps[-1], completed=run.done, ends=None)

    def _close(self, run: _Run) -> None:
        if run.bar is not None:
            self._bars.remove_task(run.bar)
            run.bar = None

    def _advance(self, run: _Run, steps: int, now: bool = False) -> None:
        """Count steps of a run and of all; draw them if it is time."""
        run.done += steps
        self._all.done += steps
        if now or time.monotonic() - run.drawn >= REDRAW:
            for one in (run, self._all):
                self._draw(one)

    def _draw(self, run: _Run) -> None:
        if run.bar is not None:
            run.drawn = time.monotonic()
            fresh, left = run.done - run.begun, run.steps[-1] - run.done
            ends = run.drawn + (run.drawn - run.start) * left / fresh if fresh > 0 else None
            self._bars.update(run.bar, completed=run.done, ends=ends)

    def _rows(self) -> Iterator[str]:
        for run in list(self._runs.values()):
            if run.bar is not None and run.row:
                name = f"{run.label} "
                yield name + shortened(run.row, self.console.width - len(name))


class _Bars(Progress):
    """Bars, and below them the accuracies so far."""

    def __init__(self, console: Console, rows: Callable[[], Iterator[str]], live: bool) -> None:
        self._row_texts = rows
        name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = BarColumn(max(4, min(30, console.width - 50)))
        percent = TextColumn("{task.percentage:>3.0f} %")
        super().__init__(name, bar, percent, _Left(), console=console, transient=True, disable=not live)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for text in self._row_texts():
            yield Text(text, no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """The time that is left, if all goes on at the pace so far."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        left = "-:--:--" if ends is None else str(timedelta(seconds=max(0, round(ends - time.monotonic()))))
        return Text(f"{left} left", no_wrap=True)


def shortened(row: Row, room: int) -> str:
    """Write accuracies in percent, then their mean; of many the first and the last ones, in so many characters if it can be."""
    words = ["-" if a is None else f"{100 * a:.0f}" for a in row]
    known = [a for a in row if a is not None]
    mean = f", mean {100 * fmean(known):.1f} %" if known else ""
    for kept in range(len(words), min(len(words), 2) - 1, -1):
        half = kept // 2
        shown = words if kept == len(words) else [*words[: kept - half], "..", *words[-half:]]
        if len(text := " ".join(shown) + mean) <= room:
            return text
    return mean.removeprefix(", ")
