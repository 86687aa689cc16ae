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

FROM_FILE = """
import ctypes, gc, sys, torch
from torch import nn
from rwalk import EWC, Anchor, Consolidator, Kronecker

torch.set_num_threads(1)

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(status[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")]

def protected(size, mapped):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(4)))
    batch = torch.randn(8, size), torch.randint(size, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def memory():
        return Consolidator(model, {"EWC": EWC(labels="sample"), "Kronecker": Kronecker()}[sys.argv[1]], 1.0, average="none")

    made = memory()
    made.estimate([batch])
    made.anchor.save(sys.argv[2])
    del made
    before, held = resident(), memory()
    held.adopt(Anchor.load(sys.argv[2], mapped=mapped))
    held.attach(optimizer)
    for _ in range(12):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return [(after - b) / sum(p.numel() for p in model.parameters()) for after, b in zip(resident(), before)]

protected(256, True)  # what libraries load once is nobody's share
print(*protected(2048, sys.argv[3] == "mapped"))
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["mark", "estimate"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_checkpoint_in_bfloat16_is_protected_in_three_bytes_a_parameter(precision, how):
    """Two for the point, which loses nothing, and a few percent for the factors, while they are measured too."""
    (bytes_each,) = run(SCRIPT, precision, how)
    assert 2 <= bytes_each <= 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("rule", "held"), [("EWC", 8), ("Kronecker", 4.1)])
def test_an_anchor_that_stays_in_its_file_takes_no_memory_of_the_process(rule, held, tmp_path):
    """Point and importance in float32, or point and factors; what the rule measures in training comes on top."""
    private, of_files = run(FROM_FILE, rule, str(tmp_path / "anchor"), "mapped")
    assert private < 0.3
    assert of_files == pytest.approx(held, abs=0.3)
    private, of_files = run(FROM_FILE, rule, str(tmp_path / "anchor"), "loaded")
    assert private == pytest.approx(held, abs=0.3)
    assert of_files < 0.3
