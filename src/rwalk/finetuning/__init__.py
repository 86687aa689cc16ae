"""Fine-tuning pretrained models: what they still know, a head that is fitted first, and answers that stay as they were."""

from rwalk.finetuning.distillation import Distillation
from rwalk.finetuning.head import warm_head
from rwalk.finetuning.snapshot import Kept, Snapshot

__all__ = ["Distillation", "Kept", "Snapshot", "warm_head"]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
