"""The hosts that the tests of the integrations train in, and how to import the one that does not come easily."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest


def avalanche() -> ModuleType:
    """Import Avalanche, which lies in a folder of its own; skip the tests where it is not there."""
    apart = Path(sys.prefix) / "avalanche"
    if apart.is_dir() and str(apart) not in sys.path:
        sys.path.append(str(apart))
    if find_spec("avalanche") is None:
        pytest.skip("needs Avalanche: make test-integrations", allow_module_level=True)
    from benchmarks.peers import avalanche

    return avalanche()
