"""The one seam between the library and its arithmetic: typed functions over tensors, forwarded to the backends in use.

The formulas stand in `reference`; `blocked` runs them in plain PyTorch, `numba` and `triton` in one fused pass. A fused backend
takes the parameters that it can work on and leaves the others to the next one, so every call does all of its work.
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from rwalk.kernels import blocked
from rwalk.kernels.passes import PostStepRow, PreStepPass, counted

__all__ = [
    "BACKENDS",
    "PostStepRow",
    "PreStepPass",
    "add_si_importance_",
    "after_step_",
    "available",
    "before_step_",
    "counted",
    "current",
    "penalty",
    "rest_",
    "settle_",
    "settled",
    "unlike",
    "use",
]

Tensors = Sequence[Tensor]
BACKENDS: dict[str, tuple[str, ...]] = {
    "reference": ("reference",),
    "blocked": ("blocked",),
    "numba": ("numba", "blocked"),
    "triton": ("triton", "blocked"),
}
"""What `use` takes, and the modules that share the work under each name, in order."""

FETCH = 2**26
"""Bytes that are brought to a device at a time."""

_name = "blocked"
_chain: tuple[ModuleType, ...] = (blocked,)


def use(name: str) -> None:
    """Choose the backend of the arithmetic in this process.

    Args:
        name: "blocked" is the default and needs nothing but PyTorch; "numba" fuses on CPUs and comes with the extra `fast`;
            "triton" fuses on GPUs and comes with PyTorch for CUDA; "auto" is what of these works here, by the device of each
            parameter; "reference" is the slow truth.

    Raises:
        ValueError: if there is no such backend.
        ImportError: if what it needs is not installed.
    """
    global _name, _chain
    if name == "auto":
        chosen: tuple[str, ...] = (*(extra for extra in ("numba", "triton") if extra in available()), "blocked")
    elif name in BACKENDS:
        chosen = BACKENDS[name]
    else:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"There is no backend `{name}`. Pass one of {known}.")
    try:
        chain = tuple(import_module(f"{__name__}.{module}") for module in chosen)
    except ImportError as error:
        remedy = "Run: pip install 'rwalk[fast]'" if name == "numba" else "Install PyTorch for CUDA, or use another backend."
        raise ImportError(f"The backend `{name}` needs the package `{name}` ({error}). {remedy}") from None
    _name, _chain = name if name != "auto" else "+".join(chosen), chain


def current() -> str:
    """Return the name of the backend in use; under "auto" those that share the work, such as "numba+blocked"."""
    return _name


def available() -> list[str]:
    """List the backends that work on this machine, as `use` takes them."""
    works = {"numba": find_spec("numba") is not None, "triton": find_spec("triton") is not None and torch.cuda.is_available()}
    return [name for name in BACKENDS if works.get(name, True)]


def before_step_(step: PreStepPass) -> Tensor | None:
    """Do what is to be done before an optimiser step, or at a task's end, in one pass over each parameter's memory.

    Returns for how many elements of finished windows the squared Riemannian distance exceeded eps, None where no window ended.
    """
    counts: list[Tensor] = []
    for one_way, mine in step.directions():
        for rows in fetched(mine):
            for backend in _chain:
                if rows:
                    rows, beyond_eps = backend.before_step_(rows, one_way)
                    counts += beyond_eps
    return torch.stack([count.to(counts[0].device) for count in counts]).sum() if counts else None


def after_step_(rows: Iterable[PostStepRow], skip: Tensor | None = None) -> None:
    """Do what is to be done after an optimiser step, in one pass over each parameter's memory.

    Args:
        rows: the parameters.
        skip: one element, not 0 if the step did not count and nothing is to be done; None for 0.
    """
    for left in fetched(rows):
        for backend in _chain:
            left = backend.after_step_(left, skip) if left else left


def fetched(rows: Iterable[blocked.AnyRow], limit: int = FETCH) -> Iterator[list[blocked.AnyRow]]:
    """Yield rows with the anchor beside the parameter; if it lies elsewhere, it comes over a few rows at a time.

    From pinned memory the copies are queued and nothing waits for them; what they bring is freed before the next ones come.
    """
    batch: list[blocked.AnyRow] = []
    brought = 0
    for row in rows:
        if row.omega is None or row.point is None or row.omega.device == row.theta.device:
            batch.append(row)
            continue
        size = row.omega.nbytes + row.point.nbytes
        if batch and brought + size > limit:
            yield batch
            batch, brought = [], 0
        point, omega = (t.to(row.theta.device, non_blocking=True) for t in (row.point, row.omega))
        batch.append(row._replace(point=point, omega=omega))
        brought += size
    if batch:
        yield batch


def rest_(theta: Tensors, path: Tensors, mark: Tensors, previous: Tensors, skip: Tensor | None = None) -> None:
    """Add the optimiser's last move to the path, and keep where it ended in place of the gradient of the last step."""
    blocked.rest_(zip(theta, path, mark, previous, strict=True), skip)


settle_, settled, add_si_importance_, unlike = blocked.settle_, blocked.settled, blocked.add_si_importance_, blocked.unlike


def penalty(theta: Tensors, point: Tensors, omega: Tensors) -> float | Tensor:
    """Return the sum of omega * (theta - point)^2 over all tensors, a scalar."""
    triples = zip(theta, point, omega, strict=True)
    terms: list[Tensor] = [blocked.penalty(now, p.to(now.device), o.to(now.device)) for now, p, o in triples]
    return sum(term.to(terms[0].device) for term in terms)
