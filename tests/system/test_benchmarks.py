"""The benchmark runs, on a network so small that its figures mean nothing; only the shape of the record is looked at."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import epoch, memory
from benchmarks.__main__ import main
from benchmarks.variants import ours


def test_the_quick_form_writes_a_record_of_every_figure(tmp_path, capfd):
    out = tmp_path / "record.json"
    names = "rwalk-blocked,recipe-blocked,ewc"
    main(["--quick", "--models=tiny", f"--variants={names}", "--rounds=1", "--memory=none", f"--out={out}"])
    record = json.loads(out.read_text())
    assert [row["variant"] for row in record["speed"]] == ["plain", "rwalk-blocked", "recipe-blocked", "ewc"]
    for row in record["speed"]:
        assert row["model"] == "tiny"
        assert row["optimizer"] == "adam"
        assert row["rounds"] == 1
        assert all(len(row[key]) == 3 and min(row[key]) > 0 for key in ("ms", "ratio", "ratio_to_base"))
    assert record["speed"][0]["ratio"] == [1.0, 1.0, 1.0]
    assert {"format", "date", "machine", "versions", "threads", "seed", "settings", "memory", "left_out"} <= record.keys()
    assert "recipe" in capfd.readouterr().out


linux = pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux accounts for memory in this way")


def test_tensors_that_compilers_trace_with_hold_no_memory():
    before = memory.live()
    with FakeTensorMode():
        fake = torch.empty(1000)
    assert memory.live() == before
    real = torch.empty(1000)
    assert memory.live() == before + real.nbytes
    del fake


@linux
def test_memory_above_plain_training():
    variants = ours()
    plain, ewc = (memory.trial(variants[key], "tiny", 0) for key in ("plain", "ewc"))
    row = memory.row("tiny", "ewc", variants["ewc"], ewc, plain)
    probes = 4 * (32 + 32 + 10) / row["parameter_bytes"]  # of two matrices and a bias: whether they were written to
    assert row["state"] == 2  # point and importance
    assert row["tensors"] == pytest.approx(2 + probes)
    assert {"resident", "peak_training", "peak_task_end", "parameter_bytes", "target"} <= row.keys()


@linux
def test_memory_is_measured_in_a_process_of_its_own():
    row, *more = memory.measure("tiny", {"plain": ours()["plain"]}, 0, print)
    assert not more
    assert row["parameter_bytes"] == 4 * (8 * 8 + 8 + 8 * 10 + 10)
    assert row["tensors"] == row["peak_training"] == 0


def test_unknown_names_are_refused(capfd):
    with pytest.raises(SystemExit, match="names out of"):
        main(["--models=mlp-b11"])


def test_an_epoch_of_the_runner_stands_beside_a_bare_one(capfd):
    times = epoch.main(["--stream=permuted-digits", "--rounds=2", "--batch=100"])
    assert times.keys() == {"bare", "learner", "command"}
    assert all(len(found) == 2 and min(found) > 0 for found in times.values())
    assert capfd.readouterr().out.count("ratio") == 3
