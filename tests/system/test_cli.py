"""The command line, run as users run it."""

import dataclasses
import functools
import importlib.metadata
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processes import running, wait
from records import made
from rwalk import kernels, report
from rwalk._io import files
from rwalk.bench import Record, parquet
from rwalk.bench import data as data_sets
from rwalk.bench.spec import RunSpec
from rwalk.cli.main import main
from rwalk.cli.progress import Display
from rwalk.cli.report import LivePage
from stored import write

QUICK = ["--seeds", "1", "--hidden", "8", "--batch-size", "100", "--tasks", "2"]


DIGITS = functools.cache(data_sets._digits)


def no_network(name):
    raise ConnectionError(f"no data set {name}")


def run(*arguments):
    return main(["run", *arguments])


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rwalk {importlib.metadata.version('rwalk')}\n"


def test_runs_write_records_and_print_a_table(tmp_path, capsys):
    out = str(tmp_path / "runs")
    assert (
        run("split-digits", "--methods", "finetune,rwalk,joint", *QUICK, "--seeds", "2", "--out", out, "--rwalk.alpha", "0.5")
        == 0
    )
    printed = capsys.readouterr().out
    assert "task-incremental, softmax mask: task" in " ".join(printed.split())
    assert printed.count("on disk") == 0
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*.json")]
    assert sorted((r["method"], r["seed"]) for r in records) == [(m, s) for m in ("finetune", "joint", "rwalk") for s in (0, 1)]
    assert all(len(r["scores"]) == 2 and r["stream"] == "split-digits" for r in records)
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


def test_replay_by_itself_and_beside_rules(tmp_path, capsys):
    """Replay keeps 200 examples if nothing is said; rules replay only if asked, and the report tells them apart."""
    out, methods = str(tmp_path), "finetune,rwalk,replay,agem,lwf,cumulative"
    assert run("split-digits", "--methods", methods, *QUICK, "--scenario", "class", "--out", out) == 0
    more = ["--replay", "60", "--select", "herding", "--per", "class", "--replay-batch", "7"]
    assert run("split-digits", "--methods", "rwalk,replay", *QUICK, "--scenario", "class", "--out", out, *more) == 0
    records = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    stored = sorted((r["method"], r["memory"]["stored_examples"], r["config"].get("replay", {}).get("select")) for r in records)
    assert stored == [
        ("agem", 200, "uniform"),
        ("cumulative", 1433, None),
        ("finetune", 0, None),
        ("lwf", 0, None),
        ("replay", 200, "uniform"),
        ("replay", 600, "herding"),
        ("rwalk", 0, None),
        ("rwalk+replay", 600, "herding"),
    ]
    assert all(r["config"]["replay"]["batch"] == 7 for r in records if r["memory"]["stored_examples"] == 600)
    capsys.readouterr()
    assert main(["report", out]) == 0
    printed = capsys.readouterr().out
    for word in ("replay=60", "herding", "replay=200", "total,", "uniform", "rwalk+replay", "cumulative", "agem", "lwf"):
        assert word in printed


def test_the_kernels_are_chosen_and_recorded(tmp_path, capsys):
    for backend in ("reference", "blocked"):
        assert run("split-digits", "--methods", "rwalk", *QUICK, "--kernels", backend, "--out", str(tmp_path / backend)) == 0
    one, two = (Record.load(next((tmp_path / backend).glob("*.json"))) for backend in ("reference", "blocked"))
    assert (one.versions["kernels"], two.versions["kernels"]) == ("reference", "blocked")
    assert one.scores == two.scores


def test_kernels_that_are_not_installed_are_named_and_the_status_is_two(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(kernels, "import_module", missing)
    assert run("split-digits", "--kernels", "numba", "--out", str(tmp_path / "out")) == 2
    assert "`numba`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scenario_mask_and_streams(tmp_path):
    assert run("split-digits", *QUICK, "--scenario", "class", "--mask", "all", "--out", str(tmp_path)) == 0
    assert run("permuted:digits", *QUICK, "--out", str(tmp_path)) == 0
    assert run("rotated-digits", *QUICK, "--out", str(tmp_path)) == 0
    records = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    assert {r["stream"] for r in records} == {"split-digits", "permuted-digits", "rotated-digits"}
    assert {r["config"]["training"]["mask"] for r in records} == {"all"}


def test_domains_and_stretches_of_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"x": [0.1 * i for i in range(40)], "label": [i % 2 for i in range(40)], "place": [i % 3 for i in range(40)]}
    for split in ("train", "test"):
        write(tmp_path / "d", f"{split}.parquet", rows)
    write(tmp_path / "weather", "stream.parquet", {"t": list(range(40)), **rows})
    assert run("domain-./d", "--by", "place", *QUICK, "--scenario", "class", "--out", "a") == 0
    assert run("drift-./weather", *QUICK, "--label", "place", "--out", "b") == 0
    for out, expected in (("a", ("domain-d", "class", 2)), ("b", ("drift-weather", "domain", 2))):
        for path in (tmp_path / out).glob("*.json"):
            record = json.loads(path.read_text())
            about = record["config"]["stream"]
            assert (record["stream"], about["scenario"], len(record["scores"])) == expected
            assert record["config"]["training"]["model"] == "mlp"


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "split",
        "permuted",
        "rotated",
        "domain",
        "drift",
        "digits",
        "mnist",
        "cnn",
        "lstm",
        "finetune",
        "joint",
        "agem",
        "lwf",
        "rwalk",
    ):
        assert word in printed


@pytest.mark.parametrize(("arguments", "word"), [
    (["run", "split-digits", "--methods", "rwalk,sorcery"], "method `sorcery`"),
    (["run", "digits"], "stream `digits`"),
    (["run", "split-digits", "--tasks", "11"], "11 tasks cannot share the 10 classes"),
    (["run", "split-mnist", "--data", "absent"], "absent`"),
    (["run", "split-./absent"], "does not exist"),
    (["run", "split-digits", "--strength", "-1"], "but is -1.0"),
    (["run", "split-digits", "--seeds", "0"], "--seeds 0"),
    (["run", "split-digits", "--threads", "0"], "--threads 0"),
    (["run", "split-digits", "--threads", "99999999999999999999"], "pass 1 to 1,024"),
    (["run", "split-digits", "--seeds", "99999999999999999999"], "pass 1 to 10,000"),
    (["run", "split-digits", "--first-seed", "99999999999999999999"], "--first-seed 99999999999999999999"),
    (["run", "split-digits", "--first-seed", "-1"], "--first-seed -1"),
    (["run", "permuted-digits", "--tasks", "99999999999999999999"], "1 to 10,000"),
    (["run", "split-digits", "--batch-size", "99999999999999999999"], "below 2^63"),
    (["run", "permuted-digits", "--scenario", "task"], "scenario `task`"),
    (["run", "split-digits", "--by", "domain"], "--by domain"),
    (["run", "domain-digits"], "column `domain`"),
    (["run", "split-digits", "--model", "gpt"], "model `gpt`"),
    (["run", "split-digits", "--replay", "0"], "size=0"),
    (["run", "split-digits", "--methods", "finetune,agem", "--replay", "9"], "9 examples in total are too few for 10 classes"),
    (["run", "permuted-digits", "--methods", "finetune,rwalk", "--replay", "50"], "too few for 100 classes"),
    (["run", "split-digits", "--replay-batch", "0"], "batch=0"),
    (["report", "absent"], "no records"),
])  # fmt: skip
def test_mistakes_are_named_and_the_status_is_two(arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert word in message
    assert message.startswith("rwalk: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("flag", "value", "ours"), [
    ("--rwalk.alpha", "2", "`alpha` of RWalk must be"), ("--ewc.samples", "0", "`samples` of EWC must be"),
    ("--si.xi", "-1", "`xi` of SI must be"), ("--epochs", "0", "Training(epochs=0)"),
])  # fmt: skip
def test_range_errors_are_in_our_own_words_alone(flag, value, ours, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "split-digits", "--methods", "finetune", flag, value]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"rwalk: {ours}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
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


FLAGS = [
    "--methods", "--seeds", "--first-seed", "--strength", "--pull", "--average", "--out", "--data", "--tasks",
    "--scenario", "--threads", "--epochs", "--batch-size", "--lr", "--optimizer", "--hidden", "--mask", "--rwalk.alpha",
    "--rwalk.eps", "--rwalk.delta-t", "--ewc.samples", "--si.xi", "--mas.decay", "--l2.toward", "--help", "-h",
    "--bogus", "--rwalk", "--", "--model", "--by", "--label", "--device",
    "--replay", "--per", "--select", "--replay-batch",
]  # fmt: skip
VALUES = [
    "0", "1", "2", "3", "-1", "0.5", "nan", "inf", "-inf", "1e400", "1e-400", "99999999999999999999999", "None", "x",
    "finetune", "joint", "rwalk", "recipe,ewc", ",", "rwalk,rwalk", "mean", "max", "first", "task", "class", "domain",
    "sgd", "adam", "gradient", "proximal", "tail", "none", "seen", "out", "../out", "true", "--seeds", "=", "{}", "é",
    "", " ", "\0", "\ud800", "mlp", "lstm", "a:b", ":", "math:sqrt", "domain", "folder",
    "replay,agem", "lwf", "herding", "cuda", "cuda:99999999999999999999", "cuda:-1", "cpu:3", "mps",
]  # fmt: skip
STREAMS = [
    "split-digits", "permuted-digits", "rotated-digits", "split:digits", "split-absent", "split-", "split-./absent",
    "digits", "domain-digits", "drift-digits",
]  # fmt: skip
value = st.sampled_from(VALUES) | st.text(st.characters(exclude_characters="/\\"), max_size=5) | st.integers().map(str)
flag = st.sampled_from(FLAGS)
option = (
    st.tuples(flag)
    | st.tuples(flag, value)
    | st.tuples(flag, value, value)
    | st.builds("{}={}".format, flag, value).map(lambda word: (word,))
)
options = st.lists(option, max_size=4).map(lambda found: [word for words in found for word in words])
sensible = st.builds(lambda stream, words: ["run", stream, *words], st.sampled_from(STREAMS), options)
senseless = st.lists(st.sampled_from(["run", "list", "report", "compare", "--version", *STREAMS, *FLAGS]) | value, max_size=6)


def stub(run, *_, **__):
    name, stream = run.method_name, run.tasks[0].stream["name"]
    return Record(name, stream, run.seed, [[0.5]], config=run.configuration, timings={"train_seconds": 1.0})


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(sensible | senseless)
def test_no_arguments_end_in_a_traceback(tmp_path, monkeypatch, arguments):
    """Everything but the training itself is real; a status other than 0 and 2, or any other exception, is a mistake of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RWALK_DATA", raising=False)
    monkeypatch.setattr(RunSpec, "run", stub)
    monkeypatch.setattr(parquet, "download", no_network)
    monkeypatch.setattr(data_sets, "_digits", DIGITS)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    assert status in (0, 2)


def test_an_output_that_is_a_file_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "f").touch()
    assert run("split-digits", *QUICK, "--out", str(tmp_path / "f")) == 2
    captured = capsys.readouterr()
    assert "is a file; name a folder" in captured.err
    assert "average accuracy" not in captured.out


def test_a_broken_record_is_named_and_the_rest_reported(tmp_path, capsys):
    run("split-digits", *QUICK, "--methods", "finetune", "--out", str(tmp_path))
    (tmp_path / "bad.json").write_text("{")
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "bad.json" in captured.err
    assert "finetune" in captured.out


def test_a_record_without_accuracies_is_on_disk_and_shown(tmp_path, capsys):
    run("split-digits", *QUICK, "--methods", "finetune", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*.json")
    record = Record.load(path)
    dataclasses.replace(record, scores=[[None] * 2] * 2, timings={"train_seconds": None}, bits=[[None]]).save(tmp_path)
    capsys.readouterr()
    assert run("split-digits", *QUICK, "--methods", "finetune", "--out", str(tmp_path)) == 0
    assert "finetune seed 0: average accuracy unknown (on disk)" in capsys.readouterr().out


def test_ctrl_c_and_the_same_command_again_give_what_an_undisturbed_run_gives(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["run", "permuted-digits", "--methods", "finetune,rwalk", "--seeds", "2", "--tasks", "3", "--hidden", "64"]
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    command = [sys.executable, "-m", "rwalk", *arguments, "--out", str(disturbed)]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait(lambda: disturbed.is_dir() and any(disturbed.glob("*.json")))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "The same command continues" in error
    finished = {p.name for p in disturbed.glob("*.json")}
    assert 1 <= len(finished) < 4
    for out in (disturbed, calm):
        assert main([*arguments, "--out", str(out)]) == 0
        assert capsys.readouterr().out.count("on disk") == (len(finished) if out is disturbed else 0)
    names = {p.name for p in calm.glob("*.json")}
    assert names == {p.name for p in disturbed.glob("*.json")}
    assert len(names) == 4
    for name in names:
        a, b = (json.loads((folder / name).read_text()) for folder in (calm, disturbed))
        assert a["scores"] == b["scores"]


def test_a_log_without_its_package_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run("split-digits", *QUICK, "--log", "tensorboard", "--out", str(tmp_path / "runs")) == 2
    message = capsys.readouterr().err
    assert message.startswith("rwalk: A log for TensorBoard needs its package")
    assert "Run: pip install 'rwalk[tensorboard]'" in message
    assert not any(tmp_path.iterdir())


ALONE = """
import sys
from rwalk.cli.main import main
for words in (["--version"], ["report", "--help"], ["compare", ".", "."], ["report", "."]):
    print("$", *words)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    if status or "torch" in sys.modules:
        sys.exit(f"{words}: status {status}, torch was loaded: {'torch' in sys.modules}")
"""


def test_commands_about_records_load_no_torch(tmp_path):
    for seed in range(3):
        made(seed=seed).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.split(r"^\$ .*\n", done.stdout, flags=re.M)[1:]
    for word, text in zip(("rwalk", "--out", "seed", "permuted-x"), shown, strict=True):
        assert word in text


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for word in ("run", "tune", "list", "report", "compare"):
        assert re.search(rf"[│•] +{word} ", printed), printed
        with pytest.raises(SystemExit):
            main([word, "--help"])
        assert f"rwalk {word}" in capsys.readouterr().out


def test_the_page_is_written_anew_after_records_and_reloads_until_the_last_run_is_done(tmp_path, monkeypatch):
    pages = []
    write = report.write

    def watched(folder, *arguments, **options):
        place = write(folder, *arguments, **options)
        pages.append((len(list(tmp_path.glob("*.json"))), 'http-equiv="refresh" content="5"' in place.read_text()))
        return place

    monkeypatch.setattr(report, "write", watched)
    monkeypatch.setattr(LivePage, "due", property(lambda _: 0.0, lambda *_: None), raising=False)
    assert run("split-digits", *QUICK, "--methods", "finetune,rwalk", "--out", str(tmp_path)) == 0
    assert pages == [(1, True), (2, True), (2, False)]


def test_the_page_takes_a_fifth_of_the_time_at_most(tmp_path, monkeypatch):
    now, written = [100.0], []

    def write(folder, refresh=None):
        written.append((now[0], refresh))
        now[0] += 2

    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    page = LivePage(tmp_path)
    page.changed()
    for _ in range(9):
        now[0] += 1
        page.changed()
    page.look()
    page.close()
    assert written == [(100.0, 5), (110.0, 5), (113.0, None)]


def test_an_interrupted_command_leaves_a_page_that_reloads_no_more(tmp_path, monkeypatch):
    ended = []

    def interrupted(self, spec):
        ended.append(spec)
        if len(ended) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "end", interrupted)
    assert run("split-digits", *QUICK, "--methods", "finetune,rwalk", "--out", str(tmp_path)) == 130
    assert "http-equiv" not in (tmp_path / "report.html").read_text().replace('http-equiv="Content-Security', "")


def test_a_record_holds_its_command(tmp_path):
    words = ["run", "split-digits", *QUICK, "--methods", "finetune", "--out", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.glob("*.json")
    assert shlex.split(Record.load(path).command) == ["rwalk", *words]
    content = json.loads(path.read_text())
    files.seal(path, {key: value for key, value in content.items() if key not in ("command", "sha256")})
    assert Record.load(path).command == "", "records of earlier versions have none"
