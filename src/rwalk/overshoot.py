"""A warning for strengths at which the gradient pull leads away from the anchor."""

import warnings

from rwalk._errors import explain
from rwalk.anchor import Anchor
from rwalk.parallel import Spread


class Overshoot:
    """Warns, once for an anchor, when steps along the penalty's gradient are longer than the way to the anchor."""

    def __init__(self) -> None:
        self._anchor: Anchor | None = None
        self._largest = 0.0

    def look(self, anchor: Anchor, strength: float, lr: float, spread: Spread) -> None:
        """Look at the step that is about to be made; the importance of an anchor is gone through once."""
        if self._anchor is not anchor:
            self._anchor, self._largest = anchor, spread.maxima([anchor.largest()])[0]
        largest = self._largest
        if lr * 2 * strength * largest > 1:
            self._largest = 0.0
            warnings.warn(
                explain(
                    f"strength {strength:g} at learning rate {lr:g} and largest importance {largest:.3g}",
                    "lr * 2 * strength * max omega of at most 1 for the gradient pull, beyond which steps overshoot the anchor",
                    f'Build the consolidator with `pull="proximal"`, or with a strength below {0.5 / (lr * largest):.3g}.',
                ),
                stacklevel=4,
            )
