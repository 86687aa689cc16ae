"""The Trainer that runs now: callbacks find it only in its stack frame."""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer


def running_trainer() -> tuple[Trainer, str | None]:
    """Return the running Trainer and the folder that it resumes from."""
    known = _training_frame().f_locals
    return known["self"], known["resume_from_checkpoint"]


def _training_frame() -> Any:
    """Return the stack frame of the running Trainer's loop."""
    frame: Any = sys._getframe()
    while not ("resume_from_checkpoint" in frame.f_locals and isinstance(frame.f_locals.get("self"), Trainer)):
        frame = frame.f_back
    return frame


def while_training(trainer: Trainer) -> Callable[[], bool]:
    """Return a function that tells from any thread whether a Trainer is in the training that runs now in this one."""
    loop, thread, owner = _training_frame().f_code, threading.get_ident(), weakref.ref(trainer)

    def active() -> bool:
        frame = sys._current_frames().get(thread)
        while frame is not None and not (frame.f_code is loop and frame.f_locals.get("self") is owner()):
            frame = frame.f_back
        return frame is not None

    return active
