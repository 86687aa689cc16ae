"""`rwalk watch`: what it says as a folder changes, and that it writes the page anew, survives what is broken, and ends well."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwalk import files, reading, report, states
from rwalk.bench.record import Record
from rwalk.cli import main
from rwalk.report import watch


def record(seed=0, method="rwalk"):
    setting = {"stream": {"name": "permuted-x", "tasks": 2, "seed": seed}, "training": {"epochs": 1}}
    return Record(method, "permuted-x", seed, [[0.9, 0.1], [0.8, 0.7]], config=setting)


def test_news_come_at_first_and_after_each_change(tmp_path):
    folder = tmp_path / "runs"
    news = watch.news(folder, 0.01)
    assert str(next(news)) == "no record yet"
    path = record().save(folder)
    found = next(news)
    assert (str(found), found.changed) == ("1 record", True)
    states.save(folder / "x.checkpoint", "checkpoint", {"measured": {"accuracy": [[0.9, 0.1]]}})
    with files.alone(folder / "x.lock"):
        found = next(news)
        assert (str(found), found.changed) == ("1 record, under way: x: 1 of 2 tasks", False)
    assert str(next(news)) == "1 record, under way: x: 1 of 2 tasks, stopped"
    path.write_text(path.read_text()[:50])
    found = next(news)
    assert (found.records, len(found.broken), found.changed) == (0, 1, True)
    record().save(folder)
    record(1).save(folder / "deeper")
    while (found := next(news)).records < 2:
        pass
    assert (found.broken, found.changed) == ((), True)
    for name in path, folder / "x.checkpoint":
        name.unlink()
    while (found := next(news)).records > 1 or found.begun:
        pass
    assert str(found) == "1 record"


def test_of_many_runs_under_way_some_are_named(tmp_path):
    for i in range(5):
        rows = [[0.5, None]]
        states.save(tmp_path / f"run{i}.checkpoint", "checkpoint", {"measured": {"accuracy": rows}})
    found = next(watch.news(tmp_path, 1))
    assert str(found).startswith("no record yet, under way: run0: 1 of 2 tasks, stopped; run1: ")
    assert str(found).endswith("run2: 1 of 2 tasks, stopped and 2 more")


def test_between_two_looks_it_sleeps(tmp_path, monkeypatch):
    """Ten looks at nothing new take ten times the pause."""
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 10:
            record().save(tmp_path)

    monkeypatch.setattr(time, "sleep", sleep)
    news = watch.news(tmp_path, 5.0)
    next(news)
    assert str(next(news)) == "1 record"
    assert pauses == [5.0] * 10


def interrupted(monkeypatch, folder, *actions):
    """Have `rwalk watch` look at a folder after each action, and Ctrl-C after the last one."""
    left = list(actions)

    def sleep(_):
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    return main(["watch", str(folder), "--every", "7"])


def test_the_page_is_written_at_each_change_and_reloads_itself_until_the_end(tmp_path, monkeypatch, capsys):
    page, seen = tmp_path / "runs" / "report.html", []
    refresh = re.compile('<meta http-equiv="refresh" content="7">')

    def look():
        seen.append(len(refresh.findall(page.read_text())))

    broken = tmp_path / "runs" / "half.json"
    steps = [
        lambda: record().save(tmp_path / "runs"),
        look,
        lambda: broken.write_text('{"method": "\x1b[31m'),
        look,
        lambda: [record(1).save(tmp_path / "runs"), broken.unlink()],
        look,
    ]
    assert interrupted(monkeypatch, tmp_path / "runs", *steps) == 0
    assert seen == [1, 1, 1]
    assert not refresh.search(page.read_text()), "a page that nobody writes any more need not reload"
    assert "permuted-x" in page.read_text()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Watching {tmp_path / 'runs'}. Ctrl-C ends it."
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines[1:]] == [
        "no record yet",
        f"1 record; wrote {page}",
        f"1 record, 1 unreadable; wrote {page}",
        f"2 records; wrote {page}",
        f"No longer watching. Report: {page}",
    ]


def test_ctrl_c_as_the_first_page_is_announced_leaves_one_that_does_not_reload(tmp_path, monkeypatch, capsys):
    say = reading.say

    def interrupting(console, text):
        say(console, text)
        if "; wrote" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(reading, "say", interrupting)
    record().save(tmp_path)
    assert main(["watch", str(tmp_path)]) == 0
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out.endswith(f"No longer watching. Report: {tmp_path / 'report.html'}\n")


def test_what_cannot_be_written_is_said_and_tried_again(tmp_path, monkeypatch, capsys):
    write, calls = report.write, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("Got no room. Expected some. Make some.")
        return write(*arguments)

    monkeypatch.setattr(report, "write", failing)
    record().save(tmp_path)
    assert interrupted(monkeypatch, tmp_path, lambda: record(1).save(tmp_path)) == 0
    printed, error = capsys.readouterr()
    assert error == "rwalk: Got no room. Expected some. Make some.\n"
    assert "1 record\n" in printed
    assert "2 records; wrote" in printed


def test_the_browser_is_opened_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    record().save(tmp_path)
    sleeps = iter([lambda: record(1).save(tmp_path)])

    def sleep(_):
        action = next(sleeps, None)
        if action is None:
            raise KeyboardInterrupt
        action()

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["watch", str(tmp_path), "--open", "--out", str(tmp_path / "other.html")]) == 0
    assert opened == [(tmp_path / "other.html").as_uri()]
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "1e9"])
def test_pauses_that_are_none_are_refused(tmp_path, capsys, every):
    assert main(["watch", str(tmp_path), f"--every={every}"]) == 2
    assert "Expected 0.1 to 86400 seconds" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path, capsys):
    path = record().save(tmp_path)
    assert main(["watch", str(path)]) == 2
    assert "which is a file. Expected a folder" in capsys.readouterr().err


WATCHING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
from rwalk.cli import main
status = main(sys.argv[1:])
sys.exit("torch was loaded" if "torch" in sys.modules else status)
"""


def test_ctrl_c_ends_it_and_torch_is_not_loaded(tmp_path):
    words = [sys.executable, "-c", WATCHING, "watch", str(tmp_path / "runs"), "--every", "0.1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("Watching")
    assert process.stdout.readline().endswith("no record yet\n")
    record().save(tmp_path / "runs")
    assert "1 record; wrote" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert printed.splitlines()[-1].startswith("No longer watching. Report: ")  # at whatever moment it came


@pytest.mark.parametrize("words", [["report", "."], ["compare", ".", "."], ["compare", "--help"], ["watch", "--help"]])
def test_commands_about_records_load_no_torch(tmp_path, words):
    for seed in range(3):
        record(seed).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", WATCHING, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"report": "permuted-x", "compare": "seed", "watch": "--every"}[words[0]] in done.stdout


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for word in ("run", "tune", "list", "report", "watch", "compare", "plan"):
        assert re.search(rf"[│•] +{word} ", printed), printed


def test_records_of_several_sizes_are_read_again(tmp_path):
    """A file that is replaced within the same tick of the clock by one of another size is noticed."""
    news = watch.news(tmp_path, 0.01)
    path = record().save(tmp_path)
    next(news)
    stamp = path.stat().st_mtime_ns
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    os.utime(path, ns=(stamp, stamp))
    assert next(news).changed


def test_files_that_vanish_or_may_not_be_read_stop_nothing(tmp_path, monkeypatch):
    news = watch.news(tmp_path, 0.01)
    next(news)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    record().save(tmp_path)
    found = next(news)
    assert (found.records, len(found.broken)) == (1, 1)
    assert report.write(tmp_path).exists()
    monkeypatch.setattr(watch, "read", lambda folder: report.read(folder / "absent"))  # all are gone since the look
    record(1).save(tmp_path)
    assert str(next(news)) == "no record yet"


@pytest.mark.parametrize("suffix", [".json", ".tuned", ".checkpoint", ".lock"])
def test_a_circle_of_links_is_named_once_and_does_not_end_the_watch(tmp_path, monkeypatch, capsys, suffix):
    record().save(tmp_path)
    circle = tmp_path / f"x{suffix}"
    circle.symlink_to(circle)
    assert interrupted(monkeypatch, tmp_path, lambda: record(1).save(tmp_path), lambda: None) == 0
    captured = capsys.readouterr()
    assert "2 records" in captured.out
    assert "Report: " in captured.out
    named = f"rwalk: Got `{circle}`, which cannot be read (Too many levels of symbolic links). Expected a file that can be."
    assert captured.err.count(circle.name) == captured.err.count(named) == (suffix in (".json", ".tuned"))


def test_what_may_not_be_looked_at_does_not_end_the_watch(tmp_path, monkeypatch):
    place, stat = record().save(tmp_path), Path.stat

    def refused(path, **options):
        if path == place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    assert watch.stamps(tmp_path) == {place: (0, 0)}
