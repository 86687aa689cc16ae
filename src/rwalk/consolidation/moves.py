"""Foreign moves: changes of the weights that the watched optimiser has not made, and that count for nothing.

At the end of each step a rule that follows the path stores where it ended. Whatever the weights have moved by the next step is
foreign.

A write in place raises a tensor's version, unless it goes past autograd, as through `.data` or NumPy. So a few elements of the
largest tensors are compared too, which finds whatever changes a whole model.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rwalk.consolidation.protected import ProtectedParameters
from rwalk.rules.base import Rule

TENSORS, ELEMENTS = 3, 32
"""How many tensors are looked at, and how many elements of each."""


class Moves:
    """Keeps foreign moves out of a rule's state.

    Args:
        changed: names of parameters that were changed after the last observed step.
        saved: what `digests` said of the parameters when all this was saved.
    """

    def __init__(self, changed: Iterable[str] = (), saved: str = "") -> None:
        self._writes = Writes({}, saved)
        self._changed = list(changed)
        self._unobserved = True

    @classmethod
    def from_now(cls, theta: Mapping[str, Tensor]) -> "Moves":
        """Start from the parameters as they are now."""
        moves = cls()
        moves.note_all(theta)
        return moves

    @property
    def noted(self) -> "Writes":
        """What the parameters were like when they were noted."""
        return self._writes

    def drop_foreign(self, rule: Rule[Any], state: Any, protected: ProtectedParameters, steps: int) -> Any:
        """Return a rule's state without foreign moves since the last observed step of the task.

        Nothing is written to tensors of the state that is given.
        """
        if not rule.walks or not steps:
            return state
        theta: list[Any] = protected.blocks()
        places, names = moved(state, theta, self._suspects(protected)), list(protected.theta)
        self.note_changed(names[i] for i in places)
        return rule.resume(_owned(state, places), theta, places) if places else state

    def after_step(self, protected: ProtectedParameters, names: list[str], moved: list[bool], walks: bool) -> None:
        """Note how the parameters that the optimiser has moved are now; `walks` if a rule notes where they are."""
        mine = names if all(moved) else [name for name, has in zip(names, moved, strict=True) if has]
        if self._changed:
            self._changed = [name for name in self._changed if name not in mine]
        self._unobserved = False
        if walks and protected.on_cpu:
            self._writes = Writes({})  # where a rule knows where each step has ended, nothing else need be noted
        else:
            self._writes = self._writes if self._writes.known else Writes(protected.theta)
            self._writes.note(protected.theta, mine)

    def pause(self) -> None:
        """Compare all parameters next time, as steps are not observed meanwhile."""
        self._unobserved = True

    def changed(self, rule: Rule[Any], state: Any, protected: ProtectedParameters, steps: int) -> list[str]:
        """Name the parameters that were changed after the last observed step."""
        found = {*self._changed, *self._writes.found(protected.theta)}
        if rule.walks and steps and protected.on_cpu:
            names = list(protected.theta)
            found |= {names[i] for i in moved(state, protected.blocks(), range(len(names)))}
        return [name for name in protected.theta if name in found]

    def note_changed(self, names: Iterable[str]) -> None:
        """Note parameters that were changed, and that no step has moved since."""
        self._changed = list({*self._changed, *names})

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

    def noticed(self, protected: ProtectedParameters) -> list[str]:
        """Name the parameters that are known to have changed after the last observed step, without waiting for a device."""
        return [*self._changed, *self._writes.seen(protected.theta)]

    def forget(self, changed: Iterable[str]) -> None:
        """Forget how the parameters were: a step has failed late, and its weights have to be restored.

        Args:
            changed: what was `noticed` before that step.
        """
        self._writes, self._changed, self._unobserved = Writes({}), list(changed), True

    def _suspects(self, protected: ProtectedParameters) -> list[int]:
        """List the places of parameters to compare: all on a CPU; elsewhere those written to, as comparing would wait."""
        if self._unobserved or protected.on_cpu:
            return list(range(len(protected.theta)))
        seen = self._writes.seen(protected.theta)
        return [i for i, name in enumerate(protected.theta) if name in seen]


def moved(state: Any, theta: Sequence[Tensor | None], places: Iterable[int]) -> list[int]:
    """List those of some places whose parameters are not where the last step left them."""
    pairs = [(i, now, state.last[i]) for i in places if (now := theta[i]) is not None]
    return [i for i, now, last in pairs if not torch.equal(now.to(last.dtype), last)]


def _owned(state: Any, places: Collection[int]) -> Any:
    """Copy what a rule may write to when it resumes, so that the tensors of the state that was given stay as they are."""

    def copied(field: Any) -> Any:
        if isinstance(field, list):
            return [v.clone() if i in places and isinstance(v, Tensor) else v for i, v in enumerate(field)]
        return field.clone() if isinstance(field, Tensor) else field

    return type(state)(*map(copied, state))


class Writes:
    """What parameters were like when they were noted: at first all of `theta`, later those that a step has moved.

    Args:
        theta: the parameters.
        saved: what `digests` said of them, where they were noted in another process.
    """

    def __init__(self, theta: Mapping[str, Tensor], saved: str = "") -> None:
        self._versions = {name: t._version for name, t in theta.items()}
        self._probes = {name: _some(theta[name]).clone() for name in _largest(theta)}
        self._saved = saved

    @property
    def known(self) -> bool:
        """Whether anything was noted."""
        return bool(self._versions)

    def note(self, theta: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Note what parameters of these names are like now."""
        self._versions |= {name: theta[name]._version for name in names}
        for name in self._probes:
            if name in names:
                self._probes[name] = _some(theta[name]).clone()

    def found(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name the parameters that have been written to since, all if elements alone tell; comparing waits for a device."""
        seen = self.seen(theta)
        unseen = any(name not in seen and name in theta and _unlike(theta[name], old) for name, old in self._probes.items())
        return list(theta) if unseen or _unlike_digests(theta, self._saved) else seen

    def seen(self, theta: Mapping[str, Tensor]) -> list[str]:
        """Name those that have been written to in sight of autograd, which waits for nothing."""
        return [name for name, t in theta.items() if self._versions.get(name, t._version) != t._version and t.numel()]


def digests(theta: Mapping[str, Tensor]) -> str:
    """Return a line for each of the largest tensors: its name, its shape and type, and a digest of a few elements."""
    return "\n".join(f"{name}\t{_digest(theta[name])}" for name in _largest(theta))


def _digest(tensor: Tensor) -> str:
    elements = _some(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{_kind(tensor)} {hashlib.sha256(elements).hexdigest()}"


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {tensor.dtype}"


def _unlike_digests(theta: Mapping[str, Tensor], saved: str) -> bool:
    """Return whether tensors differ from what `digests` said; one that grew, or is now of another kind, does not say."""
    lines = (line.split("\t") for line in saved.splitlines())
    known = [(theta[name], text) for name, text in lines if name in theta]
    return any(text.startswith(f"{_kind(now)} ") and text != _digest(now) for now, text in known)


def _largest(theta: Mapping[str, Tensor]) -> list[str]:
    return sorted((name for name, t in theta.items() if t.numel()), key=lambda name: theta[name].numel())[-TENSORS:]


def _some(tensor: Tensor) -> Tensor:
    """View a few elements, spread over the tensor's memory."""
    count = min(tensor.numel(), ELEMENTS)
    return tensor.detach().as_strided((count,), (tensor.numel() // count,))


def _unlike(tensor: Tensor, old: Tensor) -> bool:
    """Return whether elements differ; a tensor that grew, or is now of another kind, does not say."""
    now = _some(tensor)
    return now.shape == old.shape and now.dtype == old.dtype and not torch.equal(now.to(old.device), old)
