"""Runs that are killed, that find the disk full or meet their twin: nothing is lost and nothing is half there."""

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import answering
from rwalk import RWalk, bench
from rwalk._io import files, states
from rwalk.bench import Record, Training
from rwalk.bench.baselines import BASELINES
from rwalk.rules import rules

COMMAND = ["run", "split-digits", "--methods", "finetune,rwalk,recipe,joint", "--seeds", "1", "--tasks", "3", "--hidden", "6",
           "--batch-size", "40", "--optimizer", "adam", "--lr", "0.01"]  # fmt: skip
SMALL = Training(hidden=(6,), batch_size=50)


@pytest.fixture(scope="module")
def child():
    """A function that runs a command in a child of a process that has everything loaded; see `children.py`."""
    with answering([sys.executable, Path(__file__).with_name("children.py")]) as ask:

        def run(out, **options):
            return ask({"arguments": COMMAND, "out": out and str(out), **options})

        run(None)
        yield run


def measured(folder):
    """All that the records of a folder say, but for times; no other file than those and the report may be there."""
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".html", ".md"}
    return {p.name: measurement(Record.load(p)) for p in folder.glob("*.json")}


def measurement(record):
    return {k: v for k, v in vars(record).items() if k not in ("timings", "versions", "command")}


@pytest.fixture(scope="module")
def calm(child, tmp_path_factory):
    """Records of an undisturbed run, how long it took and how many lines of the writing modules it executed."""
    folder, again = tmp_path_factory.mktemp("calm"), tmp_path_factory.mktemp("again")
    start = time.perf_counter()
    answer = child(folder)
    seconds = time.perf_counter() - start
    assert (answer["status"], answer["stderr"]) == (0, "")
    assert len(measured(folder)) == 4
    return measured(folder), seconds, int(child(again, line=-1)["lines"])


def test_fifty_kills_and_the_same_command_again_give_what_an_undisturbed_run_gives(child, calm, tmp_path):
    truth, seconds, lines = calm
    chance, kills, stale, folders = random.Random(0), 0, 0, 0
    while kills < 50:
        folder = tmp_path / str(folders)
        folders += 1
        while True:
            moment = {"seconds": chance.uniform(0, seconds)} if chance.random() < 0.5 else {"line": chance.randrange(1, lines)}
            moment = moment if kills else {"unfinished": True}
            answer = child(folder, **moment)
            if answer["status"] == 0:
                break
            assert answer["status"] == -signal.SIGKILL, answer["stderr"]
            kills += 1
        assert answer["stderr"] == ""
        parts = list(folder.glob(".rwalk-*.part"))
        stale += len(parts)
        for part in parts:  # as time would
            os.utime(part, (0, 0))
        files.sweep(folder)
        assert measured(folder) == truth
    assert stale > 0  # the first kill struck in the middle of a write


def test_a_kill_at_any_line_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path):
    code = """
import os, signal, sys
from rwalk._io import files
path, count = sys.argv[1], 0
def local(frame, event, _):
    global count
    count += event == "line"
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return local
sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename == files.__file__ else None)
files.write(path, b"new" * 10000)
"""
    path, seen = tmp_path / "f", []
    while not seen or seen[-1][0]:
        path.write_bytes(b"old")
        command = [sys.executable, "-c", code, path, str(len(seen) + 1)]
        status = subprocess.run(command, check=False).returncode
        assert status in (0, -signal.SIGKILL)
        seen.append((status, path.read_bytes()))
    contents = [content for _, content in seen]
    assert set(contents) == {b"old", b"new" * 10000}
    assert contents == sorted(contents, reverse=True)  # "old" until the rename, "new" ever after
    assert len(seen) > 10


@pytest.mark.parametrize("limit", [0, 100, 1500, 5000, 12000])
def test_a_disk_that_is_full(child, calm, tmp_path, limit):
    """Truth: the undisturbed run. The limit is on the size of each file, so some records may fit and checkpoints may not."""
    (tmp_path / "old.json").write_text("as it was")
    answer = child(tmp_path, limit=limit)
    records = list(tmp_path.glob("*-seed*.json"))
    assert answer["status"] == (0 if len(records) == 4 and (tmp_path / "report.html").exists() else 2), answer["stderr"]
    assert "` cannot be written (File too large)." in answer["stderr"]
    assert "Make room" in answer["stderr"]
    assert (tmp_path / "old.json").read_text() == "as it was"
    (tmp_path / "old.json").unlink()
    for file in tmp_path.iterdir():
        assert file.suffix in (".json", ".checkpoint")
        assert Record.load(file) if file.suffix == ".json" else states.load(file, "checkpoint")
    assert child(tmp_path)["status"] == 0
    assert measured(tmp_path) == calm[0]


def test_a_real_disk_that_is_full(child, calm, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        (disk / "filler").write_bytes(bytes(12000))
        answer = child(disk)
        assert answer["status"] == 2
        assert "(No space left on device)" in answer["stderr"]
        (disk / "filler").unlink()
        assert not list(disk.glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert child(disk)["status"] == 0
        assert measured(disk) == calm[0]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch, call):
    path = tmp_path / "f"
    files.write(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"^`.*f` cannot be written \(No space.*Make room") as caught:
        files.write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^`.*absent.f` cannot be written"):
        files.write(tmp_path / "absent" / "f", b"")
    with pytest.raises(IsADirectoryError, match="cannot be written: it is a folder"):
        files.write(tmp_path, b"")


def test_two_of_the_same_at_once(child, calm, tmp_path):
    for answer in child(tmp_path / "out", twins=True):
        assert (answer["status"], answer["stderr"]) == (0, "")
    assert measured(tmp_path / "out") == calm[0]


def test_what_killed_writers_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    for name in (".rwalk-1.part", ".rwalk-2.part", "other.part"):
        (tmp_path / name).touch()
        if "2" not in name:
            os.utime(tmp_path / name, (0, 0))
    files.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".rwalk-2.part", "other.part"}


class Stop(BaseException):
    pass


def interrupted(stream, method, checkpoint, after, training=SMALL, **options):
    """Run until so many steps are done."""
    left = [after]

    def tick():
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        bench.run(stream, method, training=training, checkpoint=checkpoint, tick=tick, **options)


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("method", [*BASELINES, "recipe", "example", "rwalk + replay", *sorted(rules())])
def test_every_learner_goes_on_after_its_last_task(tmp_path, method, optimizer):
    """Truth: the record of an undisturbed run. The run is stopped twice, in the second and in the fourth of five tasks."""
    training = Training(hidden=(6,), batch_size=50, optimizer=optimizer, lr=0.01)
    stream, place = bench.split("digits", tasks=5, scenario="class"), tmp_path / "c"
    options = {"replay": bench.Rehearsal(40, select="plane", batch=9)} if "replay" in method else {}
    method = method.removesuffix(" + replay")
    method = RWalk(fisher="example") if method == "example" else rules()[method]() if method in rules() else method
    steps = [-(-len(e.train) // 50) for e in stream]
    if method in ("joint", "cumulative"):
        steps = [-(-sum(len(e.train) for e in stream[: k + 1]) // 50) for k in range(5)]
    for tasks in (1, 3):
        interrupted(stream, method, place, sum(steps[:tasks]) + 2, training, **options)
        assert len(states.load(place, "checkpoint")["measured"]["scores"]) == tasks
    ticks = []
    record = bench.run(stream, method, training=training, checkpoint=place, tick=lambda: ticks.append(1), **options)
    assert len(ticks) == sum(steps)
    assert measurement(record) == measurement(bench.run(stream, method, training=training, **options))


def test_a_checkpoint_that_does_not_fit_is_named_and_the_run_starts_anew(tmp_path):
    stream, place = bench.split("digits", tasks=3), tmp_path / "c"
    truth = measurement(bench.run(stream, "finetune", training=SMALL))
    interrupted(stream, "finetune", place, 20)
    raw = place.read_bytes()
    others = {
        "damaged: its checksum is wrong": raw[:-1] + bytes([raw[-1] ^ 1]),
        "damaged": raw[: len(raw) // 2],
        "no checkpoint": b"",
    }
    for word, content in others.items():
        place.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"Checkpoint `.*c` cannot be used .*{word}.*starts from its beginning"):
            assert measurement(bench.run(stream, "finetune", training=SMALL, checkpoint=place)) == truth
    place.write_bytes(raw)
    with pytest.warns(UserWarning, match="of another run"):
        bench.run(stream, "finetune", seed=1, training=SMALL, checkpoint=place)
    spoilt = states.load(place, "checkpoint")
    place.write_bytes(raw)
    content = states.load(place, "checkpoint")
    assert spoilt["run"] != content["run"]
    del content["learner"]["generator"]  # after model and optimiser were taken over
    states.save(place, "checkpoint", content)
    with pytest.warns(UserWarning, match="generator"):
        assert measurement(bench.run(stream, "finetune", training=SMALL, checkpoint=place)) == truth


def test_another_number_of_threads_is_another_run(tmp_path):
    stream, place = bench.split("digits", tasks=2), tmp_path / "c"
    bench.run(stream, "finetune", training=SMALL, checkpoint=place)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="number of threads"):
            bench.run(stream, "finetune", training=SMALL, checkpoint=place)
    finally:
        torch.set_num_threads(1)


def test_learners_of_ones_own_go_on_if_they_can_tell_where_they_are(tmp_path):
    class Plain:
        def __init__(self):
            self.learned = []

        def fit(self, experience):
            self.learned.append(experience.task)

        def predict(self, x, seen):
            return torch.zeros(len(x), dtype=torch.int64)

    class Telling(Plain):
        def state_dict(self):
            return {"learned": self.learned}

        def resume(self, state, past):
            assert [e.task for e in past] == state["learned"]
            self.learned = state["learned"]

    stream = bench.split("digits", tasks=3)
    bench.run(stream, Plain(), checkpoint=tmp_path / "none")
    assert not any(tmp_path.iterdir())
    first, second = Telling(), Telling()
    bench.run(stream, lambda: first, checkpoint=tmp_path / "c")
    fitted, second.fit = [], lambda experience: fitted.append(experience.task)
    bench.run(stream, lambda: second, checkpoint=tmp_path / "c")
    assert (first.learned, second.learned, fitted) == ([0, 1, 2], [0, 1], [2])


@pytest.mark.parametrize("change", [
    lambda raw: raw.replace(b'"seed": 0', b'"seed": 1'), lambda raw: raw.replace(b'"scores": [', b'"scores": [[1.0],'),
    lambda raw: raw[:-5], lambda raw: raw + b"x", lambda raw: raw.replace(b'"threads": 1', b'"threads": NaN'),
])  # fmt: skip
def test_a_record_that_was_changed_is_refused(tmp_path, change):
    path = bench.run(bench.split("digits", tasks=2), training=SMALL).save(tmp_path)
    assert change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is no record of `rwalk run`: "):
        Record.load(path)


def test_a_checkpoint_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path, monkeypatch):
    """Truth: the run without checkpoints. The disk is full whenever a checkpoint of more than one task comes."""
    stream, place, save = bench.split("digits", tasks=4), tmp_path / "c", states.save

    def full(path, kind, content):
        if len(content["measured"]["scores"]) > 1:
            raise OSError(errno.ENOSPC, f"`{path}` cannot be written. Make room.")
        save(path, kind, content)

    monkeypatch.setattr(states, "save", full)
    with pytest.warns(UserWarning, match=r"`.*c` cannot be written.*The run continues without this checkpoint") as said:
        record = bench.run(stream, "finetune", training=SMALL, checkpoint=place)
    assert len(said) == 2  # after the second and the third task, and not after the last one
    assert {Path(one.filename).name for one in said} == {Path(__file__).name}
    assert measurement(record) == measurement(bench.run(stream, "finetune", training=SMALL))
    assert len(states.load(place, "checkpoint")["measured"]["scores"]) == 1


def test_a_run_of_one_task_has_no_checkpoint(tmp_path):
    bench.run(bench.split("digits", tasks=1), "finetune", training=SMALL, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "circle", "dangling link", "no folder"])
def test_a_place_that_no_checkpoint_can_have_is_told_before_training(tmp_path, kind):
    place, ticks = tmp_path / "c", []
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(place))
    elif kind == "no folder":
        place = tmp_path / "absent" / "c"
    else:
        place.symlink_to(place if kind == "circle" else tmp_path / "absent" / "c")
    with pytest.raises(OSError, match=r"^`.*c` cannot be written.*(Name a|name a folder)"):
        bench.run(bench.split("digits", tasks=2), training=SMALL, checkpoint=place, tick=lambda: ticks.append(1))
    assert not ticks
