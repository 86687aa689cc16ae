"""Benchmarks: streams of tasks, methods, metrics and records."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwalk.bench.baselines import Rehearsal
    from rwalk.bench.builtin import domain, drift, permuted, rotated, split
    from rwalk.bench.optimisation import Training
    from rwalk.bench.own import stream
    from rwalk.bench.record import Record
    from rwalk.bench.search import tune
    from rwalk.bench.spec import run
    from rwalk.bench.streams import Experience, Subset
    from rwalk.bench.variations import blurry, limit, scored

_MODULES = {
    "Experience": "streams", "Record": "record", "Rehearsal": "baselines", "Subset": "streams", "Training": "optimisation",
    "blurry": "variations", "limit": "variations", "scored": "variations", "run": "spec", "stream": "own", "tune": "search",
}  # fmt: skip
__all__ = ["Experience", "Record", "Rehearsal", "Subset", "Training", "blurry", "domain", "drift", "limit", "permuted",
           "rotated", "run", "scored", "split", "stream", "tune"]  # fmt: skip


if not TYPE_CHECKING:  # to a type checker it would mean that there is every name

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that reports of records do not wait for torch."""
        if name not in __all__:
            raise AttributeError(f"module 'rwalk.bench' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        return getattr(import_module(f"rwalk.bench.{_MODULES.get(name, 'builtin')}"), name)


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
