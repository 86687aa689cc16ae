"""Per-example gradients: over a data loader after training, or collected during the user's own backward pass."""

from rwalk.gradients.calls import noted_calls
from rwalk.gradients.in_backward import Squares
from rwalk.gradients.in_training import StepMoments, TrainingMoments
from rwalk.gradients.independence import refuse_dependence
from rwalk.gradients.isolation import ModelSnapshot, isolated
from rwalk.gradients.moments import moments
from rwalk.gradients.outputs import read_output
from rwalk.gradients.over_data import per_example_over
from rwalk.gradients.texts import forward

__all__ = [
    "ModelSnapshot",
    "Squares",
    "StepMoments",
    "TrainingMoments",
    "forward",
    "isolated",
    "moments",
    "noted_calls",
    "per_example_over",
    "read_output",
    "refuse_dependence",
]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
