"""`rwalk run` under torchrun: one model on two ranks, with what one process gives, also after a kill."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from rwalk import commands
from rwalk.bench import Record

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and sys.platform == "linux"), reason="needs gloo, and /proc"
)
RUN = [
    "rwalk",
    "run",
    "split-digits",
    "--methods",
    "rwalk,recipe,replay,agem,lwf",
    "--seeds",
    "1",
    "--tasks",
    "3",
    "--batch-size",
    "9",
    "--out",
]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def launch(command, folder):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *RUN, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def kill(launcher):
    """Kill torchrun and the ranks, which are its children in sessions of their own."""
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in (launcher.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()


def records(folder):
    return {path.name: Record.load(path) for path in sorted(folder.glob("*.json"))}


def same(one, two):
    """Odd batches of nine are parts of five and four; accuracies are over some seventy examples."""
    assert one.keys() == two.keys()
    assert len(one) == 5
    for name, record in one.items():
        other = two[name]
        assert (record.ranks, other.ranks) == (1, 2)
        assert record.config == other.config
        for a, b in zip(record.diagnostics, other.diagnostics, strict=True):
            assert a["figures"] == pytest.approx(b["figures"], rel=1e-3, abs=1e-7)
            shares = [[layer["share"] for layer in side["layers"]] for side in (a, b)]
            assert shares[0] == pytest.approx(shares[1], rel=1e-3)
        for a, b in zip(record.accuracy, other.accuracy, strict=True):
            assert a == pytest.approx(b, abs=0.015)


def test_two_ranks_give_the_records_of_one_process_also_after_a_kill(tmp_path):
    plain, killed = launch([sys.executable, "-m"], tmp_path / "one"), launch(TWO, tmp_path / "two")
    late = time.monotonic() + 60
    while not list((tmp_path / "two").glob("*.checkpoint")) and killed.poll() is None and time.monotonic() < late:
        time.sleep(0.002)
    kill(killed)
    _, errors = plain.communicate(timeout=90)
    assert plain.returncode == 0, errors
    assert list((tmp_path / "two").glob("*.checkpoint"))
    assert len(records(tmp_path / "two")) < 5
    again = launch(TWO, tmp_path / "two")
    shown, errors = again.communicate(timeout=90)
    assert again.returncode == 0, errors
    assert "cannot be used" not in errors
    assert shown.count("average accuracy") == 5, "the first rank alone prints"
    assert not list((tmp_path / "two").glob("*.checkpoint"))
    same(records(tmp_path / "one"), records(tmp_path / "two"))


def test_the_pages_examples_run_on_two_ranks(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    (tmp_path / "page.py").write_text("".join(blocks))
    done = subprocess.run([*TWO[:-1], "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(Shard(dim=0),)") == 2
    assert (tmp_path / "memory.safetensors").exists()
    (command,) = re.findall(r"```sh\n(.*?)\n```", page, re.S)
    assert command.split()[1:5] == ["--standalone", "--nproc-per-node", "2", "-m"], "tried above with other arguments"
    tyro.cli(commands.COMMANDS, args=command.split()[6:])
