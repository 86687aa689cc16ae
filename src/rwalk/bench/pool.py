"""Many independent runs side by side: in processes of this machine, or on the workers of a Dask cluster."""

import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.record import Record
from rwalk.bench.spec import RunSpec
from rwalk.bench.stream_spec import StreamSpec
from rwalk.bench.streams import Experience
from rwalk.bench.trackers import Track, quiet, tracker

PATIENCE = 10
"""Seconds that a cluster has to answer and to have a worker."""
IDLE = 20
"""Seconds after which a process without work ends, so that none outlives a parent that was killed."""
LOOK = 0.5
"""Seconds between two calls of `look` while workers train."""


@dataclass(frozen=True)
class Failure:
    """Why a run gave no record.

    Args:
        cause: the message of an error that the library explains, or the traceback of another one, or how a worker died.
        known: whether it is the first.
    """

    cause: str
    known: bool = True


class Outcome(NamedTuple):
    """What a run gave.

    Args:
        result: its record, or why there is none.
        existed: whether the record was on disk already.
        warnings: what was said meanwhile, each text once.
    """

    result: Record | Failure
    existed: bool = False
    warnings: tuple[str, ...] = ()


class Watcher:
    """Sees runs while they are done. This one does nothing; `rwalk.cli.progress` shows them."""

    def hooks(self, spec: RunSpec) -> tuple[Callable[[], None], Track]:  # noqa: ARG002
        """Return what to call after each step and each task of a run in this process."""
        return lambda: None, quiet

    def look(self) -> None:
        """Look at what workers have done so far; called now and then while they train."""


def run_or_load(
    spec: RunSpec,
    folder: Path | None,
    log: str | None = None,
    tick: Callable[[], None] = lambda: None,
    track: Track = quiet,
) -> Outcome:
    """Return the record of a run, from disk if it is there; if not, do the run and keep checkpoints and record.

    Of several processes that want the same run one does it, and the others wait for its record.

    Args:
        spec: the run.
        folder: where the record belongs; nothing is kept without one, or if this machine does not have it.
        log: name of a tracker that writes into a folder beside the record.
        tick: called after each step.
        track: called after each task.
    """
    if folder is None or not folder.is_dir():
        return Outcome(spec.run(tick=tick, track=track))
    place = folder / spec.name
    with files.file_lock(place.with_suffix(".lock")), tracker(log, place.with_suffix("")) as logged:

        def both(scalars: dict[str, float], step: int) -> None:
            logged(scalars, step)
            track(scalars, step)

        checkpoint, existed = place.with_suffix(".checkpoint"), place.exists()
        record = Record.load(place, exact=True) if existed else spec.run(checkpoint, tick, both)
        if not existed:
            record.save(folder)
        checkpoint.unlink(missing_ok=True)
    return Outcome(record, existed)


def outcomes(
    specs: Sequence[RunSpec],
    folder: Path | None = None,
    workers: int = 1,
    cluster: str | None = None,
    *,
    log: str | None = None,
    watcher: Watcher | None = None,
) -> Iterator[tuple[RunSpec, Outcome]]:
    """Do runs, and yield each with its outcome as it ends; one that fails stops no other.

    Args:
        specs: the runs.
        folder: where records belong; none are kept when None.
        workers: processes of this machine; with 1 the runs are done here.
        cluster: address of a Dask scheduler, whose workers are used instead.
        log: name of a tracker.
        watcher: sees runs while they are done.

    Raises:
        ValueError: if a package is missing or the cluster does not answer.
    """
    watcher = watcher or Watcher()
    if workers == 1 and cluster is None:
        for spec in specs:
            yield spec, _attempt(spec, folder, log, *watcher.hooks(spec))
        return
    left = list(specs)
    while left:
        with _cluster(cluster) if cluster else _processes(workers, specs[0]) as executor:
            lost: list[tuple[RunSpec, Outcome]] = []
            for spec, outcome, dead in _round(executor, left, folder, log, watcher):
                if dead:
                    lost.append((spec, outcome))
                else:
                    yield spec, outcome
        if cluster or len(lost) == len(left):
            yield from lost
            return
        # one process that dies takes its pool with it: another pool for the rest, as a cluster does by itself
        left = [spec for spec, _ in lost]


def _round(
    executor: Executor, specs: Iterable[RunSpec], folder: Path | None, log: str | None, watcher: Watcher
) -> Iterator[tuple[RunSpec, Outcome, bool]]:
    """Yield each run with its outcome, and whether it has none because its worker died."""
    futures: dict[Future[Outcome], RunSpec] = {
        executor.submit(run_in_worker, spec.on(()) if _in_memory(spec) else spec, folder, log): spec for spec in specs
    }
    pending = set(futures)
    while pending:
        done, pending = wait(pending, LOOK, FIRST_COMPLETED)
        watcher.look()
        for future in done:
            try:
                yield futures[future], future.result(), False
            except Exception as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                cause = f"A worker died or went away ({type(error).__name__}: {reason})."
                remedy = "If memory ran out, use fewer workers; the same command continues."
                yield futures[future], Outcome(Failure(printable(f"{cause} {remedy}"), known=False)), True


_tasks: Sequence[Experience] = ()
_one_at_a_time = threading.Lock()


def _in_memory(spec: RunSpec) -> bool:
    """Return whether a run has tasks that were made in Python, which each process gets once."""
    return not isinstance(spec.stream, StreamSpec)


def _receive(threads: int, tasks: Sequence[Experience]) -> None:
    """Keep the tasks that all runs of this process share; equal results need equal numbers of threads."""
    global _tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills its workers
    _tasks = tasks
    torch.set_num_threads(threads)


def run_in_worker(spec: RunSpec, folder: Path | None, log: str | None) -> Outcome:
    """Do one run in a worker; its threads take turns, as torch has one random state for them."""
    with _one_at_a_time:
        return _attempt(spec.on(_tasks) if _in_memory(spec) else spec, folder, log)


def _attempt(spec: RunSpec, folder: Path | None, log: str | None, *hooks: Any) -> Outcome:
    """Return a run's outcome, whatever happens in it."""
    with warnings.catch_warnings(record=True) as said:
        try:
            outcome = run_or_load(spec, folder, log, *hooks)
        except Exception as error:
            known = isinstance(error, ValueError | OSError | ImportError | FloatingPointError)
            outcome = Outcome(Failure(str(error) if known else traceback.format_exc(), known))
    return outcome._replace(warnings=tuple(dict.fromkeys(str(one.message) for one in said)))


@contextmanager
def _processes(workers: int, spec: RunSpec) -> Iterator[Executor]:
    """Lend processes of this machine, which stay for the next runs; if the block is left early, they end at once."""
    try:
        from loky import get_reusable_executor
    except ImportError as error:
        raise ValueError(f"Several workers need the package `loky` ({error}). Run: pip install 'rwalk[bench]'") from None
    tasks = spec.tasks if _in_memory(spec) else ()
    executor = get_reusable_executor(workers, timeout=IDLE, initializer=_receive, initargs=(torch.get_num_threads(), tasks))
    try:
        yield executor
    except BaseException:
        executor.shutdown(kill_workers=True)
        raise


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    """Connect to a Dask scheduler that has workers; it does the runs of a dead worker on another one."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"A Dask cluster needs the package `distributed` ({error}). Run: pip install 'rwalk[dask]'") from None
    where = printable(address, "")
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        reason = printable(str(error).splitlines()[0])
        raise ValueError(
            f"No Dask scheduler answers at `{where}` ({reason}). Start it, or correct --address, such as tcp://host:8786."
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise ValueError(f"The Dask scheduler at `{where}` has no workers. Run: dask worker {where} --nthreads 1") from None
        yield client.get_executor(pure=False)
