"""The command line, run as users run it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rwalk.cli import main

QUICK = ["--seeds", "1", "--hidden", "8", "--batch-size", "100", "--tasks", "2"]


def run(*arguments):
    return main(["run", *arguments])


def test_runs_write_records_and_print_a_table(tmp_path, capsys):
    out = str(tmp_path / "runs")
    assert (
        run("split-digits", "--methods", "finetune,rwalk,joint", *QUICK, "--seeds", "2", "--out", out, "--rwalk.alpha", "0.5")
        == 0
    )
    printed = capsys.readouterr().out
    assert "task-incremental, softmax mask: task" in " ".join(printed.split())
    assert printed.count("on disk") == 0
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").iterdir()]
    assert sorted((r["method"], r["seed"]) for r in records) == [(m, s) for m in ("finetune", "joint", "rwalk") for s in (0, 1)]
    assert all(len(r["accuracy"]) == 2 and r["stream"] == "split-digits" for r in records)
    assert {r["config"]["rule"]["alpha"] for r in records if r["method"] == "rwalk"} == {0.5}
    assert (
        run("split-digits", "--methods", "finetune,rwalk,joint", *QUICK, "--seeds", "2", "--out", out, "--rwalk.alpha", "0.5")
        == 0
    )
    assert capsys.readouterr().out.count("on disk") == 6
    assert main(["report", out]) == 0
    table = capsys.readouterr().out
    for word in ("finetune", "rwalk", "joint", "accuracy", "forgetting", "step"):
        assert word in table


def test_alpha_takes_a_number_or_mean(tmp_path):
    assert run("split-digits", "--methods", "rwalk", *QUICK, "--out", str(tmp_path), "--rwalk.alpha", "mean") == 0
    (record,) = tmp_path.iterdir()
    assert json.loads(record.read_text())["config"]["rule"]["alpha"] == "mean"


def test_scenario_mask_and_streams(tmp_path):
    assert run("split-digits", *QUICK, "--scenario", "class", "--mask", "all", "--out", str(tmp_path)) == 0
    assert run("permuted:digits", *QUICK, "--out", str(tmp_path)) == 0
    assert run("rotated-digits", *QUICK, "--out", str(tmp_path)) == 0
    records = [json.loads(p.read_text()) for p in tmp_path.iterdir()]
    assert {r["stream"] for r in records} == {"split-digits", "permuted-digits", "rotated-digits"}
    assert {r["config"]["training"]["mask"] for r in records} == {"all"}


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for word in ("split", "permuted", "rotated", "digits", "mnist", "finetune", "joint", "rwalk"):
        assert word in printed


@pytest.mark.parametrize(("arguments", "word"), [
    (["run", "split-digits", "--methods", "rwalk,sorcery"], "method `sorcery`"),
    (["run", "digits"], "stream `digits`"),
    (["run", "split-digits", "--tasks", "11"], "11 tasks for 10 classes"),
    (["run", "split-mnist", "--data", "absent"], "`absent`"),
    (["run", "split-./absent"], "does not exist"),
    (["run", "split-digits", "--strength", "-1"], "strength -1"),
    (["run", "split-digits", "--seeds", "0"], "--seeds 0"),
    (["run", "split-digits", "--threads", "0"], "--threads 0"),
    (["run", "permuted-digits", "--scenario", "task"], "scenario `task`"),
    (["report", "absent"], "no records"),
])  # fmt: skip
def test_mistakes_get_three_parts_and_status_two(arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert word in message
    assert message.startswith("rwalk: Got ")
    assert "Expected " in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("flag", "value"), [("--rwalk.alpha", "2"), ("--rwalk.beta", "1"), ("--lr", "-1")])
def test_unknown_and_impossible_fields_are_refused(flag, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["run", "split-digits", flag, value])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    assert flag.strip("-").split(".")[-1] in captured.out + captured.err
    assert not any(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "f").touch()
    assert run("split-digits", *QUICK, "--out", str(tmp_path / "f")) == 2
    captured = capsys.readouterr()
    assert "which is a file" in captured.err
    assert "average accuracy" not in captured.out


def test_a_broken_record_is_named_and_the_rest_reported(tmp_path, capsys):
    run("split-digits", *QUICK, "--methods", "finetune", "--out", str(tmp_path))
    (tmp_path / "bad.json").write_text("{")
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "bad.json" in captured.err
    assert "finetune" in captured.out


def test_ctrl_c_and_the_same_command_again_give_what_an_undisturbed_run_gives(tmp_path):
    arguments = ["run", "permuted-digits", "--methods", "finetune,rwalk", "--seeds", "4", "--epochs", "2", "--tasks", "3"]

    def start(out):
        command = [sys.executable, "-m", "rwalk", *arguments, "--out", str(out)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "100"}
        )

    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    process = start(disturbed)
    deadline = time.monotonic() + 120
    while not (disturbed.is_dir() and any(disturbed.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "The same command continues" in error
    finished = {p.name for p in disturbed.iterdir()}
    assert 1 <= len(finished) < 8
    for out in (disturbed, calm):
        process = start(out)
        printed, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert printed.count("on disk") == (len(finished) if out is disturbed else 0)
    names = {p.name for p in calm.iterdir()}
    assert names == {p.name for p in disturbed.iterdir()}
    assert len(names) == 8
    for name in names:
        a, b = (json.loads((folder / name).read_text()) for folder in (calm, disturbed))
        assert a["accuracy"] == b["accuracy"]
