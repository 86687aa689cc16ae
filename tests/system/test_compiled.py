"""Compiled kernels in fresh processes."""

import os
import subprocess
import sys

import pytest


def test_code_that_was_just_compiled_and_code_kept_on_disk_give_the_same_bits(tmp_path):
    pytest.importorskip("numba")
    script = """
import os
import torch
from rwalk import Consolidator, TaskFisher, kernels
kernels.use("numba")
child = os.fork()  # two processes, one after the other, in which nothing is compiled yet
if child:
    _, status = os.waitpid(child, 0)
    assert not status
torch.manual_seed(0)
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
memory = Consolidator(model, TaskFisher()).attach(optimizer)
for task in range(2):
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(10, 64)), torch.arange(10)).backward()
        optimizer.step()
    memory.consolidate()
print(memory.anchor.omega["weight"].double().sum().item(), model.weight.double().sum().item())
"""
    there = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=there, check=False)
    assert done.returncode == 0, done.stderr
    compiled, kept = done.stdout.splitlines()
    assert compiled == kept
    assert any(tmp_path.rglob("*.nbc"))
