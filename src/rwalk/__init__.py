"""Learn one task after another without forgetting: Riemannian Walk and its family, in any PyTorch training loop."""

from typing import TYPE_CHECKING

from rwalk._lazy import lazily

if TYPE_CHECKING:
    from rwalk.anchor import Anchor
    from rwalk.consolidator import Consolidator
    from rwalk.importance.rwalk import RWalk

__version__ = "0.1.0"
__all__ = ["Anchor", "Consolidator", "RWalk"]

__getattr__ = lazily(
    __name__,
    {
        "Anchor": "rwalk.anchor",
        "Consolidator": "rwalk.consolidator",
        "RWalk": "rwalk.importance.rwalk",
        "bench": "rwalk.bench",
        "kernels": "rwalk.kernels",
    },
)
