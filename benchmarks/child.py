"""Runs a module of the benchmark in a fresh process, which no earlier measurement has left its mark on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(module: str, *arguments: object) -> Any:
    """Return what the module prints last, read as JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])
