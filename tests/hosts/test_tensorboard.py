"""What `rwalk run --log tensorboard` writes is what its records say, once, whatever happened meanwhile."""

import json

import pytest

pytest.importorskip("tensorboard", reason="needs TensorBoard: make test-integrations")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwalk.bench import Record
from rwalk.bench.checkpoint import Checkpoint
from rwalk.bench.trackers import tensorboard
from rwalk.cli import main

RUN = ["run", "permuted-digits", "--tasks", "3", "--seeds", "1", "--hidden", "8", "--batch-size", "50"]


def run(out, *arguments):
    return main.main([*RUN, "--log", "tensorboard", "--out", str(out), *arguments])


def events(folder):
    """Read the events of a folder: for each tag its values by step, each of which must be there once."""
    accumulator = EventAccumulator(str(folder)).Reload()
    found = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    for tag, values in found.items():
        assert len({event.step for event in values}) == len(values), f"{tag} came twice"
    return {tag: {event.step: pytest.approx(event.value, rel=1e-6) for event in values} for tag, values in found.items()}


def test_each_run_has_the_figures_of_its_record(tmp_path):
    assert run(tmp_path, "--methods", "finetune,rwalk") == 0
    for path in tmp_path.glob("*.json"):
        record, found = Record.load(path), events(path.with_suffix(""))
        for j in range(3):
            assert found[f"accuracy/task_{j + 1}"] == {k + 1: record.scores[k][j] for k in range(3)}
        assert found["average_accuracy"][3] == record.average
        assert found["forgetting"] == {2: Record("m", "s", 0, record.scores[:2]).forgetting, 3: record.forgetting}
        assert set(found["train/loss"]) == {1, 2, 3}
        assert ("memory/penalty" in found) == (record.method == "rwalk")
        for k, diagnostics in enumerate(record.diagnostics):
            assert found["memory/penalty"][k + 1] == diagnostics["figures"]["penalty"]
            for layer in diagnostics["layers"]:
                assert found[f"memory/drift/{layer['name']}"][k + 1] == layer["drift"]
    assert len(record.diagnostics) in (0, 3)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_tasks_that_are_not_evaluated_yet_have_no_figure(tmp_path):
    arguments = ["run", "split-digits", "--scenario", "class", *RUN[2:], "--methods", "finetune"]
    assert main.main([*arguments, "--log", "tensorboard", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = events(path.with_suffix(""))
    assert [sorted(found[f"accuracy/task_{j}"]) for j in (1, 2, 3)] == [[1, 2, 3], [2, 3], [3]]


@pytest.mark.parametrize("written", [False, True], ids=["before the checkpoint", "after it"])
def test_a_run_that_is_cut_off_and_goes_on_writes_nothing_twice(tmp_path, monkeypatch, written):
    assert run(tmp_path / "calm", "--methods", "rwalk") == 0
    save = Checkpoint.save

    def cut(self, learner, measured):
        if len(measured.scores) < 2 or written:
            save(self, learner, measured)
        if len(measured.scores) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", cut)
        assert run(tmp_path / "cut", "--methods", "rwalk") == 130
    for _ in range(2):  # the second time the record is there already
        assert run(tmp_path / "cut", "--methods", "rwalk") == 0
    calm, resumed = (events(next((tmp_path / name).glob("*.json")).with_suffix("")) for name in ("calm", "cut"))
    assert {tag: sorted(values) for tag, values in resumed.items()} == {tag: sorted(values) for tag, values in calm.items()}
    (path,) = (tmp_path / "cut").glob("*.json")
    accuracy = json.loads(path.read_text())["scores"]
    assert resumed["accuracy/task_1"] == {k + 1: accuracy[k][0] for k in range(3)}


def test_what_was_tracked_is_on_disk_before_the_run_ends(tmp_path):
    with tensorboard(tmp_path) as track:
        track({"figure": 0.5}, 1)
        assert events(tmp_path) == {"figure": {1: 0.5}}


def test_without_the_option_nothing_is_written(tmp_path):
    assert main.main([*RUN, "--methods", "finetune", "--out", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md"]
