"""Files that are whole or not there, whatever happens while they are written, and JSON files that know their checksum."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from rwalk._errors import explain

PART = ".rwalk-{}.part"
STALE = 600
"""Seconds after which an unfinished file belongs to no living process: each is there for the time of one write."""
LARGEST = 2**32
"""Bytes of the largest JSON file that is read. A stream has at most 10,000 tasks, whose accuracies, each on every task, take at
most 2.5 GB; the record of a hundred tasks takes about 1 MB."""
USUAL = 64_000_000
"""Bytes beyond which a file is read only if it ends as `seal` ends one: most records take kilobytes."""
END = re.compile(rb'"sha256": "[0-9a-f]{64}"\s*\}\s*\Z')

LONGEST = 100_000_000
"""Bytes of a header beyond which safetensors reads no file."""


def write(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Replace a file at once: power may fail, the disk fill up or the process be killed at any moment.

    A link stays, and what it leads to is replaced; a file that is replaced keeps its permissions.

    Raises:
        OSError: if it cannot be written, or is a folder, a pipe or a device; what was there before is still there.
    """
    target, before = _target(path)
    part = target.with_name(PART.format(secrets.token_hex(8)))
    try:
        with open(part, "xb", opener=_shut if before else None) as file:
            if before:
                _permit(part, before)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
    _settle(target.parent)


def _target(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Return the file that a path leads to, and what is known of it; None where there is none yet."""
    try:
        target = Path(os.path.realpath(path))
        before = target.lstat()
    except FileNotFoundError:
        return target, None
    except OSError as error:
        raise _unwritten(path, error) from error
    except ValueError as error:
        raise ValueError(explain(f"a path that no file can have ({error})", "the name of a file", "Correct it.")) from None
    if not stat.S_ISREG(before.st_mode):
        kind, refusal = "pipe, a device, a socket or a circle of links", OSError
        if stat.S_ISDIR(before.st_mode):
            kind, refusal = "folder", IsADirectoryError
        came = f"`{path}`, which cannot be written: it is a {kind}"
        raise refusal(explain(came, "a file, or a name that is free", "Name another one."))
    return target, before


def check(path: str | Path) -> None:
    """Refuse a place where no file can be written, while there is nothing to lose yet.

    Raises:
        OSError: if a folder, a pipe or a device is there, or a link into a folder that is not.
    """
    target, _ = _target(path)
    if not target.parent.is_dir():
        raise _unwritten(path, FileNotFoundError(errno.ENOENT, f"there is no folder `{target.parent}`"))


def _shut(path: str, flags: int) -> int:
    """Open a new file that nobody else may read."""
    return os.open(path, flags, 0o600)


def _permit(part: Path, before: os.stat_result) -> None:
    """Give a new file the owner and the permissions of the one that it is going to replace."""
    with suppress(OSError, AttributeError):  # others' files stay theirs if we may give files away; Windows has no owners
        os.chown(part, before.st_uid, before.st_gid)
    with suppress(OSError):  # some network disks have no permissions
        os.chmod(part, stat.S_IMODE(before.st_mode))


def _settle(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system has a way."""
    with suppress(OSError):  # Windows opens no folders, and some network disks do not sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def folder(path: str | Path) -> None:
    """Make a folder, and those that it lies in, unless it is there.

    Raises:
        OSError: if it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: str | Path, error: OSError) -> OSError:
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
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe of that name would wait for a writer
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


def opened(path: str | Path) -> BufferedReader:
    """Open a file to read it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, a pipe or a device, which may have no end.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    return path.open("rb")


def size(file: BinaryIO) -> int:
    """Return how many bytes an open file has."""
    return os.fstat(file.fileno()).st_size


def header(file: BinaryIO) -> bytes:
    """Return the JSON that a safetensors file begins with, after eight bytes that say how long it is."""
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if length <= min(LONGEST, size(file) - 8) else b""


def seal(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its content; numbers that JSON lacks become null.

    Raises:
        OSError: if the file cannot be written; what was there before is still there.
    """
    plain = as_json(content)
    write(path, json.dumps(plain | {"sha256": digest(plain)}, indent=1, allow_nan=False).encode())


def unseal(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file that `seal` wrote, without its checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is anything else, or was changed since it was written.
    """
    try:
        with opened(path) as file:
            _check_size(file)
            if (start := file.read(1)) != b"{":
                raise ValueError("not a JSON object")
            content = parse((start + file.read()).decode())
        if "sha256" not in content:
            raise ValueError("without its checksum: damaged, or written by an early version")
        if content.pop("sha256") != digest(content):
            raise ValueError("damaged or edited since it was written: its checksum is wrong")
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply, or too large for this machine's memory") from None
    return content  # type: ignore[no-any-return]


def _check_size(file: BinaryIO) -> None:
    """Raise a ValueError if an open file is larger than what `seal` writes."""
    if size(file) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB")
    if size(file) > USUAL:
        file.seek(-100, os.SEEK_END)
        if not END.search(file.read()):
            raise ValueError(f"larger than {USUAL // 10**6} MB, and without a checksum at its end")
        file.seek(0)


def as_json(content: Any) -> Any:
    """Return content as a file gives it back: lists for tuples, text for keys, null for numbers that JSON lacks."""
    return json.loads(json.dumps(_finite(content)))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON lacks by null: a penalty may overflow where a run diverges."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
