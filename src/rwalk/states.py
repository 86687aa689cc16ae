"""State files: tensors, numbers and text in a file of which every bit is checked, and nothing is ever executed.

A state file is a safetensors file. Its tensors are entries named by their place in the state; all else is JSON in the metadata,
beside the format and the SHA-256 of the whole file, taken with zeros where the digest stands.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from rwalk import files
from rwalk._errors import explain

FORMAT = 1
"""Version of the layout of state files."""
WRITERS = {"anchor": "Anchor.save", "consolidator": "Consolidator.save", "checkpoint": "rwalk run", "buffer": "Buffer.save"}
"""Who writes each kind of state file."""
BLANK = b"0" * 64
PIECE = 2**20
"""Bytes that are read at once for a checksum."""
LAYOUTS = {"channels_last": (4, torch.channels_last), "channels_last_3d": (5, torch.channels_last_3d)}
"""Orders of a tensor's elements in memory that a safetensors file does not tell: dimensions, and torch's name."""


def save(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a state file.

    Args:
        path: the file.
        kind: what it holds, one of `WRITERS`.
        content: tensors, numbers, text and None, in dictionaries, lists and tuples; `load` returns the same types.

    Raises:
        TypeError: if the content holds anything else.
        OSError: if the file cannot be written; what was there before is still there.
    """
    packing = _Packing()
    text = json.dumps(packing.plain(content, ""), allow_nan=False)
    metadata = {"format": f"rwalk-{kind}-{FORMAT}", "content": text, "sha256": BLANK.decode()}
    raw = serialise(packing.tensors, metadata)
    start, stop = _place(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    files.write(path, raw[:start], _digest(io.BytesIO(raw), start, stop), memoryview(raw)[stop:])


def load(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a state file that `save` wrote, with all tensors on the CPU, one by one: it needs little more memory than they do.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of a newer format, of another kind or something else, or does not fit into memory.
    """
    try:
        with files.opened(path) as file:
            return _read(file, kind)
    except MemoryError:
        raise ValueError(foreign(path, kind, "which does not fit into memory")) from None
    except ValueError as error:
        raise ValueError(foreign(path, kind, f"which is {error}")) from None


def _read(file: io.BufferedReader, kind: str) -> dict[str, Any]:
    """Read an open file, after a look at its kind, its sizes and its checksum, in this order."""
    head = files.header(file)
    entries = _entries(head)
    metadata = entries.get("__metadata__")
    content = _content(metadata if isinstance(metadata, dict) else {}, kind)
    start, stop = _place(head)
    spans = {name: _span(about) for name, about in entries.items() if name != "__metadata__"}
    if 8 + len(head) + max((end for _, end in spans.values()), default=0) != files.size(file):
        raise ValueError("damaged: it is shorter or longer than its header says")
    if _digest(file, start, stop) != head[start - 8 : stop - 8]:
        raise ValueError("damaged: its checksum is wrong")

    def tensor(name: str) -> Tensor:
        begin, end = spans[name]
        file.seek(8 + len(head) + begin)
        data = bytearray(end - begin)
        file.readinto(data)
        return _tensor(data, entries[name])

    return _unpacked(content, tensor)


def _tensor(data: bytearray, about: dict[str, Any]) -> Tensor:
    """Return the tensor that lies in some memory, as a safetensors header has it; the library knows the kind of numbers."""
    empty = json.dumps({"_": {"dtype": about["dtype"], "shape": [0], "data_offsets": [0, 0]}}).encode()
    dtype, shape = deserialise(len(empty).to_bytes(8, "little") + empty)["_"].dtype, torch.Size(about["shape"])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("a tensor is larger or smaller than its place")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _span(about: Any) -> tuple[int, int]:
    """Return between which places after the header a tensor lies."""
    match about:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError("damaged: a tensor has no place")


def foreign(path: str | Path, kind: str, problem: str) -> str:
    """Say that a file is not what was asked for."""
    remedy = "Update the library." if "newer format" in problem else "Pass such a file, or copy it again."
    return explain(f"`{path}`, {problem}", f"a file that `{WRITERS[kind]}` wrote", remedy)


def _entries(head: bytes) -> dict[str, Any]:
    """Return what a safetensors header says of each tensor, and its metadata; nothing where it makes no sense."""
    try:
        found = files.parse(head)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _content(metadata: dict[str, Any], kind: str) -> str:
    """Return the text of a state in metadata, or raise a ValueError unless it is that of a kind of state file."""
    found = re.fullmatch(r"rwalk-([a-z]+)-([0-9]{1,9})", str(metadata.get("format")))
    content = metadata.get("content")
    if found is None or not isinstance(content, str):
        raise ValueError(f"no {kind} of this format, or damaged")
    if found[1] != kind:
        raise ValueError(f"another kind of state, {found[1]}")
    if int(found[2]) > FORMAT:
        raise ValueError(f"of the newer format {found[2]}")
    return content


def _place(head: bytes) -> tuple[int, int]:
    """Return where in the file the digest stands; quotation marks within other texts are escaped, so none looks like it."""
    found = list(re.finditer(rb'"sha256":"([0-9a-f]{64})"', head))
    if len(found) != 1:
        raise ValueError("damaged: it has no checksum")
    return 8 + found[0].start(1), 8 + found[0].end(1)


def _digest(file: BinaryIO, start: int, stop: int) -> bytes:
    """Return the SHA-256 of a file, in hexadecimal, as if there were zeros from `start` to `stop`."""
    file.seek(0)
    whole = hashlib.sha256(file.read(start) + BLANK)
    file.seek(stop)
    while piece := file.read(PIECE):
        whole.update(piece)
    return whole.hexdigest().encode()


class _Packing:
    """A state on its way to a file: its tensors by name, and everything else as JSON values that name them.

    JSON has no tuples, infinities or keys that are numbers: objects with a key that begins with a dollar sign stand for them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def plain(self, value: Any, place: str) -> Any:
        """Return the JSON value that stands for a part of a state, and keep its tensors."""
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, place.removeprefix("/"))
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, list | tuple):
            entries = [self.plain(v, f"{place}/{i}") for i, v in enumerate(value)]
            return entries if isinstance(value, list) else {"$tuple": entries}
        if isinstance(value, Mapping):
            return self._mapping(value, place)
        came = f"a `{type(value).__name__}` at `{place}` of a state"
        raise TypeError(explain(came, "tensors, numbers, text and None, in lists, tuples and dictionaries", "Convert it."))

    def _mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        items = {key: self.plain(v, f"{place}/{key}") for key, v in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$items": [[self.plain(key, place), v] for key, v in items.items()]}

    def _tensor(self, value: Tensor, name: str) -> dict[str, str]:
        while name in self.tensors or name == "__metadata__":
            name += "'"
        here = value.detach().cpu().contiguous()
        storage = here.untyped_storage().data_ptr()
        self.tensors[name] = here.clone() if storage in self._storages else here  # safetensors writes no storage twice
        self._storages.add(storage)
        return {"$tensor": name} | _layout(value)


def _layout(tensor: Tensor) -> dict[str, str]:
    """Name the order of a tensor's elements in memory, unless it is the usual one."""
    if not tensor.is_contiguous():
        for name, (dimensions, layout) in LAYOUTS.items():
            if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=layout):
                return {"layout": name}
    return {}


def _unpacked(text: str, tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return the state in a file; the reverse of packing."""
    try:
        content = _restored(files.parse(text), tensor)
    except (SafetensorError, ValueError, ArithmeticError, TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"of content that cannot be read: {type(error).__name__} {error}") from None
    if not isinstance(content, dict):
        raise ValueError("no dictionary")
    return content


def _restored(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_restored(value["$tuple"], tensor))
    if "$items" in value:
        return {_restored(key, tensor): _restored(v, tensor) for key, v in value["$items"]}
    if "$tensor" in value:
        found = tensor(value["$tensor"])
        return found.contiguous(memory_format=LAYOUTS[value["layout"]][1]) if "layout" in value else found
    return {key: _restored(v, tensor) for key, v in value.items()}
