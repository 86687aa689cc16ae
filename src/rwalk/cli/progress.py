"""Shows runs while they are done: a bar for each in a terminal, and a line for each finished run everywhere else."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from rwalk._io import files
from rwalk.bench.checkpoint import scores_so_far
from rwalk.bench.pool import Watcher
from rwalk.bench.progress import steps_by_task
from rwalk.bench.spec import RunSpec
from rwalk.bench.trackers import Track
from rwalk.report.metric import score_in_words


class Display(Watcher):
    """Bars for the runs that are being done, with the mean score so far and the time left.

    Args:
        console: where to.
        labels: the name of each run to do.
        folder: where workers keep their checkpoints.
        page: called after each task of a run, to write the report anew if it is time.
        live: whether to draw bars; default: in a terminal that can move its cursor, except those of CI services, whose logs
            keep every frame.
    """

    def __init__(
        self,
        console: Console,
        labels: dict[RunSpec, str],
        folder: Path,
        page: Callable[[], None] = lambda: None,
        live: bool | None = None,
    ) -> None:
        self.labels, self.folder, self.page = labels, folder, page
        self.bars: dict[RunSpec, Task] = {}
        can = console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("CI")
        name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        mean = TextColumn("{task.fields[mean]}", markup=False)
        columns = name, BarColumn(max(4, min(30, console.width - 60))), TaskProgressColumn(), mean, TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not (can if live is None else live))
        self.total = self.progress.add_task("all runs", total=len(labels), mean="")

    def hooks(self, spec: RunSpec) -> tuple[Callable[[], None], Track]:
        """Begin a run in this process, and return what to call after each step and each task."""
        if self.progress.disable:
            return lambda: None, lambda *_: self.page()
        bar = self._begin(spec)

        def track(scalars: dict[str, float], step: int) -> None:
            self._learned(bar, [scalars.get(f"{bar.fields['metric']}/task_{j + 1}") for j in range(step)])
            self.page()

        return partial(self.progress.advance, bar.id), track

    def look(self) -> None:
        """Show what workers do, by their locks and checkpoints."""
        self.page()
        for spec in () if self.progress.disable else self.labels:
            place = self.folder / spec.name
            if files.is_locked(place.with_suffix(".lock")):
                bar, rows = self.bars.get(spec) or self._begin(spec), scores_so_far(place.with_suffix(".checkpoint"))
                if rows and len(rows) <= len(bar.fields["ends"]):
                    self._learned(bar, rows[-1][: len(rows)])

    def end(self, spec: RunSpec) -> None:
        """Take the bar of a run away."""
        if (bar := self.bars.pop(spec, None)) is not None:
            self.progress.remove_task(bar.id)
        self.progress.advance(self.total)

    def _begin(self, spec: RunSpec) -> Task:
        """Add the bar of a run; its `ends` are the steps up to the end of each task."""
        ends = steps_by_task(spec)
        self.progress.add_task(self.labels[spec], total=ends[-1], mean="", ends=ends, metric=spec.tasks[0].metric)
        self.bars[spec] = self.progress.tasks[-1]
        return self.bars[spec]

    def _learned(self, bar: Task, row: Sequence[float | None]) -> None:
        known, ends = [a for a in row if a is not None], bar.fields["ends"]
        mean = f"{score_in_words(fmean(known), bar.fields['metric'])} after {len(row)} of {len(ends)} tasks" if known else ""
        self.progress.update(bar.id, completed=ends[len(row) - 1], mean=mean)
