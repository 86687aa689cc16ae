"""What `rwalk run` shows while it runs: in a terminal, in a pipe, and in terminals that can do little."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager, redirect_stdout, suppress
from threading import Thread

import pytest
from rich.console import Console

from rwalk import bench
from rwalk._io import files, states
from rwalk.bench.checkpoint import scores_so_far
from rwalk.bench.spec import RunSpec
from rwalk.cli.main import main
from rwalk.cli.progress import Display

SMALL = ["split-digits", "--methods", "finetune,rwalk", "--seeds", "1", "--tasks", "3", "--hidden", "8"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def terminal():
    """A terminal of 100 columns: its end for programs, and a list that gathers what they write."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    written = []

    def gather():
        with suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(ours, 65536):
                written.append(piece.decode())

    thread = Thread(target=gather)
    thread.start()
    try:
        yield theirs, written
    finally:
        os.close(theirs)
        thread.join()
        os.close(ours)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A function that does a command in this process, in a terminal, and returns all that is written there."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)

    def show(*words, **environment):
        for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80"} | environment).items():
            monkeypatch.setenv(name, value)
        with terminal() as (end, written), os.fdopen(os.dup(end), "w", buffering=1) as file, redirect_stdout(file):
            assert main(["run", *words, "--out", str(tmp_path)]) == 0
        return "".join(written)

    return show


def test_a_terminal_shows_bars_accuracies_and_time_left(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS")}
    with terminal() as (end, pieces):
        command = [sys.executable, "-m", "rwalk", "run", *SMALL, "--epochs", "3", "--out", str(tmp_path)]
        done = subprocess.run(command, stdin=end, stdout=end, stderr=end, env=environment | {"TERM": "xterm"}, check=False)
    written = "".join(pieces)
    assert done.returncode == 0, written
    assert "\x1b[?25l" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is back"
    text = CONTROL.sub("", written)
    assert "all runs" in text
    assert re.search(r"rwalk seed 0 +\S*━\S* +\d+%", text)
    assert re.search(r"rwalk seed 0 .* \d+\.\d% after [12] of 3", text)
    assert text.count("average accuracy") == 2


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "true"}])
def test_terminals_that_cannot_move_and_ci_get_plain_lines(shown, environment):
    written = shown(*SMALL, **environment)
    assert "━━" not in written
    assert not re.search(r"\x1b\[[0-9;?]*[A-LSTf-hn-s]", written), "no cursor is moved and nothing wiped"
    assert [line.split(":")[0] for line in written.splitlines()[:2]] == ["finetune seed 0", "rwalk seed 0"]


def test_no_color_leaves_bars_without_colours(shown):
    written = shown(*SMALL, NO_COLOR="1")
    assert "all runs" in written
    assert set(re.findall(r"\x1b\[([0-9;]*)m", written)) <= {"0", "1", "2", "1;2"}


def test_a_narrow_terminal_is_not_overrun(shown):
    written = shown(*SMALL, COLUMNS="34")
    frames = written[: written.rindex("\x1b[?25h")]
    lines = [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", frames)]
    assert max(len(line) for line in lines if "average accuracy" not in line) <= 34
    assert any(line.startswith("rwalk") and "%" in line for line in lines)


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
def test_a_pipe_gets_one_line_for_each_run_and_no_control_characters(tmp_path, capfd, monkeypatch, environment):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for name, value in ({"COLUMNS": "40"} | environment).items():
        monkeypatch.setenv(name, value)
    assert main(["run", *SMALL, "--out", str(tmp_path)]) == 0
    printed, error = capfd.readouterr()
    assert error == ""
    assert not re.search(r"\x1b\[[0-9;?]*[A-LSTf-hn-s]", printed)
    assert environment or "\x1b" not in printed
    for line, method in zip(printed.splitlines(), ("finetune", "rwalk"), strict=False):
        assert re.fullmatch(rf"{method} seed 0: average accuracy \d+\.\d\d% in \d+\.\d s", line)


def displayed(runs, folder, **options):
    """Return a display of runs and a function that returns what it shows now."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    display = Display(console, {run: f"run {run.seed}" for run in runs}, folder, live=True, **options)

    def frame():
        file = io.StringIO()
        Console(file=file, width=100, color_system=None).print(display.progress.get_renderable())
        return file.getvalue()

    return display, frame


def runs(count=2, **options):
    stream, training = bench.split("digits", tasks=4), bench.Training(batch_size=40, hidden=(4,))
    return [RunSpec(stream, seed=seed, training=training, **options) for seed in range(count)]


def test_a_run_that_continues_begins_where_it_was(tmp_path):
    """The learner ticks once for each step of an earlier attempt; each task's end brings the bar to the right place."""
    one, two = runs()
    display, frame = displayed([one, two], tmp_path)
    tick, track = display.hooks(one)
    assert re.search(r"run 0 .* 0%", frame())
    ends = [-(-len(e.train) // 40) for e in one.tasks]
    for _ in range(sum(ends[:2])):
        tick()
    track({"accuracy/task_1": 0.75, "accuracy/task_2": 0.5, "accuracy/task_3": 0.1}, 2)
    assert re.search(rf"run 0 .* {100 * sum(ends[:2]) / sum(ends):.0f}% 62\.5% after 2 of 4 tasks", frame())
    display.end(one)
    assert "run 0" not in frame()
    assert re.search(r"all runs .* 50%", frame())
    assert "run 1" not in frame()


def test_joint_training_takes_more_steps_at_each_task(tmp_path):
    (run,) = runs(1, method="joint")
    display, _ = displayed([run], tmp_path)
    ticks = []
    display.hooks(run)
    run.run(tick=lambda: ticks.append(1))
    assert display.bars[run].total == len(ticks)


def test_runs_of_workers_are_followed_by_their_locks_and_checkpoints(tmp_path):
    one, two = runs()
    looked = []
    display, frame = displayed([one, two], tmp_path, page=lambda: looked.append(1))
    place = tmp_path / one.name
    display.look()
    assert "run 0" not in frame()
    with files.file_lock(place.with_suffix(".lock")):
        display.look()
        assert re.search(r"run 0 .* 0%", frame())
        states.save(place.with_suffix(".checkpoint"), "checkpoint", {"measured": {"scores": [[0.25, None, None, None]]}})
        display.look()
        assert "25.0% after 1 of 4 tasks" in frame()
        rows = [[None] * 4] * 4 + [[0.5] * 5]
        states.save(place.with_suffix(".checkpoint"), "checkpoint", {"measured": {"scores": rows}})
        display.look()
        assert "25.0% after 1 of 4 tasks" in frame(), "a checkpoint of another run is left out"
    assert len(looked) == 4


@pytest.mark.parametrize("content", [
    b"", b"\0" * 4, b"\xff" * 100, b"\2" + b"\0" * 7 + b"{}", b"\x30" + b"\0" * 7 + b'{"__metadata__": {"content": "[]"}}',
    b"\x50" + b"\0" * 7 + b'{"__metadata__": {"content": "{\\"measured\\": {\\"scores\\": [[2]]}}"}}',
])  # fmt: skip
def test_checkpoints_that_are_none_have_no_rows(tmp_path, content):
    (tmp_path / "x.checkpoint").write_bytes(content)
    assert scores_so_far(tmp_path / "x.checkpoint") == []
