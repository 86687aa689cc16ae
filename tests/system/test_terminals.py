"""Odd names and poor terminals: text is text wherever it is shown, and what an encoding lacks loses no run and no report."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html import unescape
from itertools import pairwise

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from test_progress import CONTROL, terminal

from records import made
from rwalk import Consolidator, RWalk, report
from rwalk.bench.tuned import Tuned
from rwalk.cli.main import main
from rwalk.report import page
from rwalk.report import terminal as tables
from rwalk.report.markdown import markdown
from rwalk.report.names import clean
from rwalk.report.plain import complain, plain, tolerant

NAMES = [
    "[bold]", "[/b]", "[red]x[/red]", "[link=http://x]y[/link]", "a]b[c", "\\[x]", ":smile: :x:", "a|b", "`x` ``", "<b>&amp;",
    "*a* _b_ ~~c~~ #1 $x$", "- a", "1. b", "+", "===", "    c", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J",
    "a\nb\r\nc\td",
    "\u202eabc", "שלום", "名前", "🙂👩‍👩‍👧", "é±–×…", "\ud800", "", "{x} %s {0}", "x" * 300,
]  # fmt: skip
ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "cp932", "shift_jis", "gbk", "koi8-r", "cp037", "iso2022_jp", "utf-8",
             "utf-16"]  # fmt: skip
QUICK = ["split-digits", "--methods", "finetune,rwalk", "--seeds", "2", "--tasks", "2", "--hidden", "4", "--batch-size", "200"]


def odd(name):
    """Records with a name wherever there is room for one."""
    config = made().config | {"rule": {name: name, "n": [name]}, "pull": name, "replay": {"size": name, "select": name}}
    layers = [{"name": name, "share": 1.0, "drift": 0.1}]
    one = made(name, stream=f"split-{name}", config=config, diagnostics=[{"layers": layers}], versions={name: name})
    return [one, replace(one, method="rwalk"), replace(one, config=config | {"rule": {name: "other"}})]


def printed(show, **options):
    """What is printed to a terminal that takes markup, emoji and colours."""
    file = io.StringIO()
    show(Console(file=file, width=5000, force_terminal=True, color_system=None, **options))
    assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_text_in_every_table(name):
    records = odd(name)
    text = printed(lambda console: report.show(report.summarise(records), console))
    assert plain(f"split-{name}", 200) in text
    assert plain(f"{name}={name}", 200) in text
    text = printed(lambda console: tables.show_contrast(report.compare(records, odd(name + "2")), name, name, console))
    assert f"A: {plain(name, 200)}" in text
    trials = [{"strength": 0.5, "lr": 0.1, "accuracy": 0.5, "seeds": {"0": None}, "failures": []}]
    chosen = Tuned(name, name, 0.5, 0.1, 0.5, 2, trials, edge=[name])
    text = printed(lambda console: tables.show_tuned(chosen, f"rwalk run {name}", console))
    assert f"{plain(name, 200)} on {plain(name, 200)}, first 2 tasks" in text
    assert f"Run: rwalk run {plain(name, 1000)}" in text


@pytest.mark.parametrize("name", [name for name in NAMES if "." not in name and name], ids=ascii)
def test_names_of_modules_are_text_in_a_summary(name):
    model = torch.nn.Module()
    model.add_module(name, torch.nn.Linear(1, 1))
    memory = Consolidator(model, RWalk())
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    memory.consolidate()
    assert plain(name, 1000) in printed(lambda console: console.print(memory.summary()))
    assert plain(name, 1000) in str(memory.summary())


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_text_in_the_page_and_in_markdown(name):
    """Truth: what a parser of Markdown makes of it."""
    comparisons = report.summarise(odd(name))
    html = page.render(comparisons, [name])
    assert clean(f"split-{name}") in unescape(html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html.replace("\u00a0", ""))
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown(comparisons))
    assert {token.type for token in tokens} <= {
        f"{kind}_{end}"
        for end in ("open", "close")
        for kind in ("heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td", "bullet_list", "list_item")
    } | {"inline"}
    inline = [(before.type, words(token)) for before, token in pairwise(tokens) if token.type == "inline"]
    assert ("heading_open", clean(f"split-{name}").strip()) in inline
    columns = len([kind for kind, _ in inline if kind == "th_open"])
    assert len([kind for kind, _ in inline if kind == "td_open"]) == columns * len(comparisons[0].lines)


def words(token):
    """The text of a token of Markdown, in which nothing but bold figures and options may be more than text."""
    kinds = {child.type for child in token.children if not (child.type == "code_inline" and child.content.startswith("--"))}
    assert kinds <= {"text", "strong_open", "strong_close"}, token.content
    return "".join(child.content for child in token.children)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of quick runs."""
    folder = tmp_path_factory.mktemp("done")
    assert main(["run", *QUICK, "--out", str(folder)]) == 0
    return folder


def copied(done, folder):
    """Copy the records into another folder, where the same command finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in done.glob("*.json"):
        shutil.copy(path, folder)


@pytest.mark.parametrize("folder", ["[bold]x", "[/b]", "é±–中🙂", "a b;c'd\"", "\x1b[31m", ":smile:"])
def test_a_folder_of_any_name_gets_its_report(tmp_path, capsys, done, folder):
    out = tmp_path / folder
    copied(done, out)
    assert main(["run", *QUICK, "--seeds", "3", "--out", str(out)]) == 0
    assert f"Records: {plain(str(out), 1000)}\n" in (first := capsys.readouterr().out)
    assert main(["report", str(out)]) == 0
    assert f"Report: {plain(str(out / 'report.html'), 1000)}\n" in (second := capsys.readouterr().out)
    assert main(["compare", str(out), str(out)]) == 0
    assert f"A: {plain(str(out), 200)}\n" in (third := capsys.readouterr().out)
    assert "\x1b" not in first + second + third
    assert {p.suffix for p in out.iterdir()} == {".json", ".html", ".md"}


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", write_through=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gets_its_table_and_its_complaints(tmp_path, done, encoding):
    copied(done, tmp_path)
    next(tmp_path.glob("*.json")).unlink()  # one run is left to be done
    (tmp_path / "–±é中🙂.json").write_text("{")
    for words in (["run", *QUICK], ["report"]):
        out, err = stream(encoding), stream(encoding)
        with redirect_stdout(out), redirect_stderr(err):
            assert main([*words, "--out", str(tmp_path)] if words[0] == "run" else [*words, str(tmp_path)]) == 0
        text, complaint = (end.buffer.getvalue().decode(encoding) for end in (out, err))
        assert out.errors == err.errors == "strict"
        assert f"Report: {tmp_path}" in text
        mean, deviation = re.search(r"finetune.*?(\d+\.\d) (?:±|\+-) (\d+\.\d)", text).groups()
        assert 0 <= float(mean) <= 100
        assert words[0] == "run" or ".json`" in complaint
    if encoding == "ascii":
        assert f"{mean} +- {deviation}" in text
        assert "-+-???.json`" in complaint
        rows = [line for line in text.splitlines() if line.startswith(("|finetune", "|rwalk", "|method"))]
        assert len(rows) == 3
        assert len({len(line) for line in rows}) == 1, "columns lie below each other"
    if encoding == "cp437":
        assert f"{mean} ± {deviation}" in text
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_bars_in_every_encoding(tmp_path, encoding, monkeypatch):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CI", raising=False)
    with terminal() as (end, written), os.fdopen(os.dup(end), "w", 1, encoding) as file, redirect_stdout(file):
        assert main(["run", *QUICK, "--out", str(tmp_path)]) == 0
    lines = [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", "".join(written))]
    assert any("all runs" in line and ("-" if encoding != "utf-8" else "━") * 4 in line for line in lines)


LOCALES = [{"PYTHONIOENCODING": "ascii:strict"}, {"PYTHONIOENCODING": "cp932"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
           {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]  # fmt: skip
COMMANDS = r"""
import sys
from rwalk.cli.main import main
folder, odd = sys.argv[1], "\u2013\u00e9[/b]"
for words in (["report", folder], ["compare", folder, folder], ["report", "--help"], ["report", odd], [odd]):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code or 0
    assert status == (2 if words[-1] == odd else 0), words
"""


@pytest.mark.parametrize("environment", LOCALES, ids=str)
def test_locales_as_systems_set_them(tmp_path, environment):
    for record in odd("±–é中[/b]"):
        record.save(tmp_path)
    (tmp_path / "–.json").write_text("{")
    usual = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-c", COMMANDS, tmp_path]
    done = subprocess.run(command, capture_output=True, env=usual | environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Mean +- standard" in done.stdout or environment == {"PYTHONIOENCODING": "cp932"}
    assert (tmp_path / "report.html").exists()


def test_a_page_is_there_before_anything_is_printed(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(report, "show", stop)
    with pytest.raises(Stopped):
        main(["run", *QUICK, "--out", str(tmp_path)])
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "report.md").exists()
    (tmp_path / "report.html").unlink()
    with pytest.raises(Stopped):
        main(["report", str(tmp_path)])
    assert (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_keeps_no_table_back(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    for words in (["run", *QUICK, "--out", str(tmp_path)], ["report", str(tmp_path)]):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert re.search(r"finetune.*±", captured.out)
        assert captured.err.startswith("rwalk: `")
        assert "is a folder" in captured.err


def test_complaints_steer_no_terminal(capsys):
    complain("\x1b[2J\x9b1m[/b]\nsecond line\x07")
    assert capsys.readouterr().err == "rwalk: ?[2J?1m[/b]\nsecond line?\n"
    assert main(["report", "\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_streams_are_as_before_afterwards(capsys):
    for closed in (False, True):
        out = stream("ascii")
        with redirect_stdout(out), tolerant():
            print("±")
            written = out.buffer.getvalue()
            if closed:
                out.close()
        assert written == b"+-\n"
        assert closed or out.errors == "strict"


@pytest.mark.parametrize("size", ["0", "", "-5", "x", "²"])
def test_a_width_that_is_none_counts_as_unset(tmp_path, monkeypatch, capsys, size):
    made().save(tmp_path)
    monkeypatch.setattr(report, "write", lambda *_, **__: tmp_path / "report.html")
    monkeypatch.delenv("COLUMNS", raising=False)
    main(["report", str(tmp_path)])
    usual = capsys.readouterr().out
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, size)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == usual
    assert "Mean ±" in usual


def test_a_page_is_drawn_without_standard_input(tmp_path):
    made().save(tmp_path)
    command = [sys.executable, "-m", "rwalk", "report", str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<svg" in (tmp_path / "report.html").read_text()


class Failing(io.StringIO):
    """A stream that takes so many writes, and fails at each one after."""

    def __init__(self, writes, error):
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


ENDS = [
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "(No space"),
]


@pytest.mark.parametrize(("error", "status", "said"), ENDS, ids=["gone", "full"])
@pytest.mark.parametrize("writes", [0, 1, 6])
def test_what_nobody_reads_ends_no_run_and_keeps_no_page_back(tmp_path, capsys, done, writes, error, status, said):
    """Truth: the records of the same runs where all is printed. After the sixth write the table begins."""
    with redirect_stdout(Failing(writes, error)):
        assert main(["run", *QUICK, "--out", str(tmp_path / "a")]) == status
        assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "b.html")]) == status
    names = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "a", done)]
    assert names[0] == names[1]
    assert len(names[0]) == 4 + 2
    assert (tmp_path / "b.html").exists()
    assert capsys.readouterr().err.count(said) == 2 or not said


@pytest.mark.parametrize("end", [">/dev/full", "| true", ">&-"])
def test_no_word_of_python_follows_where_nobody_reads(tmp_path, end):
    made().save(tmp_path)
    command = f'"$1" -m rwalk report "$2" {end}'
    done = subprocess.run(["sh", "-c", command, "sh", sys.executable, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "full" in end else 0)  # of a pipeline the shell tells how its last command ends
    assert re.fullmatch(r"(rwalk: Standard output cannot be written .*device.*\n)?", done.stderr)
    assert bool(done.stderr) == ("full" in end)
    assert (tmp_path / "report.html").exists()
