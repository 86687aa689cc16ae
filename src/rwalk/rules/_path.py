"""What rules share that follow the path of the weights: how they come to rest between the optimiser's moves.

Such a state has the fields `path`, `mark`, `previous`, `steps` and `resting`. At rest the path holds the optimiser's last move,
and `previous` holds where that move has ended in place of the gradient that it was made along.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwalk import kernels
from rwalk._parameters import copies

State = TypeVar("State", bound=Any)


def rested(state: State, theta: Sequence[Tensor], skip: Tensor | None = None) -> State:
    """Take in the optimiser's last move, unless `skip` is set, and keep where it has ended."""
    if state.resting or not state.steps:
        return state
    kernels.rest_(theta, state.path, state.mark, state.previous, skip)
    return state._replace(resting=True)  # type: ignore[no-any-return]


def wake(state: State, skip: Tensor | None) -> State:
    """End a rest, after which no gradient is remembered."""
    if skip is None:
        torch._foreach_zero_(state.previous)
    else:
        torch._foreach_mul_(state.previous, (skip != 0).to(state.previous[0].dtype))
    return state._replace(resting=False)  # type: ignore[no-any-return]


def moved(state: Any, theta: Sequence[Tensor | None], places: Sequence[int]) -> list[int]:
    """List those of some places whose parameters are not where the state came to rest."""
    known = [(i, now) for i in places if (now := theta[i]) is not None]
    return [known[k][0] for k in kernels.unlike([(now, state.previous[i]) for i, now in known])]


def own(state: State, columns: Sequence[str], places: Sequence[int]) -> State:
    """Copy some tensors of a state, so that those of the state that was given are not written to."""
    made = {c: [t.clone() if i in places else t for i, t in enumerate(getattr(state, c))] for c in columns}
    return state._replace(**made)  # type: ignore[no-any-return]


def relocated(state: State, theta: Sequence[Tensor]) -> State:
    """Have a state at rest lie where these parameters are, which took the place of others."""
    return state._replace(previous=copies(theta)) if state.resting else state  # type: ignore[no-any-return]
