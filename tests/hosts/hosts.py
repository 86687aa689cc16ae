"""The hosts that the tests of the integrations train in: how to import the one that does not come easily, and processes."""

import os
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from processes import answering


def avalanche() -> ModuleType:
    """Import Avalanche, which lies in a folder of its own; skip the tests where it is not there."""
    apart = Path(sys.prefix) / "avalanche"
    if apart.is_dir() and str(apart) not in sys.path:
        sys.path.append(str(apart))
    if find_spec("avalanche") is None:
        pytest.skip("needs Avalanche: make test-integrations", allow_module_level=True)
    from benchmarks.peers import avalanche

    return avalanche()


@contextmanager
def forks(module: str):
    """A function that calls one of a module of tests in a new process, or in several; see `forks.py`."""
    here = Path(__file__).parent
    paths = [here, here.parent, here.parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, here / "forks.py", module]
    with answering(command, env=environment) as ask:

        def run(function, *arguments, ranks=1):
            return ask({"function": function, "arguments": list(map(str, arguments)), "ranks": ranks})

        yield run


def numbers(tree):
    """The tensors and numbers of nested dictionaries and lists, without names and nothing."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items() if not isinstance(value, str | None)}
    return [numbers(value) for value in tree] if isinstance(tree, list) else tree
