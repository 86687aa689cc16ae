"""Runs side by side, in processes and on a Dask cluster: nothing is lost or done twice, and failures stop no others."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from processes import running, wait
from rwalk._io import files
from rwalk.bench import Record, models, pool, spec
from rwalk.bench.spec import RunSpec
from rwalk.cli import main
from rwalk.cli.options import parse
from rwalk.cli.run import describe

SMALL = ["--tasks", "3", "--hidden", "8", "--batch-size", "40"]
SWEEP = ["run", "split-digits", "--methods", "finetune,rwalk", "--seeds", "2", "--strength", "0.1,1", *SMALL]
SLOW = ["run", "permuted-digits", "--methods", "rwalk,recipe", "--seeds", "3", "--epochs", "2", *SMALL[:2], "--hidden", "32"]


def started(arguments, out, **options):
    """The command line, started as users start it."""
    command = [sys.executable, "-m", "rwalk", *arguments, "--out", str(out)]
    return running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def measured(folder, killed=False):
    """Return what the records of a folder hold, except times and commands; only those and the report may be in the folder.

    A worker that was killed while it wrote leaves a part of a file, which later commands remove once it is old.
    """
    parts = {".part"} if killed else set()
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".html", ".md"} | parts
    return {
        p.name: {k: v for k, v in vars(Record.load(p)).items() if k not in ("timings", "command")}
        for p in folder.glob("*.json")
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Records of the slow runs, done one after another."""
    folder = tmp_path_factory.mktemp("calm")
    assert main.main([*SLOW, "--out", str(folder)]) == 0
    return measured(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Dask scheduler as a process of its own: a function that starts a worker, and the address."""
    pytest.importorskip("distributed")
    place, file = tmp_path_factory.mktemp("dask"), tmp_path_factory.mktemp("scheduler") / "file.json"
    with ExitStack() as children:

        def child(name, *words):
            log = children.enter_context((place / f"{name}.log").open("a"))
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *words, "--no-dashboard"]
            return children.enter_context(running(command, stdout=log, stderr=log, cwd=place))

        child("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-show", "--scheduler-file", str(file))
        wait(lambda: file.exists() and file.read_text().endswith("}"))  # it is there before it is written
        address = json.loads(file.read_text())["address"]
        yield address, lambda: child("worker", address, "--no-nanny", "--nthreads", "1")


def test_workers_give_what_one_process_gives(tmp_path, capsys):
    for workers in ("1", "2"):
        assert main.main([*SWEEP, "--workers", workers, "--out", str(tmp_path / workers)]) == 0
        printed = capsys.readouterr().out
        assert len(re.findall(r"average accuracy", printed)) == 6  # strength is nothing to finetune
        assert "rwalk strength 0.1 seed 1: average accuracy" in printed
    assert measured(tmp_path / "1") == measured(tmp_path / "2")
    assert sorted(r["config"].get("strength", 0) for r in measured(tmp_path / "2").values()) == [0, 0, 0.1, 0.1, 1, 1]
    assert main.main([*SWEEP, "--out", str(tmp_path / "2")]) == 0
    assert capsys.readouterr().out.count("on disk") == 6


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_with_workers_and_the_same_command_again(tmp_path, calm, capsys, whole_group):
    out = tmp_path / "out"
    with started([*SLOW, "--workers", "2"], out, start_new_session=True) as process:
        wait(lambda: out.is_dir() and any(out.glob("*.json")) and any(out.glob("*.checkpoint")))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "The same command continues" in error
    finished = len(list(out.glob("*.json")))
    assert 1 <= finished < len(calm)
    assert main.main([*SLOW, "--workers", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("on disk") >= finished
    assert measured(out, killed=True) == calm


def test_a_worker_that_is_killed_takes_no_other_run_with_it(tmp_path, calm):
    out = tmp_path / "out"
    with started([*SLOW, "--workers", "2"], out) as process:
        wait(lambda: out.is_dir() and any(out.glob("*.json")) and any(out.glob("*.checkpoint")))
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert measured(out, killed=True) == calm


def children(pid):
    """Processes that train: those of loky that have loaded the library."""
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pids = [int(line.split()[0]) for line in found.splitlines() if "popen_loky" in line]
    assert len(pids) == 2, found
    return pids


def test_a_run_that_fails_is_named_with_its_cause_and_stops_no_other(tmp_path, capsys, recwarn):
    sweep = ["run", "permuted-digits", "--methods", "rwalk", "--seeds", "2", "--tasks", "2", "--strength", "1,1e6"]
    for workers in ("1", "2"):
        assert main.main([*sweep, "--workers", workers, "--out", str(tmp_path / workers)]) == 2
        printed, error = capsys.readouterr()
        assert printed.count("failed; the cause comes at the end") == 2
        assert any("finite" in line for line in error.splitlines())
        assert {"rwalk strength 1e+06 seed 0", "rwalk strength 1e+06 seed 1"} == set(
            re.findall(r"rwalk strength \S+ seed \d", error)
        )
        assert len(list((tmp_path / workers).glob("*.json"))) == 2
        assert "Traceback" not in error


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_warning_names_its_run_and_is_printed_in_full_once(tmp_path, workers):
    """Truth: a learner that says the same in each run, twice, and something of its own."""
    (tmp_path / "warns.py").write_text(WARNS)
    sweep = ["run", "split-digits", "--methods", "finetune,warns:Warns", "--seeds", "2", *SMALL]
    with started([*sweep, "--workers", workers], tmp_path / "out", cwd=tmp_path) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    said = [line.removeprefix("rwalk: warning from ") for line in error.splitlines() if "warning" in line]
    first, second = (f"warns:Warns seed {seed}" for seed in ((0, 1) if "seed 0" in said[0] else (1, 0)))
    again = f"the same as from {first}"
    assert said[:2] == [f"{first}: The learning rate is high.", f"{first}: With {first[-6:]}."]
    assert said[2:] == [f"{second}: {again}", f"{second}: With {second[-6:]}."]


WARNS = """
import warnings
import torch
class Warns:
    def __init__(self, seed):
        self.seed = seed
    def fit(self, experience):
        for _ in range(2):
            warnings.warn("The learning rate is high.")
        warnings.warn(f"With seed {self.seed}.")
    def predict(self, x, seen):
        return torch.full((len(x),), seen[0])
"""


def test_a_dask_worker_that_is_killed_loses_nothing(tmp_path, calm, cluster):
    address, worker = cluster
    first, _ = worker(), worker()
    out = tmp_path / "out"
    with started([*SLOW, "--backend", "dask", "--address", address], out) as process:
        wait(lambda: out.is_dir() and any(out.glob("*.json")) and any(out.glob("*.checkpoint")))
        first.kill()
        assert first.wait(timeout=30) == -signal.SIGKILL
        printed, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert measured(out, killed=True) == calm
    assert len(re.findall(r"^\w+ seed \d: average accuracy", printed, re.M)) == len(calm)


def test_a_cluster_without_our_folder_sends_records_back(tmp_path, cluster, monkeypatch):
    """The folder is hidden from a worker by a call that finds another one."""
    address, worker = cluster
    worker()
    run = describe(parse(SWEEP), SWEEP)[-1]
    ((_, (record, existed, _)),) = pool.outcomes([run], tmp_path / "nowhere", cluster=address)
    assert not existed
    assert record.config["strength"] == 1.0
    assert record.command == "rwalk " + " ".join(SWEEP)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_sent_for_a_run_is_small_and_holds_no_data():
    cloudpickle = pytest.importorskip("cloudpickle")
    for run in describe(parse(SWEEP), SWEEP):
        assert len(cloudpickle.dumps((pool.run_in_worker, run, Path("/a/folder"), None))) < 2000


def test_a_run_is_described_once_and_goes_to_workers_as_it_is(tmp_path, monkeypatch):
    """Nothing is worked out anew: neither by the command, nor by a worker that has got the description."""
    cloudpickle, counts = pytest.importorskip("cloudpickle"), collections.Counter()

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (counts.update([name]), function(*a, **k))[1])

    described = RunSpec.configuration.func
    monkeypatch.setattr(RunSpec.configuration, "func", lambda spec: (counts.update(["configuration"]), described(spec))[1])
    counted(spec, "resolve")
    counted(models, "build")
    words = ["run", "split-digits", "--methods", "rwalk", "--seeds", "1", *SMALL]
    assert main.main([*words, "--out", str(tmp_path)]) == 0
    assert counts == {"configuration": 1, "resolve": 1, "build": 1}
    (run,) = describe(parse(words), words)
    sent = cloudpickle.loads(cloudpickle.dumps(run))
    counts.clear()
    assert sent.name == next(tmp_path.glob("*.json")).name
    assert sent.settings == run.settings
    assert not counts


def test_a_cluster_that_is_not_there_or_has_no_workers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr(pool, "PATIENCE", 1)
    assert main.main([*SWEEP, "--backend", "dask", "--address", "tcp://127.0.0.1:1", "--out", str(tmp_path)]) == 2
    assert "No Dask scheduler answers at `tcp://127.0.0.1:1`" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "word"), [
    (["--workers", "0"], "--workers 0 is out of range; pass 1 to 1,024."),
    (["--backend", "dask"], "--backend dask and --address belong together"),
    (["--address", "tcp://h:1"], "--backend dask and --address belong together"),
    (["--strength", "1,x"], "--strength 1,x is not understood; pass numbers with commas between, or tuned."),
    (["--strength", "1,-1"], ""),
    (["--strength", "tuned"], "`{out}` has no tuned strength for `rwalk`"),
    (["--skip", "3"], "3 tasks cannot be taken from a stream of 3; pass 0 to 2."),
    (["--skip", "-1"], "--skip -1 is out of range; pass 0 to 9,999."),
])  # fmt: skip
def test_mistakes_are_named_before_anything_is_written(arguments, word, capsys, tmp_path):
    words = ["run", "split-digits", *SMALL, *arguments, "--out", str(tmp_path / "out")]
    assert main.main(words) == 2
    assert capsys.readouterr().err.startswith("rwalk: " + word.format(out=tmp_path / "out"))
    assert not any(tmp_path.iterdir())


def test_one_at_a_time_holds_a_file_and_a_killed_one_lets_go(tmp_path):
    code = """
import sys, time
from rwalk._io import files
with files.file_lock(sys.argv[1]):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""
    lock = tmp_path / "x.lock"

    def holder(seconds):
        return running([sys.executable, "-c", code, str(lock), str(seconds)], stdout=subprocess.PIPE)

    with holder(60) as first:
        assert first.stdout.readline() == "in\n"
        with holder(0) as second:
            time.sleep(0.5)
            assert second.poll() is None
            first.kill()
            first.wait(timeout=10)
            assert second.stdout.readline() == "in\n"
            assert second.wait(timeout=10) == 0
    assert not lock.exists()


def test_where_there_are_no_locks_nobody_waits(tmp_path):
    with files.file_lock(tmp_path / "absent" / "x.lock"):
        pass


@contextmanager
def counted(module, name, monkeypatch):
    """Count calls of a function."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(1), function(*args, **kwargs))[1])
    yield calls


def test_two_threads_that_want_one_run_do_it_once(tmp_path, monkeypatch):
    """As when a Dask scheduler gives a run that it believes lost to another worker."""
    from concurrent.futures import ThreadPoolExecutor

    from rwalk import bench

    stream, training = bench.split("digits", tasks=2), bench.Training(hidden=(4,), batch_size=100)
    run = RunSpec(stream, training=training)
    with counted(RunSpec, "run", monkeypatch) as calls, ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(pool.run_or_load, run, tmp_path) for _ in range(4)]
        results = [f.result(timeout=60) for f in futures]
    assert len(calls) == 1
    assert sorted(outcome.existed for outcome in results) == [False, True, True, True]
    assert [p.name for p in tmp_path.iterdir()] == [run.name]
