"""Per-example gradients: over a data loader after training, or gathered during the user's own backward pass."""

from rwalk.gradients.batches import forward
from rwalk.gradients.independence import refuse_dependence
from rwalk.gradients.likelihood import read_output
from rwalk.gradients.loader import over
from rwalk.gradients.moments import moments
from rwalk.gradients.training import Squares
from rwalk.gradients.undisturbed import Kept, undisturbed

__all__ = ["Kept", "Squares", "forward", "moments", "over", "read_output", "refuse_dependence", "undisturbed"]
