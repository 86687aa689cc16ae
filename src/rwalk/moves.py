"""Which moves of the weights are the observed optimiser's, and which somebody else's: those count for nothing.

At the end of each step a rule that follows the path comes to rest: it takes in the optimiser's move, and keeps where it ended.
What the weights have moved by the time of the next step is somebody else's.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from rwalk.importance._path import moved, rested, wake
from rwalk.importance.base import Importance
from rwalk.parameters import Watch
from rwalk.writes import Writes


class Moves:
    """Keeps a rule's state free of moves that the observed optimiser has not made.

    Args:
        written: names of parameters that were changed after the last observed step.
    """

    def __init__(self, written: Iterable[str] = ()) -> None:
        self._writes = Writes({})
        self._written = list(written)
        self._unobserved = True

    @classmethod
    def noted(cls, theta: Mapping[str, Tensor]) -> "Moves":
        """Begin with the parameters as they are now, whoever has changed them."""
        moves = cls()
        moves.renote(theta)
        return moves

    def notice(self, rule: Importance[Any], state: Any, watch: Watch, steps: int) -> Any:
        """Return a rule's state without what has moved the parameters since the last observed step of the task.

        Nothing is written to tensors of the state that is given.
        """
        if not rule.walks or not steps:
            return state
        if not state.resting:  # the step that was observed last has failed
            return rule.abandon(state, watch.blocks(), self._places(watch, self._writes.found(watch.theta)))
        theta = watch.blocks()
        return rule.resume(state, theta, moved(state, theta, self._suspects(watch)))

    def before_step(self, rule: Importance[Any], state: Any, watch: Watch, steps: int, skip: Tensor | None = None) -> Any:
        """Return a rule's state that is ready to observe a step; where `skip` is set on a device, it stays at rest there."""
        if not rule.walks or not steps:
            return state
        state = self.notice(rule, state, watch, steps)
        self._unobserved = False
        return wake(state, skip)

    def after_step(self, rule: Importance[Any], state: Any, watch: Watch, names: Collection[str], skip: Tensor | None) -> Any:
        """Return a rule's state at rest; note how the parameters of these names, which the optimiser has moved, are now."""
        if rule.walks:
            state = rested(state, list(watch.theta.values()), skip)
        self._written = [name for name in self._written if name not in names]
        self._writes = self._writes if self._writes.known else Writes(watch.theta)
        self._writes.note(watch.theta, names)
        return state

    def pause(self) -> None:
        """Look at all parameters next time: what comes now is not observed."""
        self._unobserved = True

    def written(self, rule: Importance[Any], state: Any, watch: Watch, steps: int) -> list[str]:
        """Name the parameters that were changed after the last observed step."""
        found = {*self._written, *self._writes.found(watch.theta)}
        if rule.walks and steps and state.resting and all(t.is_cpu for t in watch.theta.values()):
            names = list(watch.theta)
            found |= {names[i] for i in moved(state, watch.blocks(), range(len(names)))}
        return [name for name in watch.theta if name in found]

    def remember(self, written: Iterable[str]) -> None:
        """Keep in mind which parameters were changed, whatever is noted later."""
        self._written = list(written)

    def followed(self, written: Iterable[str], theta: Mapping[str, Tensor]) -> "Moves":
        """Return what is known of parameters that took the place of others."""
        moves = Moves(written)
        if self._writes.known:
            moves.renote(theta)
        return moves

    def renote(self, theta: Mapping[str, Tensor]) -> None:
        """Note how the parameters are now, and look at all of them next time."""
        self._writes, self._unobserved = Writes(theta), True

    def lose(self) -> None:
        """Know nothing of the parameters any more: a step has failed late, and its weights have to be restored."""
        self._writes, self._written, self._unobserved = Writes({}), [], True

    def _suspects(self, watch: Watch) -> list[int]:
        """List the places of parameters that may have moved; on an accelerator those written to, as comparing would wait."""
        if self._unobserved or all(t.is_cpu for t in watch.theta.values()):
            return list(range(len(watch.theta)))
        return self._places(watch, self._writes.seen(watch.theta))

    @staticmethod
    def _places(watch: Watch, names: Collection[str]) -> list[int]:
        return [i for i, name in enumerate(watch.theta) if name in names]
