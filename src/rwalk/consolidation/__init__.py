"""The consolidator, which binds a model, a rule and an anchor to an optimiser."""

from rwalk.consolidation.consolidator import Consolidator

__all__ = ["Consolidator"]
