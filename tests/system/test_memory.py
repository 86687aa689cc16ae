"""What protecting pretrained weights costs in memory, by the operating system's account."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, gc, sys, torch
from torch import nn
from rwalk import Consolidator

torch.set_num_threads(1)

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

torch.manual_seed(0)
checkpoint = nn.Sequential(*(nn.Linear(2560, 2560) for _ in range(4))).bfloat16()
model = checkpoint.to(getattr(torch, sys.argv[1]))
x, y = torch.randn(8, 2560, dtype=model[0].weight.dtype), torch.randint(2560, (8,))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

def step():
    nn.functional.cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

for p in model.parameters():
    p.grad = torch.zeros_like(p)
small = nn.Linear(64, 64)  # what libraries load once is nobody's share
Consolidator(small).estimate([(torch.randn(8, 64), torch.randint(64, (8,)))])
before = resident()
memory = Consolidator(model, average="none")
memory.estimate([(x, y)]) if sys.argv[2] == "estimate" else memory.mark()
memory.attach(optimizer)
for _ in range(12):
    step()
print((resident() - before) / sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["mark", "estimate"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_checkpoint_in_bfloat16_is_protected_in_three_bytes_a_parameter(precision, how):
    """Two for the point, which loses nothing, and a few percent for the factors, while they are measured too."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, precision, how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 2 <= float(done.stdout) <= 3
