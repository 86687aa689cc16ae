"""Batches under BatchNorm: none of a single example, in any method; without BatchNorm all stay as they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwalk import EWC, RWalk, bench
from rwalk.bench import Rehearsal, Training
from rwalk.bench.dataset import DataSet
from rwalk.bench.training import Learner, batches
from rwalk.cli.main import main
from rwalk.consolidation.settings import resolve
from stored import splits

MODELS = """
from torch import nn

def normed(task):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, task.outputs))

def bare(task):
    return nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, task.outputs))
"""
SMALL = Training(model="batch_models:normed", batch_size=5, epochs=2)
METHODS = ["finetune", "joint", "cumulative", "replay", "agem", "lwf", "recipe", EWC(), RWalk()]


@pytest.fixture
def factories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))


def stream(counts=(11, 6), test=3):
    """A task of each domain: `counts` are its training examples."""
    at = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    held = torch.repeat_interleave(torch.arange(len(counts)), test)
    x, more = (torch.randn(len(where), 4, generator=torch.Generator().manual_seed(0)) for where in (at, held))
    y, labels = torch.arange(len(at)) % 2, torch.arange(len(held)) % 2
    return bench.domain(DataSet("d", x, y, more, labels, ("a", "b"), 0, at, held, tuple(map(str, range(len(counts))))))


@pytest.mark.parametrize(("count", "sizes"), [
    (1, [1]), (2, [2]), (5, [5]), (6, [6]), (7, [5, 2]), (10, [5, 5]), (11, [5, 6]), (16, [5, 5, 6]), (0, [0]),
])  # fmt: skip
def test_a_last_one_joins_the_batch_before(count, sizes):
    rows = torch.arange(count)
    assert [len(part) for part in batches(rows, 5, joined=True)] == sizes
    assert torch.equal(torch.cat(batches(rows, 5, joined=True)), rows)
    assert [len(part) for part in batches(rows, 5, joined=False)] == [len(part) for part in rows.split(5)]


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_trains_with_batch_norm_on_any_number_of_examples(factories, method):
    record = bench.run(stream(), method, training=SMALL)
    assert all(0 <= a <= 1 for row in record.scores for a in row)


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("method", ["recipe", EWC(), "replay"], ids=str)
def test_replay_beside_a_rule_and_of_one_example_a_step(factories, method):
    bench.run(stream(), method, training=SMALL, replay=Rehearsal(4, batch=1))


def test_a_run_equals_the_plain_loop_with_joined_batches(factories):
    tasks = stream()
    record = bench.run(tasks, training=SMALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for k, task in enumerate(tasks):
        x, y = task.train.read()
        for _ in range(2):
            order = torch.randperm(len(y), generator=generator)
            for rows in (order[:5], order[5:]) if len(y) == 11 else (order,):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        model.eval()
        for j, other in enumerate(tasks):
            x, y = other.test.read()
            assert record.scores[k][j] == (model(x).argmax(1) == y).double().mean().item()
        model.train()


@pytest.mark.parametrize("layer", [nn.Identity(), nn.LayerNorm(4), nn.Dropout(0.5)], ids=str)
def test_without_batch_norm_batches_stay_as_they_are(layer):
    seen = []
    model = nn.Sequential(layer, nn.Linear(4, 2))
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    Learner(lambda: model, Training(batch_size=5)).fit(stream()[0])
    assert seen == [5, 5, 1]


def test_statistics_are_renewed_from_all_examples_of_a_task():
    """After tail averaging: the mean over 257 examples, and not over the first 256."""
    tasks = stream((257,))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    learner = Learner(lambda: model, Training(batch_size=16), memory=resolve(None))
    learner.fit(tasks[0])
    x = tasks[0].train.read()[0]
    assert torch.allclose(model[0].running_mean, x.mean(0), atol=1e-6)
    assert torch.allclose(model[0].running_var, x.var(0), atol=1e-5)


def test_evaluation_without_running_statistics(factories):
    record = bench.run(stream((12,), test=513), training=Training(model="batch_models:bare", batch_size=5))
    assert 0 <= record.scores[0][0] <= 1


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_single_example_is_refused_before_training(factories, method):
    for counts, training, match in (
        ((1, 6), SMALL, r"Task 1 has a single training example.*BatchNorm"),
        ((6, 1), SMALL, r"Task 2 has a single training example.*BatchNorm"),
        ((6, 6), Training(model="batch_models:normed", batch_size=1), "BatchNorm.*batch size from 1"),
    ):
        steps = []
        with pytest.raises(ValueError, match=f"(?s){match}"):
            bench.run(stream(counts), method, training=training, tick=lambda steps=steps: steps.append(1))
        assert not steps


@pytest.mark.parametrize("replay", [Rehearsal(1, select="reservoir"), Rehearsal(4, batch=1)], ids=str)
def test_a_single_stored_example_by_itself_is_refused_before_training(factories, replay):
    with pytest.raises(ValueError, match=r"A-GEM passes its stored examples.*BatchNorm"):
        bench.run(stream(), "agem", training=SMALL, replay=replay)
    bench.run(stream(), "agem", training=Training(batch_size=5), replay=replay)


def parts(folder, count):
    x = torch.randn(4, count, generator=torch.Generator().manual_seed(0)).tolist()
    columns = {**dict(zip("abcd", x, strict=True)), "domain": [k % 2 for k in range(count)]}
    return splits(folder / "d", columns | {"label": [k // 2 % 2 for k in range(count)]})


def test_runs_side_by_side_and_tuning_take_any_number_of_examples(factories, tmp_path):
    words = [f"domain-{parts(tmp_path, 22)}", "--model", "batch_models:normed", "--batch-size", "5"]
    own = ["--methods", "finetune,recipe", "--seeds", "1", "--workers", "2", "--out", "runs"]
    assert main(["run", *words, *own]) == 0
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    # 11 examples a task, of which a quarter is held out: 8 are left, and batches of 7 leave one
    tuned = ["--methods", "recipe", "--strength", "0.1", "--tune-tasks", "2", "--validation", "0.27", "--batch-size", "7"]
    assert main(["tune", *words[:3], *tuned, "--out", "tuned"]) == 0


def test_a_single_example_is_refused_on_the_command_line_before_anything_is_written(factories, tmp_path, capsys):
    words = [f"domain-{parts(tmp_path, 3)}", "--model", "batch_models:normed", "--out", "runs"]
    assert main(["run", *words]) == 2
    assert "Task 2 has a single training example" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
