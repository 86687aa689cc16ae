"""Learn one task after another without forgetting: Riemannian Walk and its family, in any PyTorch training loop."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwalk import anchors as anchors
    from rwalk import bench as bench
    from rwalk import finetuning as finetuning
    from rwalk import kernels as kernels
    from rwalk import replay as replay
    from rwalk import report as report
    from rwalk import rules as rules
    from rwalk.anchors import Anchor, KroneckerAnchor
    from rwalk.consolidation import Consolidator
    from rwalk.finetuning import Distillation, Snapshot, warm_head
    from rwalk.rules import EWC, L2, MAS, SI, EWCpp, Kronecker, OnlineEWC, RWalk, TaskFisher

__version__ = "0.2.0"
__all__ = [
    "EWC",
    "L2",
    "MAS",
    "SI",
    "Anchor",
    "Consolidator",
    "Distillation",
    "EWCpp",
    "Kronecker",
    "KroneckerAnchor",
    "OnlineEWC",
    "RWalk",
    "Snapshot",
    "TaskFisher",
    "warm_head",
]

_PACKAGES = {
    "Anchor": "anchors",
    "KroneckerAnchor": "anchors",
    "Consolidator": "consolidation",
    "Distillation": "finetuning",
    "Snapshot": "finetuning",
    "warm_head": "finetuning",
}


_SHOWN = ("anchors", "bench", "finetuning", "kernels", "replay", "report", "rules")
"""Packages that users import from."""


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return [*__all__, *_SHOWN, "__version__"]


if not TYPE_CHECKING:  # to a type checker it would mean that there is every name

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that `rwalk report --help` does not wait for torch."""
        if name in __all__:
            return getattr(import_module(f"rwalk.{_PACKAGES.get(name, 'rules')}"), name)
        if name in _SHOWN:
            return import_module(f"rwalk.{name}")
        raise AttributeError(f"module 'rwalk' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
