"""The one seam between the library and its arithmetic: typed functions over tensors, forwarded to the backends in use.

The formulas stand in `reference`; `blocked` runs them in plain PyTorch, `numba` and `triton` in one fused pass. A fused backend
takes the parameters that it can work on and leaves the others to the next one, so every call does all of its work.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from rwalk.kernels import blocked
from rwalk.kernels.layout import Layout as Layout
from rwalk.kernels.passes import AfterStep as AfterStep
from rwalk.kernels.passes import BeforeStep as BeforeStep
from rwalk.kernels.passes import Column
from rwalk.kernels.passes import Metric as Metric
from rwalk.kernels.passes import RuleUpdate as RuleUpdate
from rwalk.kernels.passes import StepGradients as StepGradients
from rwalk.kernels.rows import nonfinite as nonfinite

__all__ = ["BACKENDS", "available", "current", "use"]

Tensors = Sequence[Tensor]
BACKENDS: dict[str, tuple[str, ...]] = {
    "reference": ("rows",),
    "blocked": ("blocked",),
    "numba": ("numba", "blocked"),
    "triton": ("triton", "blocked"),
}
"""What `use` takes, and the modules that share the work under each name, in order."""

_name = "auto"
_chain: tuple[ModuleType, ...] = ()
"""The choice, and its modules, in order; none before the first use of "auto", as importing them takes a while."""


def use(name: str) -> None:
    """Choose the backend of the arithmetic in this process.

    Args:
        name: "auto" is the default: what of these works here, by the device of each parameter. "blocked" needs nothing but
            PyTorch; "numba" fuses on CPUs and comes with the extra `fast`; "triton" fuses on GPUs and comes with PyTorch for
            CUDA; "reference" is the slow truth.

    Raises:
        ValueError: if there is no such backend.
        ImportError: if what it needs is not installed.
    """
    global _name, _chain
    if name == "auto":
        chosen: tuple[str, ...] = _automatic()
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


def _automatic() -> tuple[str, ...]:
    """Return the modules that "auto" stands for."""
    return (*(extra for extra in ("numba", "triton") if extra in available()), "blocked")


def current() -> str:
    """Return the name of the backend in use; under "auto" those that share the work, such as "numba+blocked"."""
    return "+".join(_automatic()) if _name == "auto" else _name


def _modules() -> tuple[ModuleType, ...]:
    """Return the modules of the backend in use."""
    if not _chain:
        use("auto")
    return _chain


def available() -> list[str]:
    """List the backends that work on this machine, as `use` takes them."""
    works = {"numba": find_spec("numba") is not None, "triton": find_spec("triton") is not None and torch.cuda.is_available()}
    return [name for name in BACKENDS if works.get(name, True)]


def laid_out(
    layout: Layout | None, theta: Tensors, columns: Mapping[str, Column | None], ascends: Sequence[bool] | None = None
) -> Layout:
    """Return a layout of parameters and of what belongs to each: the given one, of parameters in place, where it still fits."""
    if layout is not None and layout.fits(columns, ascends, _modules()):
        return layout
    return Layout(theta, columns, ascends, _modules())


def laid_out_alone(theta: Tensors) -> Layout:
    """Return a layout of parameters that nothing belongs to, for a look at their gradients: compiling would not pay for it."""
    return Layout(theta, {}, None, (blocked,))


settle_, settled, add_si_importance_ = blocked.settle_, blocked.settled, blocked.add_si_importance_


def penalty(theta: Tensors, point: Tensors, omega: Tensors) -> float | Tensor:
    """Return the sum of omega * (theta - point)^2 over all tensors, a scalar."""
    triples = zip(theta, point, omega, strict=True)
    terms: list[Tensor] = [blocked.penalty(now, p.to(now.device), o.to(now.device)) for now, p, o in triples]
    return sum(term.to(terms[0].device) for term in terms)


def __dir__() -> list[str]:
    """List the public names, for completion and help; the others are for the library itself."""
    return __all__
