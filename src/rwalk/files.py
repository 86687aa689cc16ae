"""Files that are whole or not there, whatever happens while they are written."""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rwalk._errors import explain

PART = ".rwalk-{}.part"
STALE = 600
"""Seconds after which an unfinished file belongs to no living process: each is there for the time of one write."""


def write(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Replace a file at once: power may fail, the disk fill up or the process be killed at any moment.

    Raises:
        OSError: if it cannot be written; what was there before is still there.
    """
    path = Path(path)
    part = path.with_name(PART.format(secrets.token_hex(8)))
    try:
        with part.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system has a way."""
    with suppress(OSError):  # Windows opens no folders, and some network disks do not sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritten(path: Path, error: OSError) -> OSError:
    came = f"`{path}`, which cannot be written ({error.strerror or error})"
    ours = type(error)(explain(came, "a folder with room that may be written to", "Make room, or name another folder."))
    ours.errno = error.errno
    return ours


def sweep(folder: str | Path) -> None:
    """Remove what writers that were killed left unfinished in a folder."""
    for part in Path(folder).glob(PART.format("*")):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Let one process at a time do something; others wait here, and one that is killed lets go.

    The file is there while it is done. Systems and network disks without such locks let everybody through.
    """
    handle = None
    with suppress(OSError, ImportError):
        handle = _locked(Path(path))
    try:
        yield
    finally:
        if handle is not None:
            Path(path).unlink(missing_ok=True)
            os.close(handle)


def _locked(path: Path) -> int:
    """Return a handle of the locked file; what was unlinked while we waited locks nothing any more."""
    import fcntl

    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def held(path: str | Path) -> bool:
    """Tell whether somebody is `alone` with a file at this moment; where there are no locks, whether the file is there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once: whoever wants it waits no longer than this
    except (OSError, ImportError):
        return True
    finally:
        os.close(handle)
    return False


def read(path: str | Path) -> bytes:
    """Return what is in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, a pipe or a device, which may have no end.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    return path.read_bytes()


def parse(text: str | bytes) -> Any:
    """Read JSON as the standard has it.

    Raises:
        ValueError: if it is none: damaged, with numbers that are not finite, or nested beyond reason.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")
