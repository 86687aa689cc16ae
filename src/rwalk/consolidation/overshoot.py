"""A warning where a gradient pull overshoots the anchor."""

from rwalk._errors import warn
from rwalk.anchors.base import Anchor
from rwalk.consolidation.memory import Memory


class OvershootCheck:
    """Warns, once for an anchor, when steps along the penalty's gradient are longer than the distance to the anchor."""

    def __init__(self) -> None:
        self._anchor: Anchor | None = None
        self._largest = 0.0

    def look(self, memory: Memory, lr: float) -> None:
        """Compare the largest importance with a learning rate."""
        if self._anchor is not memory.anchor:
            self._anchor = memory.anchor
            self._largest = memory.protected.shard_group.maxima([memory.anchor.largest()])[0]
        largest, strength = self._largest, memory.strength
        if lr * 2 * strength * largest > 1:
            self._largest = 0.0
            warn(
                "The gradient pull overshoots the anchor: lr * 2 * strength * max omega is more than 1, at strength "
                f"{strength:g}, learning rate {lr:g} and largest importance {largest:.3g}. Build the consolidator with "
                f'`pull="proximal"`, or with a strength below {0.5 / (lr * largest):.3g}.'
            )
