"""A journal writes records that a report reads right, from any loop and of any metric."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from rwalk import Consolidator, Kronecker, RWalk, TaskFisher, report
from rwalk.bench import Record
from rwalk.report import Journal, journal
from rwalk.report.remarks import sentence


def months(folder, method, seed, errors, **options):
    journal = Journal(folder, method, "months", metric="RMSE", higher=False, seed=seed, settings={"lr": 0.1}, **options)
    for month, row in errors.items():
        journal.log(month, row)
    return journal


HELD = {"jan": {"jan": 2.0, "feb": 9.0}, "feb": {"jan": 2.5, "feb": 3.0}}
PLAIN = {"jan": {"jan": 2.0, "feb": 9.0}, "feb": {"jan": 6.0, "feb": 2.0}}


def test_an_error_is_averaged_and_forgotten_in_its_own_unit(tmp_path):
    journal = months(tmp_path, "mine", 0, HELD)
    record = Record.load(journal.path)
    assert record == journal.record
    assert (record.average, record.forgetting, record.backward_transfer) == (2.75, 0.5, -0.5)
    assert (record.tasks, record.scores) == (["jan", "feb"], [[2.0, 9.0], [2.5, 3.0]])
    for seed in range(3):
        months(tmp_path, "mine", seed, HELD) if seed else None
        months(tmp_path, "finetune", seed, PLAIN)
    records, problems = report.read(tmp_path)
    (comparison,) = report.summarise(records)
    assert not problems
    assert sentence(comparison) == "Mine ended at the lowest average RMSE, 2.75."
    page = report.write(tmp_path).read_text()
    for word in ("Average RMSE", "jan", "learning rate", "Journals of training loops wrote these records"):
        assert word in page
    assert "accuracy" not in page.split("<main>")[1].lower()


def test_tasks_that_come_later_add_columns(tmp_path):
    journal = Journal(tmp_path, "mine", tasks=["b", "a"])
    journal.log(None, {"a": 0.1, "b": 0.2})
    assert not list(tmp_path.iterdir())  # nothing was trained yet
    journal.log("b", {"b": np.float32(0.5)})
    journal.log(1, {"b": torch.tensor(0.25), "a": 0.75, "other": 1})
    record = journal.record
    assert record.tasks == ["b", "a", "other"]
    assert record.scores == [[0.5, None, None], [0.25, 0.75, 1.0]]
    assert record.untrained == [0.2, 0.1, None]
    assert (record.average, record.forgetting) == (0.5, 0.25)
    assert Record.load(journal.path) == record


def test_the_last_task_again_replaces_its_row(tmp_path):
    journal = Journal(tmp_path)
    journal.log(0, {"a": 0.5, "b": 0.1})
    journal.log("a", {"a": 0.75, "b": 0.1})
    journal.log("b", {"a": 0.5, "b": 0.5})
    assert journal.record.scores == [[0.75, 0.1], [0.5, 0.5]]
    with pytest.raises(ValueError, match="Task `a` was logged before, and other tasks after it"):
        journal.log("a", {"a": 0.5})
    assert journal.record.scores == [[0.75, 0.1], [0.5, 0.5]]


def test_a_number_is_a_name_where_names_are_numbers_and_else_a_place(tmp_path):
    journal = Journal(tmp_path, "mine")
    journal.log(2, {1: 0.5, 2: 0.75})  # the task called 2
    assert journal.done == ["2"]
    journal = Journal(tmp_path, "other")
    for place in range(2):
        journal.log(place, {"1": 0.5, "2": 0.75})
    assert journal.done == ["1", "2"]


def test_functions_are_called_in_order_and_their_time_is_no_training(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    journal = Journal(tmp_path, "mine")

    def slow():
        clock[0] += 1000
        return 0.5

    clock[0] = 3.0
    assert journal.evaluate(0, {"a": slow, "b": slow}).timings == {"train_seconds": 3.0}
    assert journal.evaluate(0, {"a": 0.25, "b": 0.75}, lambda share: share).scores == [[0.25, 0.75]]
    clock[0] += 4
    assert journal.log("b", {"a": 0.5, "b": 0.5}).timings == {"train_seconds": 7.0}


def test_an_interrupted_journal_continues(tmp_path):
    whole = months(tmp_path / "whole", "mine", 0, HELD).record
    months(tmp_path / "cut", "mine", 0, {"jan": HELD["jan"]})
    again = Journal(tmp_path / "cut", "mine", "months", metric="RMSE", higher=False, settings={"lr": 0.1}, resume=True)
    assert again.done == ["jan"]
    again.log("feb", HELD["feb"])
    assert (again.record.scores, again.record.tasks) == (whole.scores, whole.tasks)
    assert again.path.name == whole.name


def test_other_settings_than_those_to_continue_begin_a_new_record_with_a_warning(tmp_path):
    months(tmp_path, "mine", 0, {"jan": HELD["jan"]})
    other = Journal(tmp_path, "mine", "months", metric="RMSE", higher=False, settings={"lr": 0.2}, resume=True)
    with pytest.warns(UserWarning, match=r"no record of these settings to continue.*with another training\."):
        assert other.done == []
    Journal(tmp_path, "mine", "weeks", resume=True).log("a", {"a": 0.5})  # no warning: nothing of it is there


def test_a_record_of_an_earlier_process_is_replaced_with_a_warning(tmp_path):
    """As a script that is started again does; a process of its own wrote it, which a forgotten path stands for."""
    path = Journal(tmp_path, "mine").path
    Journal(tmp_path, "mine").log("a", {"a": 0.5})
    journal._written.pop(path.absolute())
    with pytest.warns(UserWarning, match=r"of an earlier journal, and this one replaces it. Pass `resume=True`"):
        Journal(tmp_path, "mine").log("a", {"a": 0.75})
    journal._written.pop(path.absolute())
    again = Journal(tmp_path, "mine", resume=True)
    assert again.done == ["a"]
    again.log("b", {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(("rule", "name"), [
    (None, "default"), (TaskFisher(), "recipe"), (Kronecker(rank=4), "kronecker"), (RWalk(), "rwalk"),
])  # fmt: skip
def test_methods_have_the_names_that_the_runner_gives_them(tmp_path, rule, name):
    memory = Consolidator(nn.Linear(2, 2), rule)
    assert Journal(tmp_path, memory=memory).record.method == name


def test_a_memory_shows_its_settings_layers_and_bytes(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    memory = Consolidator(model, RWalk(alpha=0.5), strength=3).attach(optimizer)
    journal = Journal(tmp_path, stream="s", memory=memory)
    for task in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            loss.backward()
            optimizer.step()
        summary = memory.summary(loss)
        memory.consolidate()
        journal.log(str(task), {"0": 0.5, "1": 0.5}, summary=summary)
    record = Record.load(journal.path)
    assert (record.method, record.config["strength"], record.config["rule"]["alpha"]) == ("rwalk", 3.0, 0.5)
    assert record.memory == {"model_bytes": 32, "state_bytes": memory.state_bytes}
    assert [layer["name"] for layer in record.diagnostics[1]["layers"]] == ["weight", "bias"]
    assert record.diagnostics[1]["figures"]["penalty"] > 0  # before the task was consolidated
    assert len(record.diagnostics) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ({"metric": "RMSE"}, "needs to know whether a higher score is better"),
    ({"higher": False}, "A higher accuracy is better"),
    ({"tasks": ["a", "a"]}, "The task `a` is named twice"),
])  # fmt: skip
def test_what_would_be_read_wrong_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Journal(tmp_path, **arguments)


@pytest.mark.parametrize(("task", "scores", "error", "message"), [
    ("c", {"a": 0.5}, ValueError, "There is no score of task `c`, which was trained, among a"),
    (3, {"a": 0.5}, ValueError, "There is no score of task `3`"),
    ("a", {"a": 91.0}, ValueError, "The accuracy of `a` is 91, and has to be a fraction"),
    ("a", {"a": "high"}, TypeError, "The score of `a` is 'high'"),
    ("a", {"a": [0.5, 0.6]}, TypeError, "Pass one number for each task"),
])  # fmt: skip
def test_odd_scores_are_refused_and_leave_no_trace(tmp_path, task, scores, error, message):
    journal = Journal(tmp_path, "mine")
    with pytest.raises(error, match=message):
        journal.log(task, scores)
    assert not journal.record.scores
    assert not list(tmp_path.iterdir())


def test_settings_have_to_be_json(tmp_path):
    with pytest.raises(TypeError, match="`settings` have to be JSON values"):
        Journal(tmp_path, settings={"model": nn.Linear(1, 1)})


def test_a_score_that_is_not_finite_is_recorded_as_unknown_with_a_warning(tmp_path):
    journal = Journal(tmp_path, "mine", metric="loss", higher=False)
    with pytest.warns(UserWarning, match="The score of `a` is nan, and is recorded as not evaluated"):
        journal.log("a", {"a": float("nan"), "b": 1})
    assert json.loads(journal.path.read_text())["scores"] == [[None, 1.0]]


def test_a_loop_over_seeds_that_does_not_say_so_is_warned(tmp_path):
    Journal(tmp_path, "mine").log("a", {"a": 0.5})
    with pytest.warns(UserWarning, match="Another journal of this process wrote .* and this one replaces it"):
        Journal(tmp_path, "mine").log("a", {"a": 0.75})
    Journal(tmp_path, "mine", seed=1).log("a", {"a": 0.75})
