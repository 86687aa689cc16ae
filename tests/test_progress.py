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
import time
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from threading import Thread

import pytest
from rich.console import Console

from rwalk import files, progress, states
from rwalk.bench.underway import measured, underway
from rwalk.cli import main
from rwalk.progress import Display, shortened

SMALL = ["split-digits", "--methods", "finetune,rwalk", "--seeds", "1", "--tasks", "3", "--hidden", "8"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def terminal():
    """A terminal of 80 columns: its end for programs, and a list that gathers what they write."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
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
    monkeypatch.setattr(progress, "SILENCE", 1e9)
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
    assert re.search(r"rwalk seed 0 +\S*━\S* +\d+ % \d:\d\d:\d\d left", text)
    assert re.search(r"rwalk seed 0 \d+, mean \d+\.\d %", text)
    assert re.search(r"rwalk seed 0 \d+ \d+, mean \d+\.\d %", text)
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
    assert any(re.match(r"rwalk seed 0 .*mean", line) for line in lines)


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
def test_a_pipe_gets_one_line_for_each_run_and_no_control_characters(tmp_path, capfd, monkeypatch, environment):
    monkeypatch.setattr(progress, "SILENCE", 1e9)
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


def test_a_log_says_now_and_then_how_far_a_long_run_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0)
    assert main(["run", *SMALL, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"finetune seed 0: task 1 of 3, \d+, mean \d+\.\d %", lines[0])
    assert re.fullmatch(r"finetune seed 0: task 2 of 3, \d+ \d+, mean \d+\.\d %", lines[1])
    assert re.fullmatch(r"rwalk seed 0: task 3 of 3, \d+ \d+ \d+, mean \d+\.\d %", lines[6])


def test_a_log_of_short_runs_has_no_lines_about_tasks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 1e9)
    assert main(["run", *SMALL, "--out", str(tmp_path)]) == 0
    assert ": task " not in capsys.readouterr().out


def test_a_run_that_goes_on_begins_where_it_was(tmp_path, monkeypatch):
    """The display of an attempt after two of four tasks: half the bar is there at once, and time left counts what is new."""
    file = io.StringIO()
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(Console(file=file, force_terminal=True, width=80, color_system=None), live=True)
    with ExitStack() as stack:
        stack.enter_context(display.expecting({"k": ("a run", [10, 10, 10, 10]), "l": ("another", [10])}))
        display.begin("k", [[0.9, None, None, None], [0.75, 0.5, None, None]])
        first = frame(display)
        assert re.search(r"a run .* 50 % -:--:-- left", first)
        assert "a run 75 50, mean 62.5 %" in first
        now[0] += 30
        for _ in range(5):
            display.tick("k")()
        now[0] += 1
        display.learned("k", [0.7, 0.4, 1.0])
        text = frame(display)
        assert re.search(r"a run .* 75 % 0:00:31 left", text)
        assert re.search(r"all runs .* 60 % 0:01:02 left", text)
        assert "a run 70 40 100, mean 70.0 %" in text
        display.end("k")
        assert "a run" not in frame(display)
        assert re.search(r"all runs .* 80 %", frame(display))


def frame(display):
    """What the display would show now."""
    file = io.StringIO()
    Console(file=file, width=80, color_system=None).print(display._bars.get_renderable())
    return file.getvalue()


def test_a_checkpoint_that_does_not_fit_starts_the_display_anew():
    display = Display(Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None), live=True)
    with display.expecting({"k": ("a run", [10, 10])}):
        display.begin("k", [[0.9, None], [0.75, 0.5]])
        for _ in range(10):
            display.tick("k")()
        display.learned("k", [0.5])
        assert re.search(r"a run .* 50 %", frame(display))
        display.learned("nothing", [0.5])
        display.learned("k", [0.5] * 9)
        display.end("nothing")


def test_runs_of_other_processes_are_followed_by_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOOK", 0.01)
    monkeypatch.setattr(progress, "SILENCE", 0)
    file, place = io.StringIO(), tmp_path / "x.checkpoint"
    display = Display(Console(file=file))
    with display.expecting({"x": ("a run", [1, 1])}), files.alone(tmp_path / "x.lock"), display.following({"x": place}):
        wait(lambda: display._runs["x"].bar is not None)
        states.save(place, "checkpoint", {"measured": {"accuracy": [[0.5, None]]}})
        wait(lambda: "task 1 of 2, 50, mean 50.0 %" in file.getvalue())
        states.save(place, "checkpoint", {"measured": {"accuracy": [[0.5, None], [0.25, 1.0]]}})
        wait(lambda: "task 2 of 2, 25 100, mean 62.5 %" in file.getvalue())


def wait(holds):
    late = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < late
        time.sleep(0.01)


def test_nothing_is_shown_on_a_quiet_console():
    file = io.StringIO()
    with Display(Console(file=file, quiet=True, force_terminal=True)) as display, display.expecting({0: ("a", [1])}):
        display.begin(0)
        display.learned(0, [0.5])
        display.say("a line")
    assert file.getvalue() == ""


@pytest.mark.parametrize(("row", "room", "text"), [
    ([0.912], 60, "91, mean 91.2 %"),
    ([0.9, None, 1.0], 60, "90 - 100, mean 95.0 %"),
    ([0.1] * 10, 30, "10 10 10 .. 10 10, mean 10.0 %"),
    ([0.1] * 100, 24, "10 10 .. 10, mean 10.0 %"),
    ([0.1] * 100, 3, "mean 10.0 %"),
    ([None], 60, "-"),
    ([], 60, ""),
])  # fmt: skip
def test_rows_of_many_tasks_are_shortened(row, room, text):
    assert shortened(row, room) == text
    assert len(text) <= max(room, 11)


def test_what_a_folder_says_of_runs_under_way(tmp_path):
    rows = [[0.9, 0.1, 0.2], [0.8, 0.9, 0.3]]
    states.save(tmp_path / "a-seed0-1.checkpoint", "checkpoint", {"measured": {"accuracy": rows}})
    assert measured(tmp_path / "a-seed0-1.checkpoint") == rows
    (run,) = underway(tmp_path)
    assert str(run) == "a-seed0-1: 2 of 3 tasks, stopped"
    with files.alone(tmp_path / "a-seed0-1.lock"), files.alone(tmp_path / "b.lock"):
        assert files.held(tmp_path / "b.lock")
        assert [str(run) for run in underway(tmp_path)] == ["a-seed0-1: 2 of 3 tasks", "b: first task"]
    (tmp_path / "b.lock").touch()  # of a process that was killed
    assert not files.held(tmp_path / "b.lock")
    (tmp_path / "a-seed0-1.json").touch()
    assert list(underway(tmp_path)) == []
    assert list(underway(tmp_path / "absent")) == []


@pytest.mark.parametrize("content", [
    b"", b"\0" * 4, b"\xff" * 100, b"\2" + b"\0" * 7 + b"{}", b"\x30" + b"\0" * 7 + b'{"__metadata__": {"content": "[]"}}',
    b"\x50" + b"\0" * 7 + b'{"__metadata__": {"content": "{\\"measured\\": {\\"accuracy\\": [[2]]}}"}}',
])  # fmt: skip
def test_checkpoints_that_are_none_say_nothing(tmp_path, content):
    (tmp_path / "x.checkpoint").write_bytes(content)
    assert measured(tmp_path / "x.checkpoint") == []
