"""Runs over streams: what is trained and evaluated, seeds, masks and records."""

import dataclasses
import json
import math
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwalk import EWC, Consolidator, RWalk, bench
from rwalk._io import files
from rwalk.bench import Record, Training
from rwalk.bench.baselines import RECIPES, Past
from rwalk.bench.models import mlp
from rwalk.bench.spec import RunSpec
from rwalk.bench.training import Learner
from rwalk.consolidation.settings import resolve
from rwalk.rules import rules

SMALL = Training(hidden=(16,), batch_size=50)


def test_a_run_equals_the_plain_loop():
    """The bench's learner does no more than a user's loop with a consolidator attached."""
    stream = bench.permuted("digits", tasks=2, seed=3)
    record = bench.run(stream, RWalk(), strength=2.0, seed=7, training=SMALL)
    torch.manual_seed(7)
    model = mlp((1, 8, 8), 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(), strength=2.0).attach(optimizer)
    generator = torch.Generator().manual_seed(7)
    for k, experience in enumerate(stream):
        x, y = experience.train.read()
        for rows in torch.randperm(len(y), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        memory.consolidate()
        for j, other in enumerate(stream):
            x, y = other.test.read()
            assert record.scores[k][j] == (model(x).argmax(1) == y).double().mean().item()


class Calls(TorchDispatchMode):
    """Counts the operations of PyTorch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_bench_is_a_plain_one_with_a_view_and_data_is_read_once_a_task():
    """The view: the loss kept for figures. Reading, which may permute, comes once a task."""
    read = []
    x, y = torch.rand(60, 6), torch.arange(60) % 3
    part = bench.Subset(x, y, transform=lambda x: read.append(len(x)) or x)
    task = bench.Experience(part, part, 0, (0, 1, 2), 3, "domain")

    def operations(batch_size):
        model = mlp((6,), 3, (4,))
        learner = Learner(lambda: model, Training(batch_size=batch_size))
        with Calls() as ours:
            learner.fit(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Calls() as plain:
            for rows in torch.randperm(60).split(batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                loss.detach()
        return ours.count - plain.count

    few, many = operations(30), operations(2)
    assert read == [60, 60]
    assert many == few


@pytest.mark.parametrize("method", ["finetune", "joint", RWalk()], ids=str)
def test_equal_seeds_give_equal_results_and_others_do_not(method):
    runs = [bench.run(bench.split("digits", tasks=2), method, seed=s, training=SMALL) for s in (1, 1, 2)]
    assert runs[0].scores == runs[1].scores
    assert runs[0].scores != runs[2].scores


def test_a_run_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    bench.run(bench.split("digits", tasks=2), training=SMALL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("scenario", "mask"), [("task", "task"), ("class", "seen"), ("domain", "all")])
def test_scenarios_evaluate_and_mask_as_they_should(scenario, mask):
    record = bench.run(bench.split("digits", tasks=5, scenario=scenario), training=Training(epochs=3))
    assert record.config["training"]["mask"] == mask
    assert record.config["stream"]["scenario"] == scenario
    future = [a for k, row in enumerate(record.scores) for a in row[k + 1 :]]
    assert all(a is None for a in future) if scenario == "class" else all(a is not None for a in future)
    assert record.scores[0][0] > 0.9
    if scenario == "class":
        assert record.scores[-1][0] < 0.5
        assert record.average < 0.5


def test_masks_shut_the_outputs_they_name():
    stream = bench.split("digits", tasks=5, scenario="class")
    expected = {"task": {2, 3}, "seen": {0, 1, 2, 3}, "all": set(range(10))}
    for mask, labels in expected.items():
        learner = Learner(lambda: mlp((1, 8, 8), 10, (16,)), Training(hidden=(16,), mask=mask))
        learner.fit(stream[0])
        before = learner.model[-1].bias.detach().clone()
        learner.fit(stream[1])
        moved = (learner.model[-1].bias != before).nonzero().flatten().tolist()
        assert set(moved) == labels


def test_predictions_stay_among_the_labels_asked_for_and_the_mode_is_kept():
    learner = Learner(lambda: torch.nn.Sequential(mlp((1, 8, 8), 10, (16,)), torch.nn.Dropout()), SMALL)
    x = torch.rand(40, 1, 8, 8)
    assert set(learner.predict(x, {3, 8}).tolist()) <= {3, 8}
    assert learner.model.training


def test_joint_training_sees_all_tasks_and_masks_each_example_by_its_own():
    stream = bench.split("digits", tasks=2)
    learner = Learner(lambda: mlp((1, 8, 8), 10, (16,)), Training(hidden=(16,), epochs=5), addition=Past(anew=True))
    for experience in stream:
        learner.fit(experience)
    assert learner.memory_sizes()["stored_examples"] == 1433
    for experience in stream:
        x, y = experience.test.read()
        assert (learner.predict(x, experience.classes) == y).double().mean() > 0.9


def test_a_learner_of_ones_own():
    class Constant:
        def fit(self, experience):
            self.label = experience.classes[0]

        def predict(self, x, seen):
            return torch.full((len(x),), self.label)

    record = bench.run(bench.split("digits", tasks=5), Constant())
    assert record.method == "constant"
    assert record.scores[0][0] == pytest.approx(0.5, abs=0.05)
    assert record.scores[1][0] == 0


def test_records_round_trip_and_name_their_configuration(tmp_path):
    stream = bench.split("digits", tasks=2)
    record = bench.run(stream, RWalk(alpha=0.5), strength=3.0, training=SMALL)
    path = record.save(tmp_path)
    assert Record.load(path) == record
    assert {p.suffix for p in tmp_path.iterdir()} == {".json"}
    content = json.loads(path.read_text())
    assert content["config"] == json.loads(json.dumps(RunSpec(stream, RWalk(alpha=0.5), 3.0, training=SMALL).configuration))
    assert content["config"]["rule"]["alpha"] == 0.5
    assert content["memory"]["state_bytes"] == 8 * content["memory"]["model_bytes"]
    assert content["timings"]["step_ms"] > 0
    assert [set(d) for d in content["diagnostics"]] == [{"figures", "layers"}] * 2
    assert content["diagnostics"][1]["figures"]["penalty / loss"] > 0
    assert sum(layer["share"] for layer in content["diagnostics"][1]["layers"]) == pytest.approx(1)
    others = {bench.run(stream, RWalk(alpha=0.6), 3.0, 0, SMALL).name, bench.run(stream, RWalk(alpha=0.5), 2.0, 0, SMALL).name}
    assert record.name not in others


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"method": "a"}', '{"method": "a", "stream": "s", "seed": 0, "scores": [[2.0]]}',
    '{"method": "a", "stream": "s", "seed": "0", "scores": []}',
    '{"method": "a", "stream": "s", "seed": 0, "scores": [[0.1], []]}',
    '{"method": "a", "stream": "s", "seed": 0, "scores": [], "format": 7}', "\xff\xfe",
    '{"method": "a", "stream": "s", "seed": 0, "scores": [], "labels": [{"occur": "1", "compete": 1}]}',
    '{"method": "a", "stream": "s", "seed": 0, "scores": [], "labels": [{"occur": 1}]}',
])  # fmt: skip
def test_files_that_are_no_records(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with suppress(ValueError, TypeError):
        files.seal(path, json.loads(text))  # with a right checksum, where it can have one
    with pytest.raises(ValueError, match=r"is no record of `rwalk run`: .*Move the file away"):
        Record.load(path)


@pytest.mark.parametrize("fields", [
    {"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}, {"lr": math.nan}, {"optimizer": "lion"}, {"hidden": (0,)}, {"mask": "none"},
], ids=str)  # fmt: skip
def test_training_out_of_range(fields):
    with pytest.raises(ValueError, match=rf"^Training\({next(iter(fields))}=.* is out of range"):
        Training(**fields)


def test_an_unknown_method():
    with pytest.raises(ValueError, match=r"There is no method `ewcc`\. Did you mean `ewc.*finetune, joint, .*`RWalk\(\)`"):
        bench.run(bench.split("digits", tasks=2), "ewcc")


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("name", [*rules(), *RECIPES])
def test_every_rule_runs_class_incrementally_under_its_mask(name):
    stream = bench.split("digits", tasks=5, scenario="class")
    method = name if name in RECIPES else rules()[name]()
    record = bench.run(stream, method, training=Training(hidden=(16,), batch_size=50))
    assert record.method == name
    assert all(a is None or 0 <= a <= 1 for row in record.scores for a in row)
    kind = RECIPES.get(name) or rules()[name]
    assert record.config["rule"].keys() == {f.name for f in dataclasses.fields(kind)}
    assert record.config["pull"] == kind.defaults.pull


def test_fisher_information_of_a_masked_head_leaves_the_shut_outputs_alone():
    stream = bench.split("digits", tasks=5)
    learner = Learner(lambda: mlp((1, 8, 8), 10, (16,)), SMALL, memory=resolve(EWC()))
    learner.fit(stream[0])
    omega = learner.memory.anchor.omega["3.weight"]
    assert (omega[2:] == 0).all()
    assert (omega[:2].sum(1) > 0).all()


def test_a_tracker_gets_the_figures_of_each_task():
    """Any callable is one."""
    calls = []
    stream = bench.split("digits", tasks=2)
    record = bench.run(stream, RWalk(), training=SMALL, track=lambda scalars, step: calls.append((step, scalars)))
    assert [step for step, _ in calls] == [1, 2]
    for k, (_, scalars) in enumerate(calls):
        assert [scalars["accuracy/task_1"], scalars["accuracy/task_2"]] == record.scores[k]
        assert scalars["memory/penalty"] == record.diagnostics[k]["figures"]["penalty"]
        assert scalars["train/loss"] > 0
    assert "forgetting" not in calls[0][1]
    assert (calls[1][1]["average_accuracy"], calls[1][1]["forgetting"]) == (record.average, record.forgetting)
