"""Optimisers, weight decay and schedules of runs: against loops by hand with torch's own classes, and what is recorded."""

import shlex

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler

from rwalk import RWalk, bench
from rwalk.bench import Training, models
from rwalk.bench.optimisation import OPTIMIZERS
from rwalk.bench.spec import RunSpec
from rwalk.bench.training import Learner
from rwalk.cli.main import main
from rwalk.cli.options import parse
from rwalk.cli.run import describe

TORCHS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}
SCHEDULES = {
    "constant": lambda o, n: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, n),
    "linear": lambda o, n: lr_scheduler.LinearLR(o, 1.0, 0.0, n),
}
PAIRS = [("sgd", "cosine"), ("momentum", "linear"), ("adam", "constant"), ("adamw", "cosine"), ("adamw", "linear")]


def network(task):
    torch.manual_seed(0)
    return models.build("mlp", task, (8,))


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
def test_training_is_that_of_a_loop_with_torchs_optimiser_and_schedule(optimizer, schedule):
    """The optimiser is kept over both tasks, and the schedule begins anew with each."""
    tasks = bench.split("digits", tasks=2)
    training = Training(2, 50, 0.02, optimizer, hidden=(8,), mask="all", weight_decay=0.1, schedule=schedule)
    learner = Learner(lambda: network(tasks[0]), training, seed=3)
    for task in tasks:
        learner.fit(task)

    model, order = network(tasks[0]), torch.Generator().manual_seed(3)
    step = TORCHS[optimizer](model.parameters())
    for task in tasks:
        x, y = task.train.read()
        for group in step.param_groups:
            group["lr"] = 0.02
        pace = SCHEDULES[schedule](step, 2 * -(-len(y) // 50))
        for _ in range(2):
            for rows in torch.randperm(len(y), generator=order).split(50):
                step.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                step.step()
                pace.step()
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["finetune", "joint", "cumulative", "replay", "agem", RWalk()], ids=str)
def test_every_method_follows_the_line_of_each_tasks_steps(method):
    """Joint and cumulative training have the steps of all tasks so far; between tasks the rate is the whole one."""
    tasks, seen = bench.split("digits", tasks=2), []
    spec = RunSpec(tasks, method, training=Training(batch_size=100, lr=0.1, hidden=(4,), schedule="linear"))
    learner = spec.build(lambda: seen.append(learner.optimizer.param_groups[0]["lr"]))
    expected = []
    for k, task in enumerate(tasks):
        learner.fit(task)
        assert learner.optimizer.param_groups[0]["lr"] == 0.1
        examples = sum(len(t.train) for t in (tasks[: k + 1] if method in ("joint", "cumulative") else [task]))
        steps = -(-examples // 100)
        expected += [0.1 * (1 - step / steps) for step in range(steps)]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("method", ["default", "replay", "joint"])
def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(method, tmp_path):
    training = Training(batch_size=50, lr=0.01, hidden=(8,), optimizer="adamw", weight_decay=0.1, schedule="cosine")
    tasks, place = bench.split("digits", tasks=3), tmp_path / "run.checkpoint"
    whole = bench.run(tasks, method, training=training)

    def stop(figures, learned):
        if learned == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(tasks, method, training=training, checkpoint=place, track=stop)
    assert place.exists()
    again = bench.run(tasks, method, training=training, checkpoint=place)
    assert again.scores == whole.scores
    assert len(again.scores) == 3


GOLDEN = {
    "split-digits --methods finetune,rwalk,default,lwf --seeds 1": [
        "split-digits-finetune-seed0-58d5dc86d6.json", "split-digits-rwalk-seed0-7dbf9b1156.json",
        "split-digits-default-seed0-b63caaf83d.json", "split-digits-lwf-seed0-88188c6d68.json",
    ],
    "permuted-digits --methods replay,ewc --seeds 1 --first-seed 3 --optimizer adam --lr 0.001 --hidden 32 --strength 10"
    " --tasks 2": ["permuted-digits-replay-seed3-7b1c951165.json", "permuted-digits-ewc-seed3-431e7c7b46.json"],
    "rotated-digits --methods kronecker --seeds 1 --model mlp --pull proximal --kronecker.rank 8 --replay 200":
        ["rotated-digits-kronecker_replay-seed0-09067941a7.json"],
}  # fmt: skip
"""Files that version 0.1.0 wrote before it had weight decay and schedules."""


@pytest.mark.parametrize("words", GOLDEN)
def test_records_of_runs_without_them_keep_their_names(words):
    runs = describe(parse(["run", *shlex.split(words)]))
    assert [run.name for run in runs] == GOLDEN[words]
    assert not {"weight_decay", "schedule"} & set(runs[0].configuration["training"])


def test_they_are_recorded_where_they_are_used(tmp_path):
    words = [
        "run",
        "split-digits",
        "--methods",
        "finetune,ewc",
        "--seeds",
        "1",
        "--tasks",
        "2",
        "--hidden",
        "4",
        "--batch-size=99",
    ]
    for more in ([], ["--weight-decay", "0.5"], ["--schedule", "cosine"], ["--schedule", "constant", "--weight-decay", "0"]):
        assert main([*words, *more, "--out", str(tmp_path)]) == 0
    records = [bench.Record.load(path).config["training"] for path in tmp_path.glob("*ewc*.json")]
    assert sorted((t.get("weight_decay", 0), t.get("schedule", "")) for t in records) == [(0, ""), (0, "cosine"), (0.5, "")]


@pytest.mark.parametrize(("fields", "match"), [
    ({"weight_decay": -1}, "`weight_decay` has to be a number from 0"), ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ({"schedule": "step"}, "one of constant, cosine, linear"), ({"optimizer": "adamax"}, "sgd, momentum, adam, adamw"),
    ({"epochs": 1.5}, "epochs=1.5"), ({"batch_size": 0}, "batch_size=0"), ({"hidden": 256}, "a tuple of widths"),
    ({"lr": float("inf")}, "lr=inf"), ({"hidden": (10**7,)}, "widths from 1 to 1,000,000"),
])  # fmt: skip
def test_fields_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Training(**fields)


def test_the_optimisers_are_those_that_are_compared_here():
    assert OPTIMIZERS.keys() == TORCHS.keys()
