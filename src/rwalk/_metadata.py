"""The metadata of a distributed checkpoint, which is a pickle: read without running anything of it.

Classes and functions that a pickle names are looked up in a table of what `torch.distributed.checkpoint` writes there, and
stand-ins that do nothing take their place; anything else is refused.
"""

import pickle
import pickletools
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwalk import files
from rwalk._errors import explain

NAMED = {
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip
"""What such files name, beside `torch.Size` and torch's kinds of numbers."""
SIZED = {"PUT", "LONG_BINPUT", "FRAME"}
"""Operations whose number makes the reader ask for memory: the place of an object in its table, or how much to read ahead."""
LARGEST = 2**30
"""Bytes of the largest metadata that are read; they take about 200 for each part of a tensor."""


class Stored(NamedTuple):
    """One tensor of a checkpoint: its shape, and the kind of its numbers."""

    size: torch.Size
    dtype: torch.dtype


class _StandIn:
    """In the place of an object: it takes whatever that one is made from, and keeps its attributes."""

    state: Any

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in NAMED.get(module, ()):
            return type(name, (_StandIn,), {})
        raise ValueError(f"it names `{module}.{name}`, which no such file holds")


def read(folder: str | Path) -> dict[tuple[Any, ...], Stored | None]:
    """Return what a distributed checkpoint holds: for each place in what was saved a tensor, or None for anything else.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if its metadata are none, or hold what `torch.distributed.checkpoint.save` does not write.
    """
    try:
        with files.opened(Path(folder) / ".metadata") as file:
            about = _Reader(_modest(file)).load().state
        entries, places = about["state_dict_metadata"], about["planner_data"]
        return {_path(place): _stored(entries[name]) for name, place in places.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        came = f"`{folder}`, whose metadata cannot be read ({str(error) or type(error).__name__})"
        expected = "a checkpoint that `torch.distributed.checkpoint.save` wrote"
        raise ValueError(explain(came, expected, "Copy it again, or pass its folder.")) from None


def _modest(file: BufferedReader) -> BytesIO:
    """Return a pickle that asks for no more memory than its own size allows; damaged, a few bytes may ask for all there is."""
    if files.size(file) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB")
    raw = file.read()
    for operation, number, place in pickletools.genops(raw):
        if operation.name in SIZED and (number or 0) > len(raw):
            raise ValueError(f"at byte {place} it asks for more than its own size")
    return BytesIO(raw)


def _path(place: Any) -> tuple[Any, ...]:
    if not isinstance(place, tuple) or not place:
        raise ValueError("a tensor without a place")
    return place


def _stored(entry: Any) -> Stored | None:
    if type(entry).__name__ != "TensorStorageMetadata":
        return None
    dtype = entry.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a kind of numbers")
    return Stored(torch.Size(entry.state["size"]), dtype)
