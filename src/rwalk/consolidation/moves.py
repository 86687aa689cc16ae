"""Foreign moves: changes of the weights that the watched optimiser has not made, and that count for nothing.

At the end of each step a rule that follows the path comes to rest: it adds the optimiser's move to the path, and stores where
it ended. Whatever the weights have moved by the next step is foreign.

A write in place raises a tensor's version, unless it goes past autograd, as through `.data` or NumPy. So a few elements of the
largest tensors are compared too, which finds whatever changes a whole model.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rwalk.consolidation.protected import ProtectedParameters
from rwalk.rules._path import moved, rested, wake
from rwalk.rules.base import Rule

TENSORS, ELEMENTS = 3, 32
"""How many tensors are looked at, and how many elements of each."""


class Moves:
    """Keeps foreign moves out of a rule's state.

    Args:
        changed: names of parameters that were changed after the last observed step.
    """

    def __init__(self, changed: Iterable[str] = ()) -> None:
        self._writes = Writes({})
        self._changed = list(changed)
        self._unobserved = True

    @classmethod
    def from_now(cls, theta: Mapping[str, Tensor]) -> "Moves":
        """Start from the parameters as they are now."""
        moves = cls()
        moves.note_all(theta)
        return moves

    def drop_foreign(self, rule: Rule[Any], state: Any, protected: ProtectedParameters, steps: int) -> Any:
        """Return a rule's state without foreign moves since the last observed step of the task.

        Nothing is written to tensors of the state that is given.
        """
        if not rule.walks or not steps:
            return state
        if not state.resting:  # the step that was observed last has failed
            return rule.abandon(state, protected.blocks(), self._places(protected, self._writes.found(protected.theta)))
        theta = protected.blocks()
        return rule.resume(state, theta, moved(state, theta, self._suspects(protected)))

    def before_step(
        self, rule: Rule[Any], state: Any, protected: ProtectedParameters, steps: int, skip: Tensor | None = None
    ) -> Any:
        """Return a rule's state that is ready to observe a step; where `skip` is set on a device, it stays at rest there."""
        if not rule.walks or not steps:
            return state
        state = self.drop_foreign(rule, state, protected, steps)
        self._unobserved = False
        return wake(state, skip)

    def after_step(
        self, rule: Rule[Any], state: Any, protected: ProtectedParameters, names: Collection[str], skip: Tensor | None
    ) -> Any:
        """Return a rule's state at rest; note how the parameters of these names, which the optimiser has moved, are now."""
        if rule.walks:
            state = rested(state, list(protected.theta.values()), skip)
        self._changed = [name for name in self._changed if name not in names]
        self._writes = self._writes if self._writes.known else Writes(protected.theta)
        self._writes.note(protected.theta, names)
        return state

    def pause(self) -> None:
        """Compare all parameters next time, as steps are not observed meanwhile."""
        self._unobserved = True

    def changed(self, rule: Rule[Any], state: Any, protected: ProtectedParameters, steps: int) -> list[str]:
        """Name the parameters that were changed after the last observed step."""
        found = {*self._changed, *self._writes.found(protected.theta)}
        if rule.walks and steps and state.resting and all(t.is_cpu for t in protected.theta.values()):
            names = list(protected.theta)
            found |= {names[i] for i in moved(state, protected.blocks(), range(len(names)))}
        return [name for name in protected.theta if name in found]

    def keep_changed(self, changed: Iterable[str]) -> None:
        """Keep a list of changed parameters."""
        self._changed = list(changed)

    def carried_over(self, changed: Iterable[str], theta: Mapping[str, Tensor]) -> "Moves":
        """Return the moves of parameters that replaced others."""
        moves = Moves(changed)
        if self._writes.known:
            moves.note_all(theta)
        return moves

    def note_all(self, theta: Mapping[str, Tensor]) -> None:
        """Note how the parameters are now, and compare all of them next time."""
        self._writes, self._unobserved = Writes(theta), True

    def forget(self) -> None:
        """Forget how the parameters were: a step has failed late, and its weights have to be restored."""
        self._writes, self._changed, self._unobserved = Writes({}), [], True

    def _suspects(self, protected: ProtectedParameters) -> list[int]:
        """List the places of parameters to compare: all on a CPU; elsewhere those written to, as comparing would wait."""
        if self._unobserved or all(t.is_cpu for t in protected.theta.values()):
            return list(range(len(protected.theta)))
        return self._places(protected, self._writes.seen(protected.theta))

    @staticmethod
    def _places(protected: ProtectedParameters, names: Collection[str]) -> list[int]:
        return [i for i, name in enumerate(protected.theta) if name in names]


class Writes:
    """What parameters were like when they were noted: at first all of `theta`, later those that a step has moved."""

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        largest = sorted((name for name, t in theta.items() if t.numel()), key=lambda name: theta[name].numel())[-TENSORS:]
        self._versions = {name: t._version for name, t in theta.items()}
        self._probes = {name: _some(theta[name]).clone() for name in largest}

    @property
    def known(self) -> bool:
        """Whether anything was noted."""
        return bool(self._versions)

    def note(self, theta: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Note what parameters of these names are like now."""
        for name in names:
            self._versions[name] = theta[name]._version
            if name in self._probes:
                self._probes[name] = _some(theta[name]).clone()

    def found(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name the parameters that have been written to since, all if elements alone tell; comparing waits for a device."""
        seen = self.seen(theta)
        unseen = any(name not in seen and name in theta and _unlike(theta[name], old) for name, old in self._probes.items())
        return list(theta) if unseen else seen

    def seen(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name those that have been written to in sight of autograd, which waits for nothing."""
        return [name for name, t in theta.items() if self._versions.get(name, t._version) != t._version and t.numel()]


def _some(tensor: Tensor) -> Tensor:
    """View a few elements, shard_group over the tensor's memory."""
    count = min(tensor.numel(), ELEMENTS)
    return tensor.detach().as_strided((count,), (tensor.numel() // count,))


def _unlike(tensor: Tensor, old: Tensor) -> bool:
    """Return whether elements differ; a tensor that grew, or is now of another kind, does not say."""
    now = _some(tensor)
    return now.shape == old.shape and now.dtype == old.dtype and not torch.equal(now.to(old.device), old)
