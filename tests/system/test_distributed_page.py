"""The examples of docs/distributed.md, run on two ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.skipif(not (torch.distributed.is_available() and sys.platform == "linux"), reason="needs gloo")
def test_the_pages_examples_run_on_two_ranks(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    (tmp_path / "page.py").write_text("".join(blocks))
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([*TWO, "page.py"], timeout=90, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(Shard(dim=0),)") == 2
    assert (tmp_path / "memory.safetensors").exists()
