"""Training on several ranks gives what training in one process gives, holds the shards alone, and says what it cannot do."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranked

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
WORLDS = [2, 3, 4]


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(Path(__file__).parent / "ranks.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def on(server, tmp_path):
    """Run a function of `ranked` on some ranks; return what it returned on each."""
    calls = iter(range(100))

    def run(world, case, **arguments):
        out = tmp_path / str(next(calls))
        out.mkdir()
        request = {"case": case, "world": world, "arguments": arguments, "out": str(out)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        assert not answer, answer.get("error")
        return [torch.load(out / f"{rank}.pt") for rank in range(world)]

    return run


@functools.cache
def truth(name, optimizer="sgd"):
    return ranked.trained(name, optimizer=optimizer)


def alike(a, b, place="", rtol=1e-9, atol=1e-12):
    """Demand that nested values are equal to rounding."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape, place
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol * (1 + float(b.abs().max() if b.numel() else 0))), (
            place
        )
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            alike(a[key], b[key], f"{place}/{key}", rtol, atol)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            alike(*pair, f"{place}/{i}", rtol, atol)
    elif isinstance(a, float):
        assert a == b or math.isclose(a, b, rel_tol=rtol * 10, abs_tol=atol), (place, a, b)
    else:
        assert a == b, (place, a, b)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_rule_gives_what_one_process_gives(on, how, world):
    results = on(world, "all_trained", names=list(ranked.RULES), how=how)
    for name in ranked.RULES:
        for rank in results:
            alike(rank[name]["found"], truth(name)["found"], f"{name} on {world} ranks under {how}")
