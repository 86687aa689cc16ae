"""States in distributed checkpoints: an empty state to load one into, and the metadata, a pickle read without running it."""

import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwalk._errors import printable
from rwalk._io import files
from rwalk.distributed.shards import ShardGroup, as_dtensor, full_tensors, local, sharded

KNOWN_NAMES = {
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "builtins": {"getattr"},  # by which Python before 3.11.4 names a value of an enumeration; here, too, it does nothing
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip
"""What such files name, besides `torch.Size` and the dtypes of torch."""
SIZED_OPERATIONS = {"PUT", "LONG_BINPUT", "FRAME"}
"""Operations whose number makes the reader allocate memory: an index in its table of objects, or a number of bytes to read."""
LARGEST = 2**30
"""Bytes of the largest metadata that are read; each part of a tensor takes about 200."""


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint."""

    size: torch.Size
    dtype: torch.dtype


class _StandIn:
    """Takes the place of an object: accepts any arguments, and keeps its attributes."""

    state: Any

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a harmless class for each known name, and refuse all others."""
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in KNOWN_NAMES.get(module, ()):
            return type(name, (_StandIn,), {})
        raise ValueError(f"it names `{module}.{name}`, which no such file holds")


def read_metadata(folder: str | Path) -> dict[tuple[Any, ...], StoredTensor | None]:
    """Return what a distributed checkpoint holds: a tensor, or None for anything else, by its path in what was saved.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the metadata are damaged, or hold what `torch.distributed.checkpoint.save` does not write.
    """
    try:
        with files.opened(Path(folder) / ".metadata") as file:
            about = _MetadataUnpickler(_bounded_pickle(file)).load().state
        entries, paths = about["state_dict_metadata"], about["planner_data"]
        return {_checked_path(path): _stored_tensor(entries[name]) for name, path in paths.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        why = printable(f"`{folder}` cannot be read ({str(error) or type(error).__name__})")
        raise ValueError(
            f"The metadata of the checkpoint {why}. `torch.distributed.checkpoint.save` writes such a folder; "
            "copy it again, or pass another one."
        ) from None


def _bounded_pickle(file: BufferedReader) -> BytesIO:
    """Read a pickle, and refuse one that asks for more memory than its own size: a few damaged bytes may ask for all of it."""
    if files.size(file) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB")
    raw = file.read()
    for operation, number, place in pickletools.genops(raw):
        if operation.name in SIZED_OPERATIONS and (number or 0) > len(raw):
            raise ValueError(f"at byte {place} it asks for more than its own size")
    return BytesIO(raw)


def _checked_path(path: Any) -> tuple[Any, ...]:
    if not isinstance(path, tuple) or not path:
        raise ValueError("a tensor without a path")
    return path


def _stored_tensor(entry: Any) -> StoredTensor | None:
    if type(entry).__name__ != "TensorStorageMetadata":
        return None
    dtype = entry.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a dtype")
    return StoredTensor(torch.Size(entry.state["size"]), dtype)


def empty_state(folder: Any, key: str, parameters: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> Any:
    """Return a state to load a distributed checkpoint into: its layout, with empty tensors sharded as the parameters are.

    Args:
        folder: the checkpoint, as `torch.distributed.checkpoint.save` wrote it.
        key: the key of the state in what was saved.
        parameters: the model's parameters by name.
        groups: the paths of dictionaries in the state that exist even if they are empty: checkpoints drop empty ones.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if its metadata cannot be read, or hold no such state.
    """
    found = read_metadata(folder)
    stored = {path[1:]: tensor for path, tensor in found.items() if path[0] == key}
    if not stored:
        keys = ", ".join({f"`{path[0]}`": None for path in found})
        came = printable(f"`{folder}` holds nothing under `{key}`, but under {keys}")
        raise ValueError(f"The checkpoint {came}. Pass the key that the state was saved under.")
    try:
        return _empty_tree(stored, parameters, groups)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        came = printable(f"`{folder}` holds no state of a consolidator under `{key}` ({type(error).__name__} {error})")
        raise ValueError(
            f"The checkpoint {came}. Save what `Consolidator.state_dict` returns, and pass the key that it is saved under."
        ) from None


def _empty_tree(
    stored: Mapping[tuple[Any, ...], StoredTensor | None], parameters: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> Any:
    names: list[Any] = list(dict.fromkeys(path[1] for path in stored if path[0] == "shapes"))
    tree: Any = {}
    for group in groups:
        _insert(tree, group, {})
    for path, tensor in stored.items():
        leaf: Any = None
        if tensor is not None:
            name = names[path[2]] if path[0] == "state" and len(path) == 3 else path[-1]
            leaf = _empty_tensor(tensor, parameters.get(name))
        _insert(tree, path, leaf)
    return _dicts_to_lists(tree)


def _empty_tensor(stored: StoredTensor, like: Tensor | None) -> Tensor:
    """Return an empty tensor for a stored one, sharded as a parameter is if it has the parameter's shape."""
    if like is None or not sharded(like) or like.shape != stored.size:
        return torch.empty(stored.size, dtype=stored.dtype)
    return as_dtensor(torch.empty_like(local(like), dtype=stored.dtype), like)


def _insert(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = leaf


def _dicts_to_lists(tree: Any) -> Any:
    """Turn dictionaries whose keys count from 0 into lists."""
    if not isinstance(tree, dict):
        return tree
    inside = {key: _dicts_to_lists(value) for key, value in tree.items()}
    return [inside[i] for i in range(len(inside))] if inside and all(isinstance(key, int) for key in inside) else inside


def save_once(content: Any, ranks: ShardGroup, save: Callable[[Any], None]) -> None:
    """Have the first rank save a state with full tensors; all ranks return once it is saved."""
    if not ranks.groups:
        return save(content)
    full = full_tensors(content)
    try:
        if ranks.first:
            save(full)
    finally:
        ranks.sums([0])  # no rank continues to read what is not written yet
    return None
