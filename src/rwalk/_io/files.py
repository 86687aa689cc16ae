"""Files that are written completely or not at all, and JSON files with a checksum."""

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

from rwalk._errors import printable

PART = ".rwalk-{}.part"
STALE = 600
"""Age in seconds at which an unfinished file was left by a process that died: it exists only while one file is written."""
LARGEST = 2**32
"""Bytes of the largest JSON file that is read: the accuracies of 10,000 tasks, the most of a stream, take 2.5 GB."""
UNCHECKED = 64_000_000
"""Bytes beyond which a file is read only if it ends with a checksum; the record of 100 tasks takes 1 MB."""
END = re.compile(rb'"sha256": "[0-9a-f]{64}"\s*\}\s*\Z')

LONGEST = 100_000_000
"""Bytes of the longest header that safetensors reads."""


def write(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Replace a file atomically: a full disk, a killed process or a power failure leaves the old file or the new one.

    A link is kept, and its target is replaced. The new file has the permissions of the old one.

    Raises:
        OSError: if the file cannot be written, or is a folder, a pipe or a device; the old file is unchanged.
    """
    target, before = _target(path)
    part = target.with_name(PART.format(secrets.token_hex(8)))
    try:
        with open(part, "xb", opener=_open_private if before else None) as file:
            if before:
                _copy_permissions(part, before)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
    _fsync_directory(target.parent)


def _target(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Return the file that a path leads to, and its status; None if there is no file yet."""
    try:
        target = Path(os.path.realpath(path))
        before = target.lstat()
    except FileNotFoundError:
        return target, None
    except OSError as error:
        raise _cannot_write(path, error) from error
    except ValueError as error:
        raise ValueError(f"No file can have the name {str(path)!r} ({error}). Correct it.") from None
    if stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(printable(f"`{path}` cannot be written: it is a folder. Name a file."))
    if not stat.S_ISREG(before.st_mode):
        raise OSError(
            printable(f"`{path}` cannot be written: it is a pipe, a device, a socket or a circle of links. Name another file.")
        )
    return target, before


def check(path: str | Path) -> None:
    """Check before a long run that a file can be written at its end.

    Raises:
        OSError: if the path is a folder, a pipe or a device, or its folder does not exist.
    """
    target, _ = _target(path)
    if not target.parent.is_dir():
        raise _cannot_write(path, FileNotFoundError(errno.ENOENT, f"there is no folder `{target.parent}`"))


def _open_private(path: str, flags: int) -> int:
    """Open a new file that only its owner may read."""
    return os.open(path, flags, 0o600)


def _copy_permissions(part: Path, before: os.stat_result) -> None:
    """Give a new file the owner and the permissions of the file that it will replace."""
    with suppress(OSError, AttributeError):  # only root may give files away, and Windows has no owners
        os.chown(part, before.st_uid, before.st_gid)
    with suppress(OSError):  # some network disks have no permissions
        os.chmod(part, stat.S_IMODE(before.st_mode))


def _fsync_directory(folder: Path) -> None:
    """Make a rename survive a power failure, if the system can."""
    with suppress(OSError):  # Windows opens no folders, and some network disks do not sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def folder(path: str | Path) -> None:
    """Create a folder and its parents, unless they exist.

    Raises:
        OSError: if that fails.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | Path, error: OSError) -> OSError:
    came = printable(f"`{path}` cannot be written ({error.strerror or error})")
    ours = type(error)(f"{came}. Make room, or name a folder with room that you may write to.")
    ours.errno = error.errno
    return ours


def sweep(folder: str | Path) -> None:
    """Remove the unfinished files that killed processes have left in a folder."""
    for part in Path(folder).glob(PART.format("*")):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold a lock that one process at a time can have; others wait, and a process that is killed releases it.

    The file exists while the lock is held. On systems and network disks without such locks nobody waits.
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
    """Return a handle of the locked file; try again if the file was removed while this process waited for it."""
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


def is_locked(path: str | Path) -> bool:
    """Return whether a `file_lock` is held at this moment; on systems without locks, whether the file exists."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe of that name would wait for a writer
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once
    except (OSError, ImportError):
        return True
    finally:
        os.close(handle)
    return False


def opened(path: str | Path) -> BufferedReader:
    """Open a file to read it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, a pipe or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    return path.open("rb")


def size(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def header(file: BinaryIO) -> bytes:
    """Return the JSON at the beginning of a safetensors file, after its length in eight bytes; empty if that cannot be."""
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if length <= min(LONGEST, size(file) - 8) else b""


def seal(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its content; infinities and NaN become null.

    Raises:
        OSError: if the file cannot be written; the old file is unchanged.
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
    if size(file) > UNCHECKED:
        file.seek(-100, os.SEEK_END)
        if not END.search(file.read()):
            raise ValueError(f"larger than {UNCHECKED // 10**6} MB, and without a checksum at its end")
        file.seek(0)


def as_json(content: Any) -> Any:
    """Return content as it is read from a file: tuples become lists, keys text, infinities and NaN null."""
    return json.loads(json.dumps(_finite(content)))


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by null: a penalty may overflow if a run diverges."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON content, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: if it is damaged, nested too deeply, or has infinities or NaN, which JSON lacks.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")
