"""What is left of the features that a model came with, for models that may be pretrained."""

from collections.abc import Sequence

from rwalk.bench.streams import Experience
from rwalk.bench.training import CustomLearner, Learner
from rwalk.finetuning import Snapshot

INPUTS = 500
"""How many test inputs, of all tasks together, show it."""


def features_now(learner: CustomLearner, stream: Sequence[Experience]) -> Snapshot | None:
    """Remember the features of a model as it comes, on test inputs of all tasks; None if it has none that can be compared."""
    if not isinstance(learner, Learner):
        return None
    share = -(-INPUTS // len(stream))
    inputs = [part for e in stream for part in e.test.read()[0][:share].split(50)]
    try:
        return Snapshot(learner.model, inputs, read="features")
    except ValueError:  # without a linear layer, or with fewer than three inputs
        return None
