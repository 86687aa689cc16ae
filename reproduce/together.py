"""Joint training once, on the data of all tasks: what the last line of a table of average accuracies is compared with."""

from rwalk.bench import Experience
from rwalk.bench.learners import Cumulative, FineTune, Protected


class Together(Cumulative):
    """Wait for the last task, and then train on all of them at once: `Joint`, but for the models after earlier tasks.

    Args:
        tasks: how many tasks there are.
    """

    def __init__(self, tasks: int, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.tasks = tasks

    def fit(self, experience: Experience) -> None:
        """Train if this is the last task."""
        if experience.task == self.tasks - 1:
            super().fit(experience)
        else:
            self._past.append(experience)
            self.seen |= set(experience.classes)


class AveragedTogether(Together, Protected):
    """The same, ending at the average of the later iterates.

    Args:
        tasks: how many tasks there are.
        settings: a rule that does not pull, and averaging.
    """

    def fit(self, experience: Experience) -> None:
        """Train if this is the last task, and take the average."""
        super().fit(experience)
        if experience.task == self.tasks - 1:
            self.memory.consolidate()

    def scalars(self) -> dict[str, float]:
        """Return the loss at the last step; there is nothing to say of a memory that holds nothing."""
        return FineTune.scalars(self)
