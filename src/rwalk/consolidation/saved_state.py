"""Saving and loading, the part of the consolidator's face that every checkpoint goes through."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwalk._io import states
from rwalk._parameters import named_parameters
from rwalk.consolidation import misuse, saving, state_checks
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.step import StepObserver
from rwalk.distributed import checkpoint


class SavedState:
    """What a consolidator has learned as a dictionary or a file."""

    _memory: Memory
    _observer: StepObserver

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue, mid-task included, as plain tensors and numbers, copied.

        Under `fully_shard` the tensors are DTensors, as `torch.distributed.checkpoint` takes them, and all ranks have to call.
        """
        self._observer.resolve()
        self._memory.theta()  # what grew or was replaced is saved as it is now, and can be loaded into the model as it is now
        self._memory.follow_replaced()
        return saving.content(self._memory)

    def blank_state_dict(self, folder: str | Path, key: str) -> dict[str, Any]:
        """Return a state dictionary into which `torch.distributed.checkpoint` can load a saved one, on any number of ranks.

        A state's content depends on how much was trained, and `torch.distributed.checkpoint.load` fills only what it is given.
        So pass `{KEY: memory.blank_state_dict(FOLDER, KEY)}` to it, and what it has filled to `load_state_dict`.

        Args:
            folder: the checkpoint, as `torch.distributed.checkpoint.save` wrote it. Its metadata are a pickle, which is read
                here without running any of it; but `torch.distributed.checkpoint.load` unpickles the same file, so pass only
                checkpoints that you trust.
            key: the key under which the `state_dict` was saved.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if its metadata cannot be read, or hold no such state.
        """
        return checkpoint.empty_state(folder, key, named_parameters(self._memory.model), state_checks.GROUPS)  # type: ignore[no-any-return]

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same model and rule; on an error nothing changes.

        Raises:
            ValueError: if the state is of another format, rule or model; the message names the difference.
        """
        misuse.refuse_lent(self._memory)
        saving.restore(self._memory, state_dict)
        self._memory.loaded = True
        self._observer.forget_pending()

    @torch.inference_mode(False)
    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all, with a checksum and without pickle.

        Under `fully_shard` all ranks have to call; the first one gathers and writes.
        """
        content = self.state_dict()
        checkpoint.save_once(content, self._memory.protected.shard_group, partial(states.save, path, "consolidator"))

    @torch.inference_mode(False)
    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote under the same model and rule; on an error nothing changes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else, or of another rule or model; the message names the difference.
        """
        self.load_state_dict(states.load(path, "consolidator"))
