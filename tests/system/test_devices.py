"""Runs on a GPU, where there is one; elsewhere that devices which are not there are refused, and that records name theirs."""

import json
import shlex

import pytest
import torch

from rwalk import EWC, MAS, SI, Kronecker, RWalk, bench
from rwalk._io import files
from rwalk.bench import Record, Training, tune
from rwalk.cli.main import main
from rwalk.cli.options import parse
from rwalk.report import summarise
from rwalk.report.reproduce import commands

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = Training(hidden=(16,), batch_size=50, lr=0.02)
METHODS = ["finetune", "joint", "cumulative", "replay", "agem", "lwf", "recipe", RWalk(), RWalk(fisher="example"), EWC(), SI()]


def a_run(method, device, **options):
    return bench.run(bench.split("digits", tasks=3, scenario="class"), method, seed=1, training=QUICK, device=device, **options)


@pytest.mark.parametrize("name", ["mps", "tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(name, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"(There is no d|D)evice `{name}`"):
        a_run("finetune", name, checkpoint=tmp_path / "there")
    assert main(["run", "split-digits", "--device", name or "none", "--out", str(tmp_path / "runs")]) == 2
    assert f"evice `{name or 'none'}`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="sees 0 GPUs"):
        a_run("finetune", "cuda")


def test_a_record_names_its_device_and_the_command_that_does_it_again(tmp_path):
    record = a_run("recipe", "cpu")
    assert record.device == "cpu"
    assert Record.load(record.save(tmp_path)) == record
    assert "--device" not in commands(summarise([record])[0]).lines[0]
    elsewhere = Record(**{**vars(record), "device": "cuda"})
    words = shlex.split(commands(summarise([elsewhere])[0]).lines[0])
    assert parse(words[1:]).machine.device == "cuda"


def test_a_record_without_a_device_is_of_the_time_when_there_was_only_one(tmp_path):
    path = a_run("finetune", "cpu").save(tmp_path)
    content = json.loads(path.read_text())
    files.seal(path, {key: value for key, value in content.items() if key not in ("device", "sha256")})
    assert Record.load(path).device == "cpu"


@gpu
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_gpu_gives_what_the_cpu_gives(method):
    """Accuracies over some 70 examples of a task; a few hundred steps of float32 sums in another order flip few of them."""
    here, there = a_run(method, "cpu"), a_run(method, "cuda")
    assert (here.device, there.device) == ("cpu", "cuda")
    assert there.versions["gpu"]
    for ours, theirs in zip(here.scores, there.scores, strict=True):
        assert [a is None for a in ours] == [a is None for a in theirs]
        assert all(abs(a - b) < 0.05 for a, b in zip(ours, theirs, strict=True) if a is not None)


@gpu
@pytest.mark.parametrize("method", ["finetune", "replay", "agem", "lwf", "recipe", RWalk(), MAS(), Kronecker()], ids=repr)
def test_a_run_on_a_gpu_goes_on_where_it_was_stopped(method, tmp_path):
    """With dropout, which draws on the GPU."""
    stream = bench.split("digits", tasks=3)
    options = {"seed": 1, "training": Training(model="test_devices:dropping", batch_size=50, lr=0.02), "device": "cuda"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = bench.run(stream, method, **options)

        def stop(_, tasks):
            if tasks == 3:
                raise KeyboardInterrupt

        place = tmp_path / "checkpoint"
        with pytest.raises(KeyboardInterrupt):
            bench.run(stream, method, checkpoint=place, track=stop, **options)
        assert bench.run(stream, method, checkpoint=place, **options).scores == whole.scores
    finally:
        torch.use_deterministic_algorithms(False)


def dropping(_):
    """Make a perceptron with dropout."""
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 10)
    return torch.nn.Sequential(*layers)


@gpu
def test_a_run_on_a_gpu_leaves_its_random_numbers_alone():
    before = torch.cuda.get_rng_state()
    a_run("finetune", "cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


@gpu
def test_tuning_on_a_gpu(tmp_path):
    found = tune(bench.split("digits"), "recipe", [0.1, 1], training=QUICK, tasks=2, device="cuda", out=tmp_path)
    assert {Record.load(path).device for path in tmp_path.glob("*.json")} == {"cuda"}
    assert found.strength in (0.1, 1)
