"""State files: tensors, numbers and text in a file with a checksum; nothing in it is ever executed.

A state file is a safetensors file. Each tensor is an entry named by its path in the state; everything else is JSON in the
metadata, next to the format and the SHA-256 of the whole file, in which zeros replace the digest itself.
"""

import hashlib
import io
import json
import math
import mmap
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

from rwalk._errors import printable
from rwalk._io import files

FORMAT = 1
"""Version of the layout of state files."""
WRITERS = {"anchor": "Anchor.save", "consolidator": "Consolidator.save", "checkpoint": "rwalk run", "buffer": "Buffer.save"}
"""What writes each kind of state file."""
ZERO_DIGEST = b"0" * 64
PIECE = 2**20
"""Bytes that are read at a time for a checksum."""
LAYOUTS = {"channels_last": (4, torch.channels_last), "channels_last_3d": (5, torch.channels_last_3d)}
"""Memory layouts that safetensors files do not store: the number of dimensions, and the layout of torch."""


def save(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a state file.

    Args:
        path: the file.
        kind: what it holds, one of `WRITERS`.
        content: tensors, numbers, text and None, in dictionaries, lists and tuples; `load` returns the same types.

    Raises:
        TypeError: if the content holds anything else.
        OSError: if the file cannot be written; the old file is unchanged.
    """
    packing = _Packing()
    text = json.dumps(packing.to_json(content, ""), allow_nan=False)
    metadata = {"format": f"rwalk-{kind}-{FORMAT}", "content": text, "sha256": ZERO_DIGEST.decode()}
    raw = serialise(packing.tensors, metadata)
    start, stop = _digest_position(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    files.write(path, raw[:start], _digest(io.BytesIO(raw), start, stop), memoryview(raw)[stop:])


def load(path: str | Path, kind: str, mapped: bool = False) -> dict[str, Any]:
    """Read a state file, with all tensors on the CPU; this takes little more memory than the tensors themselves.

    Args:
        path: the file.
        kind: what it holds, one of `WRITERS`.
        mapped: whether tensors stay in the file, which must then stay as it is; what is written to them is written to a copy.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of a newer format or another kind, no state file, or too large for the memory.
    """
    try:
        with files.opened(path) as file:
            return _read(file, kind, mapped)
    except MemoryError:
        raise ValueError(cannot_load(path, kind, "does not fit into memory")) from None
    except ValueError as error:
        raise ValueError(cannot_load(path, kind, f"is {error}")) from None


def _read(file: io.BufferedReader, kind: str, mapped: bool) -> dict[str, Any]:
    """Read an open file, after checks of its kind, its sizes and its checksum, in this order."""
    head = files.header(file)
    entries = _entries(head)
    metadata = entries.get("__metadata__")
    content = _content(metadata if isinstance(metadata, dict) else {}, kind)
    start, stop = _digest_position(head)
    spans = {name: _span(about) for name, about in entries.items() if name != "__metadata__"}
    if 8 + len(head) + max((end for _, end in spans.values()), default=0) != files.size(file):
        raise ValueError("damaged: it is shorter or longer than its header says")
    if _digest(file, start, stop) != head[start - 8 : stop - 8]:
        raise ValueError("damaged: its checksum is wrong")

    whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if mapped else None

    def tensor(name: str) -> Tensor:
        begin, end = (8 + len(head) + place for place in spans[name])
        if whole is not None:
            return _tensor(whole[begin:end], entries[name])
        file.seek(begin)
        data = bytearray(end - begin)
        file.readinto(data)
        return _tensor(data, entries[name])

    return _unpacked(content, tensor)


def _tensor(data: bytearray | memoryview, about: dict[str, Any]) -> Tensor:
    """Return the tensor in a buffer, as its entry in a safetensors header describes it."""
    empty = json.dumps({"_": {"dtype": about["dtype"], "shape": [0], "data_offsets": [0, 0]}}).encode()
    dtype, shape = deserialise(len(empty).to_bytes(8, "little") + empty)["_"].dtype, torch.Size(about["shape"])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("a tensor is larger or smaller than its place")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _span(about: Any) -> tuple[int, int]:
    """Return where the data of a tensor begin and end, counted from the end of the header."""
    match about:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError("damaged: a tensor has no place")


def cannot_load(path: str | Path, kind: str, problem: str) -> str:
    """Return the message for a file that is not a state file of the kind that was asked for."""
    remedy = "Update the library" if "newer format" in problem else "Copy it again"
    return printable(f"`{path}` {problem}. {remedy}, or pass another file that `{WRITERS[kind]}` wrote.")


def _entries(head: bytes) -> dict[str, Any]:
    """Return the entries of a safetensors header, one for each tensor and the metadata; none if it cannot be read."""
    try:
        found = files.parse(head)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _content(metadata: dict[str, Any], kind: str) -> str:
    """Return the JSON of a state in metadata; raise a ValueError unless they are those of this kind of state file."""
    found = re.fullmatch(r"rwalk-([a-z]+)-([0-9]{1,9})", str(metadata.get("format")))
    content = metadata.get("content")
    if found is None or not isinstance(content, str):
        raise ValueError(f"no {kind} of this format, or damaged")
    if found[1] != kind:
        raise ValueError(f"another kind of state, {found[1]}")
    if int(found[2]) > FORMAT:
        raise ValueError(f"of the newer format {found[2]}")
    return content


def _digest_position(head: bytes) -> tuple[int, int]:
    """Return where the digest begins and ends in the file; as quotation marks in texts are escaped, no text looks like it."""
    found = list(re.finditer(rb'"sha256":"([0-9a-f]{64})"', head))
    if len(found) != 1:
        raise ValueError("damaged: it has no checksum")
    return 8 + found[0].start(1), 8 + found[0].end(1)


def _digest(file: BinaryIO, start: int, stop: int) -> bytes:
    """Return the SHA-256 of a file in hexadecimal, with zeros in the place of `start` to `stop`."""
    file.seek(0)
    whole = hashlib.sha256(file.read(start) + ZERO_DIGEST)
    file.seek(stop)
    while piece := file.read(PIECE):
        whole.update(piece)
    return whole.hexdigest().encode()


class _Packing:
    """Collects the tensors of a state by name, and turns the state into JSON that refers to them.

    Tuples, infinities and keys that are numbers become objects with a key that begins with a dollar sign, as JSON lacks them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def to_json(self, value: Any, place: str) -> Any:
        """Return the JSON for a part of a state, and collect its tensors."""
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, place.removeprefix("/"))
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, list | tuple):
            entries = [self.to_json(v, f"{place}/{i}") for i, v in enumerate(value)]
            return entries if isinstance(value, list) else {"$tuple": entries}
        if isinstance(value, Mapping):
            return self._mapping(value, place)
        raise TypeError(
            f"A state can hold tensors, numbers, text and None, in lists, tuples and dictionaries, but there is a "
            f"`{type(value).__name__}` at `{printable(place)}`. Convert it."
        )

    def _mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        items = {key: self.to_json(v, f"{place}/{key}") for key, v in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$items": [[self.to_json(key, place), v] for key, v in items.items()]}

    def _tensor(self, value: Tensor, name: str) -> dict[str, str]:
        while name in self.tensors or name == "__metadata__":
            name += "'"
        here = value.detach().cpu().contiguous()
        storage = here.untyped_storage().data_ptr()
        self.tensors[name] = here.clone() if storage in self._storages else here  # safetensors writes no storage twice
        self._storages.add(storage)
        return {"$tensor": name} | _layout(value)


def _layout(tensor: Tensor) -> dict[str, str]:
    """Return the memory layout of a tensor as an entry for its JSON; empty if it is contiguous or has no name."""
    if not tensor.is_contiguous():
        for name, (dimensions, layout) in LAYOUTS.items():
            if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=layout):
                return {"layout": name}
    return {}


def _unpacked(text: str, tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return the state in a file: the reverse of packing."""
    try:
        content = _from_json(files.parse(text), tensor)
    except (SafetensorError, ValueError, ArithmeticError, TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"of content that cannot be read: {type(error).__name__} {error}") from None
    if not isinstance(content, dict):
        raise ValueError("no dictionary")
    return content


def _from_json(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_from_json(value["$tuple"], tensor))
    if "$items" in value:
        return {_from_json(key, tensor): _from_json(v, tensor) for key, v in value["$items"]}
    if "$tensor" in value:
        found = tensor(value["$tensor"])
        return found.contiguous(memory_format=LAYOUTS[value["layout"]][1]) if "layout" in value else found
    return {key: _from_json(v, tensor) for key, v in value.items()}
