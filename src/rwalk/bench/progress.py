"""A bar that shows how far a run is, in terminals and notebooks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from rwalk.bench.trackers import Track


def steps_by_task(spec: Any) -> list[int]:
    """Return how many steps a run has done at the end of each of its tasks."""
    sizes, training = [len(e.train) for e in spec.tasks], spec.training
    seen = accumulate(sizes) if spec.added_name in ("joint", "cumulative") else sizes
    return list(accumulate(-(-size // training.batch_size) * training.epochs for size in seen))


@contextmanager
def bar(spec: Any, tick: Callable[[], None], track: Track, wanted: bool | None) -> Iterator[tuple[Callable[[], None], Track]]:
    """Show a bar for a run; yield what to call after each step and each task, which call `tick` and `track` too.

    Raises:
        ImportError: if a bar is wanted and `tqdm` is not installed.
    """
    shown = wanted if wanted is not None else _is_seen()
    tqdm = _tqdm(wanted is True) if shown else None
    if tqdm is None:
        yield tick, track
        return
    spec.check()  # before its steps are counted
    ends = steps_by_task(spec)
    # notebooks that are executed keep each update as a line, so there are few
    interval = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 2.0
    about = {"desc": spec.method_name, "unit": "step", "leave": wanted is True, "file": sys.stderr, "mininterval": interval}
    with tqdm(total=ends[-1], **about) as shown_bar:

        def step() -> None:
            shown_bar.update()
            tick()

        def task(scalars: dict[str, float], number: int) -> None:
            shown_bar.n = ends[number - 1]
            average = next((value for name, value in scalars.items() if name.startswith("average_")), None)
            known = "" if average is None else f", average {average:.3g}"
            shown_bar.set_postfix_str(f"task {number} of {len(ends)}{known}")
            track(scalars, number)

        yield step, task


def _is_seen() -> bool:
    """Return whether somebody looks at standard error: in a terminal or a notebook."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _tqdm(needed: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        if needed:
            raise ImportError(f"A bar needs the package `tqdm` ({error}). Run: pip install tqdm") from None
        return None
    return tqdm
