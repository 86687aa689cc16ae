"""Replay: a few examples of earlier tasks are kept and learned again beside the new ones."""

from typing import TYPE_CHECKING

from rwalk._lazy import lazily

if TYPE_CHECKING:
    from rwalk.replay.agem import project_
    from rwalk.replay.buffer import Buffer, Sample
    from rwalk.replay.selections import Candidates

__all__ = ["Buffer", "Candidates", "Sample", "project_"]

_HOMES = {
    "rwalk.replay.agem": ["project_"],
    "rwalk.replay.buffer": ["Buffer", "Sample"],
    "rwalk.replay.selections": ["Candidates"],
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
