"""Variations of streams: another order of classes, fewer examples and blurry boundaries, against counts by hand."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from rwalk import RWalk, bench, report
from rwalk.bench import Training
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.holdout import early, later
from rwalk.cli.main import main
from rwalk.report import reproduce

SMALL = Training(hidden=(16,), batch_size=50)


def keys(part):
    """Each example of a task as bytes, sorted."""
    x, y = part.read()
    return sorted(row.numpy().tobytes() + bytes([label]) for row, label in zip(x, y.tolist(), strict=True))


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
def test_classes_come_in_the_order_that_is_asked_for(scenario):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    stream, data = bench.split("digits", tasks=5, scenario=scenario, order=order), load("digits")
    for e, pair in zip(stream, zip(order[::2], order[1::2], strict=True), strict=True):
        rows = np.isin(data.test_y.numpy(), pair)
        x, y = e.test.read()
        assert torch.equal(x, data.test_x[rows])
        true = data.test_y[rows].tolist()
        assert y.tolist() == ([pair.index(label) for label in true] if scenario == "domain" else true)
        assert e.classes == ((0, 1) if scenario == "domain" else tuple(sorted(pair)))
    assert stream[0].stream["order"] == order


def test_a_seed_draws_an_order_which_the_record_has():
    first, again, other = (bench.split("digits", order=seed) for seed in (1, 1, 2))
    order = first[0].stream["order"]
    assert sorted(order) == list(range(10))
    assert order == again[0].stream["order"] != other[0].stream["order"]
    assert [e.classes for e in first] == [tuple(sorted(order[2 * k : 2 * k + 2])) for k in range(5)]


def test_streams_without_variations_are_named_as_before():
    assert bench.split("digits")[0].stream == {
        "name": "split-digits", "tasks": 5, "scenario": "task", "rows": [1433, 364], "data": load("digits").digest()
    }  # fmt: skip
    names = [bench.run(stream, training=SMALL).name for stream in (
        bench.split("digits"), bench.split("digits", order=range(10)), bench.limit(bench.split("digits"), 50),
        bench.limit(bench.split("digits"), 60),
    )]  # fmt: skip
    assert len(set(names)) == 4


@pytest.mark.parametrize("make", [
    lambda: bench.split("digits", tasks=2), lambda: bench.permuted("digits", tasks=2), lambda: bench.drift("digits", tasks=3),
    lambda: bench.blurry(bench.split("digits", tasks=2, scenario="domain"), 0.3),
])  # fmt: skip
def test_a_limit_keeps_some_examples_of_every_label(make):
    stream = make()
    for whole, few in zip(stream, bench.limit(stream, 40), strict=True):
        for a, b in ((whole.train, few.train), (whole.test, few.test)):
            assert len(b) == min(40, len(a))
            assert set(keys(b)) <= set(keys(a))
        assert set(few.train.labels().tolist()) == set(whole.train.labels().tolist())
        assert few.classes == whole.classes
    assert [keys(e.train) for e in bench.limit(stream, 40)] == [keys(e.train) for e in bench.limit(stream, 40)]
    assert bench.limit(stream, 40)[0].stream == stream[0].stream | {"limit": 40}


def test_a_rare_label_survives_a_limit_and_shares_stay_as_they_are():
    y = torch.zeros(1000, dtype=torch.long)
    y[:200], y[700] = 1, 2
    x = torch.arange(1000.0)[:, None]
    (task,) = bench.limit(bench.domain(DataSet("d", x, y, x, y, tuple("abc"), 0, y * 0, y * 0, ("a",))), 100)
    counts = task.train.labels().bincount().tolist()
    assert counts[2] == 1
    assert 10 < counts[1] < 35


@pytest.mark.parametrize("make", [
    lambda: bench.split("digits", scenario="class"), lambda: bench.split("digits", scenario="domain"),
    lambda: bench.permuted("digits", tasks=3), lambda: bench.drift("digits", tasks=2),
])  # fmt: skip
def test_neighbours_exchange_their_share_and_nothing_is_lost(make):
    stream = make()
    mixed = bench.blurry(stream, 0.3)
    assert sorted(chain(*(keys(e.train) for e in mixed))) == sorted(chain(*(keys(e.train) for e in stream)))
    owned = [set(keys(e.train)) for e in stream]
    for k, (e, old) in enumerate(zip(mixed, stream, strict=True)):
        assert len(e.train) == len(old.train)
        assert keys(e.test) == keys(old.test)
        came = [len(set(keys(e.train)) & other) for other in owned]
        for j, count in enumerate(came):
            crosses = int(0.15 * min(len(old.train), len(stream[j].train))) if abs(j - k) == 1 else 0
            assert count == (crosses if j != k else len(old.train) - sum(c for i, c in enumerate(came) if i != k))
        assert set(e.classes) >= set(e.train.labels().tolist()) | set(old.classes)


def test_blurry_streams_depend_on_their_seed_alone_and_records_tell():
    stream = bench.split("digits", scenario="class")
    first, again, other = (bench.blurry(stream, 0.3, seed=seed) for seed in (1, 1, 2))
    assert [keys(e.train) for e in first] == [keys(e.train) for e in again] != [keys(e.train) for e in other]
    assert first[0].stream == stream[0].stream | {"blurry": {"share": 0.3, "seed": 1}}
    assert len({bench.run(s, training=SMALL).name for s in (stream, first, other)}) == 3


@pytest.mark.parametrize("method", ["joint", "replay", "lwf", "default"])
def test_methods_learn_blurry_streams(method):
    stream = bench.blurry(bench.split("digits", tasks=2, scenario="class"), 0.3)
    assert stream[0].classes == tuple(range(10))
    record = bench.run(later(bench.limit(stream, 200), 0), method, training=Training(hidden=(32,), epochs=5))
    assert record.average > 0.5
    assert len(early(stream, 1)[0].test) == round(0.2 * len(stream[0].train))


@pytest.mark.parametrize(("call", "words"), [
    (lambda s: bench.split("digits", order=[0, 1]), r"The order \[0, 1\] does not have each number from 0 to 9 once"),
    (lambda s: bench.split("digits", order=[0] * 10), "does not have each number"),
    (lambda s: bench.limit(s, 0), "A limit of 0"),
    (lambda s: bench.limit(s, 1), "Task 1 has training examples of 2 labels, and a limit of 1 would lose some"),
    (lambda s: bench.blurry(s, 0.3), "task-incremental"),
    (lambda s: bench.blurry(s[:1], 0.3), "task-incremental"),
    (lambda s: bench.blurry(bench.permuted("digits", tasks=1), 0.3), "two tasks or more"),
    (lambda s: bench.blurry(bench.permuted("digits", tasks=2), 0.0), "With a share of 0.0 nothing"),
    (lambda s: bench.blurry(bench.permuted("digits", tasks=2), 1.1), "at most 1"),
    (lambda s: bench.blurry(bench.permuted("digits", tasks=2), 1e-6), "nothing crosses"),
    (lambda s: bench.blurry([], 0.3), "at least one experience"),
])  # fmt: skip
def test_what_cannot_be_varied(call, words):
    with pytest.raises(ValueError, match=words):
        call(bench.split("digits"))


def errors(true, predicted):
    assert true.shape == predicted.shape == (len(true),)
    return (true != predicted).mean()


def test_a_metric_of_ones_own_scores_what_accuracy_scores():
    """The share of errors is what accuracy leaves, and all that follows from it has the same size."""
    stream, training = bench.split("digits", 5), bench.Training(batch_size=50)
    plain = bench.run(stream, "finetune", training=training)
    seen = []
    options = {"training": training, "track": lambda figures, task: seen.append(figures["forgetting"]) if task == 5 else None}
    record = bench.run(bench.scored(stream, errors, higher=False), "finetune", **options)
    assert (record.metric, record.higher) == ("errors", False)
    for row, other in zip(record.scores, plain.scores, strict=True):
        assert row == pytest.approx([1 - a for a in other])
    assert [record.forgetting, *seen] == pytest.approx([plain.forgetting] * 2)
    assert record.forward_transfer == pytest.approx(plain.forward_transfer)
    assert record.config["stream"]["metric"].endswith(":errors")
    assert record.name != plain.name


def test_a_metric_by_its_import_path_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def misses(true, predicted):\n    return (true != predicted).sum()\n")
    words = ["split-digits", "--methods", "finetune", "--seeds", "1", "--metric", "mine:misses", "--lower", "--out", "out"]
    assert main(["run", *words]) == 0
    (record,) = report.read("out")[0]
    assert (record.metric, record.higher) == ("misses", False)
    assert record.scores[0][1] == int(record.scores[0][1]) > 1
    (recorded,) = reproduce.commands(report.summarise([record])[0]).lines
    (derived,) = reproduce.commands(report.summarise([replace(record, command="")])[0]).lines
    assert "--metric mine:misses --lower" in recorded
    assert "--metric mine:misses --lower" in derived


def test_lower_needs_a_metric(capsys):
    assert main(["run", "split-digits", "--lower"]) == 2
    assert "--lower is for a metric of your own" in capsys.readouterr().err


@pytest.mark.parametrize(("metric", "message"), [
    ("mine:absent", r"Metric `mine:absent` cannot be used"), ("hits", "Pass a function of true and predicted labels"),
])  # fmt: skip
def test_a_metric_that_is_none(metric, message):
    with pytest.raises(ValueError, match=message):
        bench.scored(bench.split("digits"), metric)


def test_accuracy_is_the_name_of_a_fraction_of_which_more_is_better():
    def accuracy(true, predicted):
        return (true == predicted).sum()

    accuracy.__qualname__ = "accuracy"
    stream = bench.split("digits")
    with pytest.raises(ValueError, match="give this one another name"):
        bench.scored(stream, accuracy, higher=False)
    with pytest.raises(ValueError, match="which is no fraction"):
        bench.run(bench.scored(stream, accuracy), "finetune")


def test_a_metric_has_to_be_finite_and_tuning_looks_for_the_highest():
    stream = bench.scored(bench.split("digits"), lambda true, predicted: float("nan"))
    with pytest.raises(ValueError, match=r"returned nan\. It has to return a finite number"):
        bench.run(stream, "finetune")
    with pytest.raises(ValueError, match=r"a lower one is better here\. Negate the metric"):
        bench.tune(bench.scored(bench.split("digits"), errors, higher=False), RWalk())
