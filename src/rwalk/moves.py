"""Which moves of the weights are the observed optimiser's, and which somebody else's: those count for nothing.

A rule that follows the path cannot tell, at a step, how far the optimiser went at the step before and what was changed since.
So during the first steps of a task, and in all of a task in which weights are changed from outside, the end of each step is
noted: the rule comes to rest. After many quiet steps that is left out; a change that comes then costs the unfinished stretch.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwalk._errors import explain
from rwalk.importance.base import Importance
from rwalk.parameters import Watch, listed
from rwalk.writes import Writes

WARY = 100
"""Steps at the start of a task whose ends are noted in any case."""


class Moves:
    """Keeps a rule's state free of moves that the observed optimiser has not made.

    Attributes:
        disturbed: whether there was such a move in the task at hand.
    """

    def __init__(self, disturbed: bool = False) -> None:
        self.disturbed = disturbed
        self._writes = Writes()
        self._written: list[str] = []
        self._unobserved = self._noticed = False
        self._before = disturbed

    def before_step(self, rule: Importance[Any], state: Any, watch: Watch, steps: int, skip: Tensor | None = None) -> Any:
        """Return a rule's state without what has moved the parameters since the last observed step of the task.

        Where `skip` is set on a device, the state at rest stays as it is there.
        """
        self._before = self.disturbed
        if not rule.walks or not steps or self._noticed:
            return state
        self._noticed = True
        if not rule.at_rest(state):
            return self._forgotten(rule, state, watch)
        theta = watch.blocks()
        places = self._suspects(watch)
        state, moved = rule.resume(state, theta, [i for i in places if theta[i] is not None], skip)
        self._unobserved = False
        self.disturbed |= moved
        return state

    def after_step(self, rule: Importance[Any], state: Any, watch: Watch, steps: int, skip: Tensor | None) -> Any:
        """Return a rule's state at rest, if it is time to be wary; note how the parameters are now."""
        if rule.walks and (steps <= WARY or self.disturbed):
            state = rule.rest(state, list(watch.theta.values()), skip)
        self._noticed, self._written = False, []
        self._writes.note(watch.theta)
        return state

    def pause(self, rule: Importance[Any], state: Any, watch: Watch, steps: int, skip: Tensor | None) -> Any:
        """Return a rule's state at rest, before steps that are not observed."""
        if not rule.walks or not steps or any(t.shape != watch.shapes[name] for name, t in watch.theta.items()):
            return state
        self._unobserved, self._noticed = True, False
        return rule.rest(self.at_end(rule, state, watch, steps), list(watch.theta.values()), skip)

    def at_end(self, rule: Importance[Any], state: Any, watch: Watch, steps: int) -> Any:
        """Return a rule's state without the unfinished stretch of parameters that were changed after the last step."""
        return self._forgotten(rule, state, watch) if steps and not rule.at_rest(state) else state

    def written(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name the parameters that were changed after the last observed step."""
        return self._written or self._writes.found(theta)

    def follow(self, old: Watch, new: Watch) -> None:
        """Go over to other parameters."""
        self.remember(old.theta)
        if self._writes.known:
            self.renote(new.theta)
        self._noticed = False

    def remember(self, theta: Mapping[str, Tensor]) -> None:
        """Keep in mind what has been changed, before the parameters are exchanged."""
        self._written = self.written(theta)

    def renote(self, theta: Mapping[str, Tensor]) -> None:
        """Note the parameters that took the place of others."""
        self._writes.note(theta)

    def lose(self) -> None:
        """Know nothing of the parameters any more: a step has failed late, and its weights have to be restored."""
        self._writes, self._written, self.disturbed = Writes(), [], self._before

    def note(self, theta: Mapping[str, Tensor]) -> None:
        """Take the parameters as they are now, whoever has changed them."""
        self._written = []
        self._writes.note(theta)

    def _suspects(self, watch: Watch) -> list[int]:
        """List the places of parameters that may have moved; on an accelerator those written to, as comparing would wait."""
        if self._unobserved or all(t.is_cpu for t in watch.theta.values()):
            return list(range(len(watch.theta)))
        written = set(self._writes.seen(watch.theta))
        return [i for i, name in enumerate(watch.theta) if name in written]

    def _forgotten(self, rule: Importance[Any], state: Any, watch: Watch) -> Any:
        """Drop the stretch of parameters that were written to after a step whose end was not noted."""
        cpu = all(t.is_cpu for t in watch.theta.values())
        written = self._writes.found(watch.theta) if cpu else self._writes.seen(watch.theta)
        if not written:
            return state
        if not self.disturbed:
            warnings.warn(
                explain(
                    f"weights ({listed(written)}) that something other than the optimiser has changed during a task",
                    "weights that the optimiser alone moves, or changes from the first steps on",
                    "Neither the change nor the unfinished stretch of steps before it counts; further changes are told apart.",
                ),
                stacklevel=5,
            )
        self.disturbed = True
        return rule.forget(state, list(watch.theta.values()), [i for i, name in enumerate(watch.theta) if name in written])
