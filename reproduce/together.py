"""Joint training once, on the data of all tasks: what the last line of a table of average accuracies is compared with."""

from typing import Any

from rwalk.bench import Experience
from rwalk.bench.baselines import Past
from rwalk.bench.training import Learner


class Together(Learner):
    """Wait for the last task, and then train on all of them at once: joint training without the models after earlier tasks.

    Args:
        tasks: how many tasks there are.
        args, options: as for `Learner`; with a memory that does not pull it ends at the average of the later iterates.
    """

    def __init__(self, tasks: int, *args: Any, **options: Any) -> None:
        self.past = Past(anew=False)
        super().__init__(*args, **options, addition=self.past)
        self.tasks = tasks

    def fit(self, experience: Experience) -> None:
        """Train if this is the last task."""
        if experience.task == self.tasks - 1:
            super().fit(experience)
        else:
            self.past.tasks.append(experience)
            self.seen |= set(experience.classes)
