"""Anchors: where the weights were, how much they mattered, and the pull back there."""

from rwalk.anchors.base import Anchor
from rwalk.anchors.elementwise import ElementwiseAnchor
from rwalk.anchors.kronecker import KroneckerAnchor
from rwalk.anchors.match import Match

__all__ = ["Anchor", "ElementwiseAnchor", "KroneckerAnchor", "Match"]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
