"""What the command line and the packages say about themselves, and what they say about names and numbers that are wrong."""

import inspect
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib import import_module

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from records import made
from rwalk import Consolidator
from rwalk.bench import builtin, data, parquet
from rwalk.cli.checks import check
from rwalk.cli.main import main
from rwalk.cli.options import ABOUT, COMMANDS, parse
from stored import write

KINDS = {name: getattr(import_module(f"rwalk.cli.{module}"), kind) for name, (module, kind) in COMMANDS.items()}


def shown(capsys, *words):
    """What a call prints in a wide terminal, and its status."""
    try:
        status = main(list(words))
    except SystemExit as stop:
        status = stop.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def examples(text):
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  rwalk ")]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_ends_with_commands_that_are_understood(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    status, printed, _ = shown(capsys, *([name] if name else []), "--help")
    assert status == 0
    written = ABOUT if not name else inspect.getdoc(KINDS[name])
    assert len(examples(printed)) >= 2
    assert examples(printed) == examples(written)
    for words in examples(printed):
        command = parse(words)
        assert isinstance(command, KINDS[words[0]])
        if words[0] in ("run", "tune"):
            check(command)


GROUPS = {"run": "stream method training replay machine output rwalk ewc lwf default", "tune": "stream method training tuning"}


@pytest.mark.parametrize("name", GROUPS)
def test_every_option_belongs_to_a_group(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, printed, _ = shown(capsys, name, "--help")
    parts = re.split(r"^[ ╭─]*((?:[a-z0-9-]+ )?options|positional arguments)[ ─╮]*\n", printed, flags=re.M)
    boxes = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert re.findall("--[a-z]+", boxes["options"]) == ["--help"]
    for group in GROUPS[name].split():
        assert "--" in boxes[f"{group} options"]
    assert "--tasks" in boxes["stream options"]
    assert "--lr" in boxes["training options"]
    assert "--ewc.strength" in boxes["ewc options"]
    assert "None}" not in "".join(boxes[f"{group} options"] for group in ("stream", "method", "replay", "machine", "output"))


def test_a_word_alone_shows_the_help_and_a_wrong_one_suggests_a_command(capsys):
    assert shown(capsys)[:2] == shown(capsys, "--help")[:2]
    status, _, error = shown(capsys, "lst")
    assert (status, "`lst`. Did you mean `list`?" in error) == (2, True)
    status, _, error = shown(capsys, "xyz")
    assert (status, "Did you mean" in error) == (2, False)
    assert "run, tune" in error


def test_the_report_of_the_usual_folder_needs_no_name(tmp_path, monkeypatch, capsys):
    made().save(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    assert (tmp_path / "runs" / "report.html").exists()
    assert "rwalk" in capsys.readouterr().out


@pytest.fixture
def attempts(monkeypatch):
    """No network: the hosts that somebody looked up, and the waits between."""
    found = []

    def lookup(host, *_, **__):
        found.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def wait(seconds):
        found.append(f"waited {seconds}")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return found


def table(folder, splits=("train", "test"), **more):
    for split in splits:
        write(folder, f"{split}.parquet", {"x": [0.0, 1.0, 2.0], "label": [0, 1, 1], **more})


@pytest.mark.parametrize(("words", "meant"), [
    (["split-mnst"], "mnist"), (["split-flwers"], "flowers"), (["permuted-Flowers"], "flowers"), (["split-dgits"], "digits"),
    (["split-fashion-mnist"], "fashion_mnist"), (["splt-flowers"], "split-flowers"), (["rotate-digits"], "rotated-digits"),
    (["split-digits", "--methods", "rwlk"], "rwalk"), (["split-digits", "--methods", "online-ewk"], "online_ewc"),
    (["split-digits", "--model", "resnt"], "resnet"), (["split-digits", "--strenght", "3"], "--strength"),
    (["split-digits", "--ewc.sample", "3"], "--ewc.samples"), (["--taks", "3"], "--tasks"),
])  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_one_that_is_meant_and_nobody_is_asked(
    words, meant, attempts, tmp_path, monkeypatch, capsys
):
    table(tmp_path / "data" / "flowers")
    monkeypatch.setenv("RWALK_DATA", str(tmp_path / "data"))
    status, _, error = shown(capsys, "run", *words, "--out", str(tmp_path / "out"))
    assert status == 2
    assert f"Did you mean `{meant}`?" in error or re.search(rf"Perhaps you meant:\W+{meant} ", error)
    assert attempts == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["imdb", "mnist", "someone/flwers"])
def test_without_a_network_the_hub_is_asked_once_and_nobody_waits(name, attempts, tmp_path, monkeypatch):
    """`mnist` and names with an owner are the hub's own, however near others are."""
    table(tmp_path / "flowers")
    monkeypatch.setenv("RWALK_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=r"cannot be downloaded .*Name or service not known.*--data"):
        data.load(name)
    assert set(attempts) == {"huggingface.co"}
    assert len(attempts) <= 2, "the data set, and before the first request of a process a list of its own"
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_a_network_what_was_downloaded_before_is_used(attempts, tmp_path, monkeypatch):
    """A copy as `datasets` leaves it: made from files here, and moved to where those of the hub lie."""
    table(tmp_path / "files")
    cache = tmp_path / "cache"
    files = {split: str(tmp_path / "files" / f"{split}.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
    (copy,) = (cache / "parquet").glob("default-*/*/*/")
    shutil.copytree(copy, cache / "someone___flowers" / "default" / "0.0.0" / copy.name)
    for info in (cache / "someone___flowers").rglob("dataset_info.json"):
        info.write_text(info.read_text().replace('"dataset_name": "parquet"', '"dataset_name": "flowers"'))
    for arrow in (cache / "someone___flowers").rglob("parquet-*.arrow"):
        arrow.rename(arrow.with_name(arrow.name.replace("parquet", "flowers")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    attempts.clear()
    found = data.load("someone/flowers")
    assert found.train_y.tolist() == [0, 1, 1]
    assert set(attempts) == {"huggingface.co"}


def test_a_hub_that_answers_is_asked_for_the_data(tmp_path, monkeypatch):
    asked, real = [], datasets.load_dataset
    table(tmp_path / "files")

    def load(name):
        asked.append((name, datasets.config.HF_HUB_OFFLINE))
        return real(str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert parquet.download("imdb")["train"].column("label").to_pylist() == [0, 1, 1]
    assert asked == [("imdb", False)]


def test_list_shows_the_data_sets_of_a_folder_and_reads_none(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    table(root / "table")
    table(root / "domains", domain=["a", "b", "a"])
    table(root / "apart" / "a")
    table(root / "apart" / "b")
    write(root / "weather", "stream.parquet", {"t": [2, 1, 0], "x": [0.0, 1.0, 2.0], "label": [0, 1, 1]})
    texts = {"text": ["to be continued"] * 3, "domain": ["a", "b", "c"]}
    for split in ("train", "test"):
        write(root / "books", f"{split}.parquet", texts)
        write(root / "intents", f"{split}-0.parquet", texts | {"label": [0, 1, 2]})
        write(root / "lists", f"{split}.parquet", {"x": [[1.0], [2.0]], "label": [0, 1]})
    table(root / "half", ["train"])
    table(root / "broken", ["test"])
    (root / "broken" / "train.parquet").write_text("no parquet")
    (root / "empty").mkdir()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(pq, "read_table", None)
    assert main(["list", "--data", str(root)]) == 0
    printed = capsys.readouterr().out
    lines = dict(re.findall(r"^  (\S+)  (.*?) *$", printed, re.M))
    assert lines["table"] == "3 + 3 rows of a table: split, permuted"
    assert lines["domains"] == "3 + 3 rows of a table: split, permuted, domain"
    assert lines["apart"] == "6 + 6 rows of a table: domain --by folder"
    assert lines["weather"] == "3 rows of a table: split, permuted, drift"
    assert lines["books"] == "3 + 3 texts to continue: domain"
    assert lines["intents"] == "3 + 3 texts: split, domain"
    assert lines["lists"] == "2 + 2 rows of numbers: split, permuted"
    assert "it needs a parquet file of the test split" in lines["half"]
    assert "`train.parquet` is no parquet file" in lines["broken"]
    assert "empty" not in lines
    assert {"digits", "split", "mlp", "rwalk", "mnist,"} <= {*lines, *printed.split()}


SHARED = data.folder()


@pytest.mark.skipif(SHARED is None, reason="RWALK_DATA names no folder")
def test_the_streams_that_list_offers_can_be_made(capsys, monkeypatch):
    """Of every data set in RWALK_DATA that is quick to load, and the digits."""
    monkeypatch.setenv("COLUMNS", "200")
    main(["list"])
    lines = dict(re.findall(r"^  (\S+)  .*?: ([a-z, ]+?) *$", capsys.readouterr().out.partition("Models")[0], re.M))
    for name in {"digits", "clinc150", "lm_domains", "noaa_weather"} & lines.keys():
        for kind in lines[name].split(", "):
            assert builtin.make(kind, name if kind == "domain" else data.load(name), tasks=2)


HUGE = "99999999999999999999"
WRONG = {
    "--tasks": f"0 -1 {HUGE} nan", "--skip": f"-1 {HUGE} nan", "--seeds": f"0 -1 {HUGE} nan", "--first-seed": f"-1 {HUGE} nan",
    "--threads": f"0 -1 {HUGE} nan", "--workers": f"0 -1 {HUGE} nan", "--epochs": f"0 -1 {HUGE} nan",
    "--batch-size": f"0 -1 {HUGE} nan", "--lr": "-1 1e31 inf nan", "--hidden": f"0 -1 {HUGE} nan",
    "--limit": f"0 -1 {HUGE} nan", "--replay": f"0 -1 {HUGE} nan", "--replay-batch": f"0 -1 {HUGE} nan",
    "--strength": "-1 1e31 nan x 1,,2", "--ewc.strength": "-1 1e31 nan x", "--rwalk.alpha": f"-1 {HUGE} nan",
    "--rwalk.delta-t": "0 -1 nan",
    "--si.xi": "0 -1 1e31 nan", "--kronecker.share": f"-1 {HUGE} nan", "--kronecker.rank": "0 -1 nan",
    "--ewc.samples": "0 -1 nan",
    "tune --strength": "0 -1 1e31 nan tuned", "tune --learning-rates": "0 -1 nan x", "tune --tune-tasks": f"0 -1 {HUGE} nan",
    "tune --validation": f"0 1 -1 {HUGE} nan", "tune --refine": f"-1 {HUGE} nan", "tune --skip": "1",
}  # fmt: skip


@pytest.mark.parametrize("option", WRONG)
def test_a_number_that_makes_no_sense_is_refused_before_anything_is_loaded(option, tmp_path, monkeypatch, capsys):
    def loaded(*_):
        raise AssertionError("data were loaded")

    monkeypatch.setattr(data, "find", loaded)
    command, flag = option.split() if " " in option else ("run", option)
    methods = "rwalk,ewc,si,kronecker" if command == "run" else "rwalk"
    for value in WRONG[option].split():
        words = ["split-flowers", "--methods", methods, f"{flag}={value}", "--out", str(tmp_path / "out")]
        status, printed, error = shown(capsys, command, *words)
        assert (status, printed) == (2, ""), (option, value)
        assert error.startswith("rwalk: ") or f"Error parsing {flag}" in error, "whole numbers are the parser's to read"
        names = {"--replay": ("size", "replay"), "--replay-batch": ("batch",)}.get(flag, (flag.strip("-").rpartition(".")[2],))
        assert any(re.sub("[-_ ]", "", name).rstrip("s") in re.sub("[-_ ]", "", error) for name in names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "match"), [
    (["--methods", "finetune,joint", "--strength", "3"], "--strength is for rules"),
    (["--methods", "lwf", "--pull", "proximal"], "--pull is for rules"),
    (["--methods", "finetune", "--average", "tail"], "--average is for rules"),
    (["--methods", "rwalk", "--ewc.strength", "3"], "--ewc.strength is for `ewc`, which is not among --methods"),
    (["--methods", "rwalk", "--online-ewc.gamma", "0.5"], "--online-ewc.gamma is for `online_ewc`"),
    (["--methods", "rwalk", "--select", "herding"], "Add --replay for rules"),
    (["--methods", "finetune", "--replay", "50"], "No method keeps examples"),
    (["--strength", "tunde"], "pass numbers with commas between, or tuned"),
])  # fmt: skip
def test_options_that_no_method_uses_are_refused(words, match, tmp_path, capsys):
    status, _, error = shown(capsys, "run", "split-digits", *words, "--out", str(tmp_path / "out"))
    assert (status, match in error) == (2, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("one", [Consolidator(torch.nn.Linear(1, 1)), made()], ids=lambda one: type(one).__name__)
def test_completion_of_an_object_offers_what_is_described(one):
    offered = [name for name in dir(one) if not name.startswith("_")]
    described = inspect.getdoc(type(one))
    for name in offered:
        member = inspect.getattr_static(one, name)
        assert getattr(member, "__doc__", None) or re.search(rf"\b{name}\b", described), name


@pytest.mark.parametrize("words", ["rwalk.RWlk", "rwalk.bench.splt", "rwalk.bnch"])
def test_python_itself_suggests_the_name_that_is_meant(words):
    done = subprocess.run([sys.executable, "-c", f"import rwalk; {words}"], capture_output=True, text=True, check=False)
    meant = {"RWlk": "RWalk", "splt": "split", "bnch": "bench"}[words.rpartition(".")[2]]
    assert f"Did you mean: '{meant}'?" in done.stderr
