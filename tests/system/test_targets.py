"""Regression from the command line: a column of numbers is the target, and everything that follows speaks of R²."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from rwalk import bench, report
from rwalk.bench import Record, Training
from rwalk.bench.builtin import make
from rwalk.bench.data import load
from rwalk.cli import main
from rwalk.report import reproduce
from stored import write

QUICK = ["--hidden", "8", "--batch-size", "20", "--epochs", "3"]


@pytest.fixture
def plant(tmp_path):
    """A machine's yield in the order of time, which depends on two readings in a way that drifts."""
    rng = np.random.default_rng(0)
    heat, speed = rng.normal(size=(2, 400))
    amount = 1e6 + 50 * (heat * np.linspace(1, -1, 400) + speed) + rng.normal(size=400)
    columns = {"t": list(range(400)), "heat": heat, "speed": speed, "amount": amount, "grade": ["low", "high"] * 200}
    write(tmp_path / "plant", "stream.parquet", {name: list(column) for name, column in columns.items()})
    return tmp_path / "plant"


def run(*words):
    return main.main(["run", *map(str, words)])


def test_a_target_is_learned_compared_and_tuned(plant, tmp_path, capsys):
    out, words = tmp_path / "out", [f"drift-{plant}", "--target", "amount", "--tasks", "3", *QUICK]
    assert run(*words, "--methods", "finetune,joint,default", "--seeds", "2", "--out", out) == 0
    told = capsys.readouterr().out
    assert "average R² 0." in told or "average R² -0." in told
    assert "accuracy" not in told
    records = [Record.load(place) for place in out.glob("*.json")]
    assert {(r.metric, r.config["stream"]["target"]) for r in records} == {("R²", "amount")}
    assert all(r.scores[0][0] > 0.5 for r in records)
    (comparison,) = report.summarise(records)
    assert comparison.facts()["target"] == "amount"
    assert "softmax mask" not in comparison.facts()
    assert (
        main.main(["tune", *words, "--method", "recipe", "--strength", "0.1,10", "--tune-tasks", "2", "--out", str(out)]) == 0
    )
    told = capsys.readouterr().out
    assert "R² on training examples that were held out" in told
    assert run(*words, "--methods", "recipe", "--strength", "tuned", "--seeds", "1", "--out", out) == 0


def test_a_limit_is_in_the_record_and_in_the_command_that_repeats_it(plant, tmp_path):
    words = [f"drift-{plant}", "--target", "amount", "--limit", "30", "--tasks", "2", *QUICK, "--seeds", "1"]
    assert run(*words, "--methods", "finetune", "--out", tmp_path / "out") == 0
    (record,) = (Record.load(place) for place in (tmp_path / "out").glob("*.json"))
    assert record.config["stream"]["limit"] == 30
    (comparison,) = report.summarise([replace(record, command="")])
    (line,) = reproduce.commands(comparison).lines
    assert shlex.join(["--target", "amount", "--limit", "30"]) in line
    assert main.main([*shlex.split(line)[1:], "--data", str(plant), "--out", str(tmp_path / "again")]) == 0
    (again,) = (Record.load(place) for place in (tmp_path / "again").glob("*.json"))
    assert (again.scores, again.name) == (record.scores, record.name)


def test_streams_that_no_command_makes_are_said_to_be_made_in_python():
    for stream in (bench.split("digits", order=3), bench.blurry(bench.permuted("digits", tasks=2), 0.2)):
        (comparison,) = report.summarise([bench.run(stream, training=Training(hidden=(4,), batch_size=200))])
        assert reproduce.commands(comparison).lines == []
        assert "its stream was made in Python" in reproduce.commands(comparison).notes[0]
    assert comparison.facts()["blurry"] == "0.2, seed 0"


def test_workers_learn_targets_of_ones_own():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(40, 3)) for _ in range(3)]
    stream = bench.stream([(part, part[:, 0] * 1e5 + k) for k, part in enumerate(x)], test=0.25, names=["a", "b", "c"])
    options = {"training": Training(hidden=(8,)), "tasks": 2}
    one, two = (bench.tune(stream, "recipe", [0.1, 10], workers=workers, **options) for workers in (1, 2))
    pairs = zip(one.trials, two.trials, strict=True)
    assert all(a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-6) for a, b in pairs)
    assert bench.run(stream, training=options["training"]).tasks == ["a", "b", "c"]


def test_whole_numbers_and_truth_values_may_be_targets_and_labels_become_inputs(plant):
    data = load(str(plant), target="t")
    (first, _) = make("drift", data, tasks=2)
    assert data.classes == ()
    assert data.train_x.shape[1] == 5  # heat, speed, amount and two grades; `t` is the target here and gives no order
    rows = [row for row in range(400) if row % 5 != 4]
    np.testing.assert_array_equal(data.train_y.squeeze(1).numpy(), rows)
    y = first.train.read()[1]
    assert abs(float(y.mean())) < 1e-6
    domains = make("domain", load(str(plant), target="amount", by="grade"), by="grade")
    assert [e.stream["domains"] for e in domains] == [["high", "low"]] * 2


@pytest.mark.parametrize(("words", "told"), [
    (["--target", "amounts"], "the column `amounts`"),
    (["--target", "grade"], "a target has to be a number"),
    (["--target", "amount", "--label", "grade"], "choose one of them"),
    (["--target", "amount", "--mask", "seen"], "no labels for a mask `seen`"),
    (["--target", "amount", "--select", "herding", "--methods", "replay"], 'select="herding"'),
    (["--target", "amount", "--limit", "0"], "--limit 0 is out of range"),
])  # fmt: skip
def test_what_is_refused(plant, tmp_path, capsys, words, told):
    assert run(f"drift-{plant}", "--tasks", "2", *QUICK, "--out", tmp_path / "out", *words) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_target_is_no_class_and_may_not_be_missing(plant, capsys, tmp_path):
    assert run(f"split-{plant}", "--target", "amount", "--out", tmp_path / "out") == 2
    assert "and no classes" in " ".join(capsys.readouterr().err.split())
    for value, told in ((None, "missing or infinite values"), (float("inf"), "missing or infinite values")):
        write(tmp_path / "bad", "stream.parquet", {"a": [1.0, 2.0] * 5, "b": [0.5] * 7 + [value] + [0.5] * 2})
        with pytest.raises(ValueError, match=told + r".*row 7 of stream\.parquet"):
            load(str(tmp_path / "bad"), target="b")


def test_records_of_r_squared_are_plain_json(plant, tmp_path):
    record = bench.run(make("drift", load(str(plant), target="amount"), tasks=2), training=Training(hidden=(8,)))
    content = json.loads(record.save(tmp_path).read_text(encoding="utf-8"))
    assert (content["metric"], content["higher"]) == ("R²", True)
