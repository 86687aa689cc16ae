"""Many independent runs side by side: in processes of this machine, or on the workers of a Dask cluster."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwalk import files
from rwalk._errors import explain
from rwalk.bench import ranks
from rwalk.bench.record import Record
from rwalk.bench.runner import run

PATIENCE = 10
"""Seconds that a cluster has to answer and to have a worker."""
IDLE = 20
"""Seconds after which a process without work ends, so that none outlives a parent that was killed."""


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result.

    Args:
        cause: the message of an error that the library has explained, the traceback of another one, or that a worker has died.
        known: whether it is the first.
    """

    cause: str
    known: bool = True


def once(place: Path, *arguments: Any, **options: Any) -> tuple[Record, bool]:
    """Return the record of a run, and whether it was on disk; if not, do the run and keep checkpoints and record.

    Of several processes that want the same run one does it, and the others wait for its record. On a machine without the
    folder of `place` nothing is kept.

    Args:
        place: the record's file.
        *arguments: as for `rwalk.bench.run`.
        **options: as for `rwalk.bench.run`.
    """
    if not place.parent.is_dir():
        return run(*arguments, **options), False
    with nullcontext() if ranks.number() else files.alone(place.with_suffix(".lock")):
        return _once(place, *arguments, **options)


def _once(place: Path, *arguments: Any, **options: Any) -> tuple[Record, bool]:
    checkpoint = place.with_suffix(".checkpoint")
    there = ranks.agreed(place.exists())
    record = Record.load(place, exact=True) if there else run(*arguments, checkpoint=checkpoint, **options)
    if ranks.number() == 0:
        if not there:
            record.save(place.parent)
        checkpoint.unlink(missing_ok=True)
    return record, there


def outcomes(
    call: Callable[..., Any],
    jobs: Mapping[Any, tuple[Any, ...]],
    workers: int = 1,
    cluster: str | None = None,
    common: Any = None,
) -> Iterator[tuple[Any, Any]]:
    """Make calls, and yield each one's key and result as it ends; a call that fails yields a `Failure` and stops no other.

    Args:
        call: a function of a module, called with `common` and its job's arguments.
        jobs: for each key the arguments; small, as they are sent for each call.
        workers: processes of this machine; with 1 the calls are made here.
        cluster: address of a Dask scheduler, whose workers are used instead.
        common: sent once to each process; not for clusters.

    Raises:
        ValueError: if a package is missing or the cluster does not answer.
    """
    if workers == 1 and cluster is None:
        for key, arguments in jobs.items():
            yield key, _attempt(call, common, *arguments)
        return
    left = dict(jobs)
    while left:
        with _cluster(cluster) if cluster else _processes(workers, common) as executor:
            lost: dict[Any, Failure] = {}
            for key, result, dead in _round(executor, call, left):
                if dead:
                    lost[key] = result
                else:
                    yield key, result
        if cluster or len(lost) == len(left):
            yield from lost.items()
            return
        # one process that dies takes its pool with it: another pool for the rest, as a cluster does by itself
        left = {key: jobs[key] for key in lost}


def _round(
    executor: Executor, call: Callable[..., Any], jobs: Mapping[Any, tuple[Any, ...]]
) -> Iterator[tuple[Any, Any, bool]]:
    """Yield the key of each job with its result, and whether it got none because a worker died."""
    futures: dict[Future[Any], Any] = {executor.submit(_remotely, call, *arguments): key for key, arguments in jobs.items()}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result(), False
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            came = f"a worker that died or went away ({type(error).__name__}: {reason})"
            remedy = "Look for a lack of memory and use fewer workers; the same command goes on."
            yield futures[future], Failure(explain(came, "workers that stay", remedy), known=False), True


_common: Any = None


def _receive(threads: int, common: Any) -> None:
    """Keep what all calls of this process share; equal results need equal numbers of threads."""
    global _common
    _common = common
    torch.set_num_threads(threads)


def _remotely(call: Callable[..., Any], *arguments: Any) -> Any:
    return _attempt(call, _common, *arguments)


def _attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return a call's result, or why there is none; several ranks have to fail together, so theirs is raised."""
    try:
        return call(*arguments)
    except Exception as error:
        if ranks.size() > 1:
            raise
        known = isinstance(error, ValueError | OSError | ImportError | FloatingPointError)
        return Failure(str(error) if known else traceback.format_exc(), known)


@contextmanager
def _processes(workers: int, common: Any) -> Iterator[Executor]:
    """Lend processes of this machine, which stay for the next calls; if the block is left early, they end at once."""
    try:
        from joblib.externals.loky import get_reusable_executor
    except ImportError as error:
        came, remedy = f"several workers without joblib ({error})", "Run: pip install 'rwalk[bench]'"
        raise ValueError(explain(came, "the package `joblib`", remedy)) from None
    executor = get_reusable_executor(workers, timeout=IDLE, initializer=_receive, initargs=(torch.get_num_threads(), common))
    try:
        yield executor
    except BaseException:
        executor.shutdown(kill_workers=True)
        raise


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    """Connect to a Dask scheduler that has workers; it tries what a dead worker was doing on another one."""
    try:
        from distributed import Client
    except ImportError as error:
        came, remedy = f"a Dask cluster without its package ({error})", "Run: pip install 'rwalk[dask]'"
        raise ValueError(explain(came, "the package `distributed`", remedy)) from None
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        came = f"no answer from a Dask scheduler at `{address}` ({str(error).splitlines()[0]})"
        raise ValueError(explain(came, "an address such as tcp://host:8786", "Start it, or correct `--address`.")) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            came = f"a Dask scheduler at `{address}` without workers"
            raise ValueError(explain(came, "at least one worker", f"Run: dask worker {address} --nthreads 1")) from None
        yield client.get_executor(pure=False)
