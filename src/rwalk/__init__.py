"""Learn one task after another without forgetting: Riemannian Walk and its family, in any PyTorch training loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwalk.anchor import Anchor as Anchor
    from rwalk.consolidator import Consolidator as Consolidator
    from rwalk.importance.rwalk import RWalk as RWalk

__version__ = "0.1.0"
__all__ = ["Anchor", "Consolidator", "RWalk"]

_HOMES = {"Anchor": "rwalk.anchor", "Consolidator": "rwalk.consolidator", "RWalk": "rwalk.importance.rwalk"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that what needs no torch does not load it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("bench", "kernels"):
        return import_module(f"rwalk.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
