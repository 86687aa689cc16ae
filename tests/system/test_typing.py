"""A misspelt name is found by a type checker, in the public names that are imported when they are first used too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """\
[mypy]
follow_imports = silent
[mypy-torch.*,numpy.*,optuna.*,scipy.*,safetensors.*]
follow_imports = skip
ignore_missing_imports = true
"""
USED = """\
from typing import Any

import torch
import rwalk
from rwalk import Consolidator, RWalk, bench, replay, report
from rwalk.bench import Training
from rwalk.rules import Rule

model = torch.nn.Linear(2, 2)
memory = rwalk.Consolidator(model, RWalk(alpha=0.5), strength=10)
wrong = rwalk.Consolidator(model, RWalk(alfa=0.5))  # wrong
wrong = rwalk.Consolidator(model, rwalk.RWalk(), strenght=10)  # wrong
wrong = rwalk.Consolidater(model)  # wrong
memory.consolidate()
memory.consolidat()  # wrong
strength: float = memory.strength
steps: str = memory.steps  # wrong
tasks = rwalk.bench.split("digits", tasks=2)
tasks = bench.split("digits", task=2)  # wrong
record = rwalk.bench.run(tasks, rwalk.RWalk(), strength=1, training=Training(epochs=1, optimizer="adam"))
record = bench.run(tasks, "finetune", trainning=Training())  # wrong
record = bench.run(tasks, training=Training(optimiser="adam"))  # wrong
record = bench.run(tasks, training=Training(optimizer="adamm"))  # wrong
print(record.forgetting, record.name)
print(record.forgeting)  # wrong
tuned = bench.tune(tasks, "default", strengths=[1, 10])
print(tuned.strength, tuned.strenght)  # wrong
buffer = replay.Buffer(20, select="herding")
buffer = replay.Buffer(20, per="classes")  # wrong
report.write("runs")
report.wrte("runs")  # wrong
rule: Rule[Any] = rwalk.EWC(samples=10)
rwalk.kernels.use("blocked")
rwalk.kernels.us("blocked")  # wrong
"""


def test_mypy_finds_misspelt_names_and_nothing_else(tmp_path):
    pytest.importorskip("mypy", reason="a tool of developers, which users' environments lack")
    (tmp_path / "used.py").write_text(USED)
    source = str(Path(__file__).parents[2] / "src")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "used.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": source}, capture_output=True, text=True, check=False
    )
    found = {int(line) for line in re.findall(r"^used\.py:(\d+): error", done.stdout, re.M)}
    expected = {number for number, line in enumerate(USED.splitlines(), 1) if line.endswith("# wrong")}
    assert found == expected, done.stdout + done.stderr
