"""Learn one task after another without forgetting: Riemannian Walk and its family, in any PyTorch training loop."""

from typing import TYPE_CHECKING

from rwalk._lazy import lazily

if TYPE_CHECKING:
    from rwalk.anchor import Anchor, KroneckerAnchor
    from rwalk.consolidator import Consolidator
    from rwalk.importance.ewc import EWC
    from rwalk.importance.ewcpp import EWCpp
    from rwalk.importance.kronecker import Kronecker
    from rwalk.importance.l2 import L2
    from rwalk.importance.mas import MAS
    from rwalk.importance.online_ewc import OnlineEWC
    from rwalk.importance.rwalk import RWalk
    from rwalk.importance.si import SI

__version__ = "0.1.0"
__all__ = ["EWC", "L2", "MAS", "SI", "Anchor", "Consolidator", "EWCpp", "Kronecker", "KroneckerAnchor", "OnlineEWC", "RWalk"]

__getattr__ = lazily(
    __name__,
    {
        "Anchor": "rwalk.anchor",
        "Consolidator": "rwalk.consolidator",
        "EWC": "rwalk.importance.ewc",
        "EWCpp": "rwalk.importance.ewcpp",
        "Kronecker": "rwalk.importance.kronecker",
        "KroneckerAnchor": "rwalk.anchor",
        "L2": "rwalk.importance.l2",
        "MAS": "rwalk.importance.mas",
        "OnlineEWC": "rwalk.importance.online_ewc",
        "RWalk": "rwalk.importance.rwalk",
        "SI": "rwalk.importance.si",
        "bench": "rwalk.bench",
        "kernels": "rwalk.kernels",
        "replay": "rwalk.replay",
    },
)
