"""Streams in which there is nothing to tell apart are said to be such, in the report and on the console."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rwalk import RWalk, bench
from rwalk.bench import Record, Training
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.holdout import early, later
from rwalk.cli.main import main
from rwalk.report import show, summarise
from rwalk.report.markdown import markdown
from rwalk.report.remarks import remarks, single_labels

TRAINING = Training(hidden=(8,), batch_size=20)


def places(labels, at):
    """Forty examples in domains, in both splits the same."""
    y, at = (torch.tensor(column).repeat(40 // len(column)) for column in (labels, at))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(int(at.max()) + 1)))
    return DataSet("d", x, y, x, y, tuple("abc"[: int(y.max()) + 1]), 0, at, at, names)


def in_order(labels):
    """Examples whose labels change in time."""
    y = torch.repeat_interleave(torch.tensor(labels), 10)
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    return DataSet("d", x, y, x, y, ("a", "b"))


def said(stream, method="finetune", training=TRAINING, **options):
    """The remarks of a run, which stand in the report and on the console."""
    record = bench.run(stream, method, training=training, **options)
    (comparison,) = summarise([record])
    found = list(single_labels(comparison))
    console = Console(file=io.StringIO(), width=200)
    show([comparison], console)
    shown = " ".join(console.file.getvalue().split()).replace("\u00a0", " ")
    for text in found:
        assert text in [remark.text for remark in remarks(comparison) if remark.trouble]
        assert text in markdown([comparison])
        assert text.replace("\u00a0", " ") in shown
    assert found or not ("single label" in shown or "same label" in shown)
    return record, found


ONE, TWO = [0] * 4, [0, 1, 0, 1]
ALONE = {
    "as many tasks as classes": (lambda: bench.split("digits", tasks=10), "each task"),
    "nearly as many": (lambda: bench.split("digits", tasks=8), "tasks 3, 4, 5, 6, 7 and 8"),
    "all but one": (lambda: bench.split("digits", tasks=9), "tasks 2, 3, 4, 5, 6 and 3 others"),
    "labels counted from 0": (lambda: bench.split("digits", tasks=10, scenario="domain"), "each task"),
    "a domain of one label": (lambda: bench.domain(places([0, 1, 2, 2], [0, 0, 1, 1]), scenario="task"), "task 2"),
    "one class": (lambda: bench.permuted(places(ONE, TWO), tasks=2), "each task"),
    "one class in stretches": (lambda: bench.drift(places(ONE, TWO), tasks=2), "each task"),
    "one class, class-incremental": (lambda: bench.split(places(ONE, TWO), tasks=1, scenario="class"), "each task"),
    "the later half": (lambda: later(bench.split("digits", tasks=8), 2), "each task"),
}


@pytest.mark.filterwarnings("ignore:.*strength")
@pytest.mark.parametrize("method", ["finetune", "joint", RWalk()], ids=str)
@pytest.mark.parametrize("what", ALONE)
def test_tasks_with_one_label_to_choose_from(what, method):
    make, where = ALONE[what]
    record, found = said(make(), method)
    assert len(found) == 1
    assert f"In {where} there is a single label to choose from" in found[0]
    assert "every method reaches 100\u00a0%" in found[0]
    named = range(len(record.scores)) if where == "each task" else [k for k, n in enumerate(record.labels) if n["compete"] == 1]
    assert all(row[k] == 1 for row in record.scores for k in named)


def test_a_remedy_is_named_that_there_is():
    assert "Take fewer tasks, or `--scenario class`" in said(bench.split("digits", tasks=10))[1][0]
    assert "Take fewer tasks, or other data" in said(bench.split("digits", tasks=10, scenario="domain"))[1][0]


@pytest.mark.parametrize(("make", "where"), [
    (lambda: bench.domain(places([0, 1, 1, 1], [0, 0, 1, 1])), "task 2"),
    (lambda: bench.domain(places(TWO, TWO)), "each task"),
    (lambda: bench.drift(in_order([0, 0, 1, 0]), tasks=2), "task 1"),
])  # fmt: skip
def test_tasks_in_which_one_label_occurs_among_several(make, where):
    _, found = said(make())
    assert len(found) == 1
    assert f"In {where} all test examples have the same label" in found[0]


def test_a_task_whose_test_examples_alone_have_one_label():
    first, second = bench.split("digits", tasks=5)[:2]
    y = first.test.labels()
    _, found = said([replace(first, test=replace(first.test, rows=first.test.rows[y == 0])), second])
    assert "In task 1 all test examples have the same label" in found[0]


def test_a_single_label_in_the_training_softmax_teaches_nothing():
    record, found = said(bench.split("digits", tasks=10, scenario="class"), training=replace(TRAINING, mask="task"))
    assert len(found) == 1
    assert "In each task a single label is in the training softmax, so that nothing is learned" in found[0]
    assert record.average < 0.3


@pytest.mark.parametrize("make", [
    lambda: bench.split("digits"), lambda: bench.split("digits", tasks=10, scenario="class"),
    lambda: bench.permuted("digits", tasks=2), lambda: bench.domain(places([0, 1, 2, 0], [0, 0, 1, 1]), scenario="task"),
    lambda: bench.drift(in_order([0, 1, 1, 0]), tasks=2),
])  # fmt: skip
def test_where_there_is_something_to_tell_apart_nothing_is_said(make):
    assert said(make())[1] == []


def test_labels_are_counted_in_records_and_older_ones_have_none(tmp_path):
    record = bench.run(bench.split("digits", tasks=8), training=TRAINING)
    data = load("digits")
    groups = torch.arange(10).tensor_split(8)
    occurring = [len(set(data.test_y.tolist()) & set(group.tolist())) for group in groups]
    assert record.labels == [{"occur": n, "compete": len(group)} for n, group in zip(occurring, groups, strict=True)]
    path = record.save(tmp_path)
    assert Record.load(path) == record
    assert list(single_labels(summarise([replace(record, labels=[])])[0])) == []


def test_tuning_where_every_strength_is_right_is_refused(tmp_path, capsys):
    assert main(["tune", "split-digits", "--tasks", "10", "--out", str(tmp_path / "t")]) == 2
    assert "single label to choose from" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    early(bench.split("digits", tasks=10, scenario="class"))
