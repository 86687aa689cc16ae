"""Replay: a few examples of earlier tasks are kept and trained on beside the new ones."""

from rwalk.replay.agem import project_
from rwalk.replay.buffer import Buffer, Sample
from rwalk.replay.selections import Candidates

__all__ = ["Buffer", "Candidates", "Sample", "project_"]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
