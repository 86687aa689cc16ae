"""Regression streams: loss, evaluation and what each method does with targets, against NumPy in float64."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rwalk import EWC, MAS, Kronecker, RWalk, bench
from rwalk.bench import Rehearsal, Training
from rwalk.bench.baselines import LwF, Past, Replay
from rwalk.bench.builtin import make
from rwalk.bench.data import load
from rwalk.bench.evaluation import r_squared
from rwalk.bench.holdout import early
from rwalk.bench.models import mlp
from rwalk.bench.record import Record
from rwalk.bench.training import Learner
from rwalk.consolidation.settings import resolve
from rwalk.replay import Buffer
from rwalk.rules import rules

SHARED = Path(os.environ.get("RWALK_DATA") or Path(__file__).parents[3] / "shared" / "data")
LINE = Training(hidden=(), batch_size=8, epochs=2, lr=0.1)
X = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
SMALL = Training(hidden=(16,), batch_size=10, epochs=5)


def tasks(count=3, size=40, targets=2):
    """Linear targets in an odd unit whose weights turn from task to task."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(count):
        weight = np.outer(np.linspace(-1, 1, 5) + 0.3 * k, np.arange(1, targets + 1))
        x = [rng.normal(size=(size, 5)) for _ in range(2)]
        found.append(tuple((part, 1e5 + 300 * part @ weight + rng.normal(size=(size, targets))) for part in x))
    return found


def stream(**options):
    return bench.stream(tasks(), **options)


def r2(z, y):
    """The share of variance explained, as scikit-learn's `r2_score` defines it."""
    found = []
    for mine, true in zip(z.T, y.T, strict=True):
        sse, sst = ((true - mine) ** 2).sum(), ((true - true.mean()) ** 2).sum()
        found.append(1 - sse / sst if sst else float(sse == 0))
    return np.mean(found)


def test_r_squared_is_its_formula_and_constant_targets_are_met_or_not():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(50, 3)) * [1, 1e-3, 1e4] + 7
    for z in (y + rng.normal(size=y.shape), y * 0, y, np.tile(y.mean(0), (50, 1))):
        assert r_squared(torch.tensor(z), torch.tensor(y)) == pytest.approx(r2(z, y), abs=1e-9)
    constant = torch.full((5, 1), 0.1, dtype=torch.float64)
    assert r_squared(constant, constant) == 1
    assert r_squared(constant + 1e-9, constant) == 0
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        r_squared(constant * math.nan, constant)


def test_targets_are_standardised_by_the_first_task_and_keep_their_digits():
    raw = tasks()
    first = raw[0][0][1]
    for e, task in zip(stream(), raw, strict=True):
        for part, (x, y) in zip((e.train, e.test), task, strict=True):
            np.testing.assert_allclose(part.read()[1].numpy(), (y - first.mean(0)) / first.std(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(part.read()[0].numpy(), x.astype(np.float32))
        assert (e.regression, e.outputs, e.classes, e.kind, e.metric) == (True, 2, (), "table", "R²")
    (one,) = bench.stream([((raw[0][0][0], raw[0][0][1][:, 0]), (raw[0][1][0], raw[0][1][1][:, 0]))])
    assert one.outputs == 1
    assert one.train.read()[1].shape == (40, 1)


class Truth:
    """A linear model under plain SGD on the mean square over examples and targets."""

    def __init__(self, learner):
        self.theta = [p.detach().clone().double().numpy() for p in learner.model.parameters()]
        self.generator = torch.Generator().manual_seed(0)

    def batches(self, y):
        for _ in range(LINE.epochs):
            yield from torch.randperm(len(y), generator=self.generator).split(LINE.batch_size)

    def outputs(self, x):
        return x @ self.theta[0].T + self.theta[1]

    def gradient(self, x, y):
        error = 2 * (self.outputs(x) - y) / y.size
        return [error.T @ x, error.sum(0)]

    def step(self, gradient):
        for t, g in zip(self.theta, gradient, strict=True):
            t -= LINE.lr * g

    def matches(self, learner):
        for t, p in zip(self.theta, learner.model.parameters(), strict=True):
            np.testing.assert_allclose(p.detach().numpy(), t, rtol=2e-4, atol=2e-5)


def read(part):
    return [column.double().numpy() for column in part.read()]


def test_fine_tuning_descends_the_mean_square_and_is_judged_by_r_squared(tmp_path):
    torch.manual_seed(0)
    learner = Learner(lambda: mlp((5,), 2, ()), LINE)
    truth = Truth(learner)
    record = bench.run(stream(), "finetune", training=LINE)
    for k, e in enumerate(stream()):
        learner.fit(e)
        x, y = read(e.train)
        for rows in truth.batches(y):
            truth.step(truth.gradient(x[rows], y[rows]))
        truth.matches(learner)
        for j, other in enumerate(stream()):
            x, y = read(other.test)
            assert record.scores[k][j] == pytest.approx(r2(truth.outputs(x), y), abs=1e-3)
    assert (record.metric, record.higher, record.labels) == ("R²", True, [])
    assert Record.load(record.save(tmp_path), exact=True) == record


def test_joint_training_replay_and_old_answers_are_their_equations():
    for kind in ("joint", "replay", "lwf"):
        torch.manual_seed(0)
        added = {"joint": Past(anew=False), "replay": Replay(Rehearsal(12, batch=4), 0), "lwf": LwF(1.5)}[kind]
        learner = Learner(lambda: mlp((5,), 2, ()), LINE, addition=added)
        truth, past, buffer, old = Truth(learner), [], Buffer(12, seed=1), None
        for k, e in enumerate(stream()):
            learner.fit(e)
            x, y = read(e.train)
            past.append((x, y))
            if kind == "joint":
                x, y = (np.concatenate(column) for column in zip(*past, strict=True))
            for rows in truth.batches(y):
                inputs, targets = x[rows], y[rows]
                if kind == "replay" and k:
                    kept = buffer.sample(4)
                    inputs = np.concatenate([inputs, kept.x.double().numpy()])
                    targets = np.concatenate([targets, kept.y.double().numpy()])
                gradient = truth.gradient(inputs, targets)
                if kind == "lwf" and k:
                    teacher = inputs @ old[0].T + old[1]
                    gradient = [g + 1.5 * h for g, h in zip(gradient, truth.gradient(inputs, teacher), strict=True)]
                truth.step(gradient)
            buffer.add(None, [e.train.read()], task=k)
            old = [t.copy() for t in truth.theta]
            truth.matches(learner)


@pytest.mark.parametrize(("kind", "labels"), [
    (EWC, "exact"), (EWC, "sample"), (EWC, "true"), (EWC, "output"),
    (Kronecker, "exact"), (Kronecker, "sample"), (Kronecker, "output"),
])  # fmt: skip
def test_importance_is_that_of_outputs_with_unit_variance(kind, labels):
    """Of z = W x + b the Fisher information of each row of W is the mean of x^2, and of b it is 1, for any targets."""
    torch.manual_seed(0)
    (e,) = bench.stream(tasks(1, size=4000))
    rule = EWC(labels) if kind is EWC else Kronecker(measure="data", labels=labels, share=1.0, rank=None)
    learner = Learner(lambda: mlp((5,), 2, ()), Training(hidden=(), epochs=3, batch_size=100), memory=resolve(rule))
    learner.fit(e)
    x, y = read(e.train)
    weight, bias = (omega.double().numpy() for omega in learner.memory.anchor.importance().values())
    error = np.ones((4000, 2))
    if labels == "true":
        error = learner.model(torch.tensor(x).float()).detach().double().numpy() - y
    expected = [(error**2).T @ x**2 / 4000, (error**2).mean(0)]
    unit = 1.0 if kind is EWC else weight.mean() / expected[0].mean()  # Kronecker's is that of the task
    close = 1e-4 if labels in ("exact", "true") else 0.15
    np.testing.assert_allclose(weight, expected[0] * unit, rtol=close)
    np.testing.assert_allclose(bias, expected[1] * unit, rtol=close)


@pytest.mark.parametrize("method", ["cumulative", "agem", "recipe", *(rule() for rule in rules().values())], ids=str)
def test_every_method_learns_targets_and_equal_seeds_are_equal(method):
    pull = {} if isinstance(method, str) else {"strength": 0.01}
    first, again = (bench.run(stream(), method, training=SMALL, seed=1, **pull) for _ in range(2))
    assert first.scores == again.scores
    assert first.scores[0][0] > 0.8
    assert all(score is not None for row in first.scores for score in row)


def test_rules_replay_targets_and_every_task_has_its_share():
    record = bench.run(stream(), RWalk(), strength=0.01, training=SMALL, replay=30)
    assert record.memory["stored_examples"] == 30
    buffer = Buffer(7)
    for e in stream():
        buffer.add(None, [e.train.read()])
    assert buffer.sample(9).task.bincount().tolist() == [2, 2, 2]
    other = Buffer(7)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.sample(6).y, buffer.sample(6).y)
    with pytest.raises(ValueError, match="Examples of task 0 are in the buffer already"):
        buffer.add(None, [stream()[0].train.read()], task=0)


def test_runs_continue_after_an_interruption(tmp_path):
    calls = []

    def tick():
        calls.append(None)
        if len(calls) == 25:
            raise KeyboardInterrupt

    for method in ("lwf", "replay", EWC()):
        calls.clear()
        place, options = tmp_path / "run", {"training": SMALL, "strength": 0.01} if method != "replay" else {"training": SMALL}
        with pytest.raises(KeyboardInterrupt):
            bench.run(stream(), method, checkpoint=place, tick=tick, **options)
        assert place.exists()
        assert bench.run(stream(), method, checkpoint=place, **options).scores == bench.run(stream(), method, **options).scores
        place.unlink()


def test_tuning_judges_by_r_squared():
    found = bench.tune(stream(), "recipe", [0.01, 100], training=SMALL, tasks=2)
    assert (found.metric, found.strength) == ("R²", max(found.trials, key=lambda trial: trial["accuracy"])["strength"])
    assert len(early(stream(), 2)[0].test) == 8


def test_limits_and_blurry_boundaries():
    mixed = bench.limit(bench.blurry(stream(), 0.5), 20)
    assert [len(e.train) for e in mixed] == [20] * 3
    assert bench.run(mixed, training=SMALL).scores[0][0] > 0.3


@pytest.mark.skipif(not (SHARED / "noaa_weather").is_dir(), reason="no folder noaa_weather in RWALK_DATA")
def test_a_column_of_numbers_is_the_target_against_pandas():
    table = pd.read_parquet(SHARED / "noaa_weather" / "stream.parquet").sort_values("t")
    held = np.arange(len(table)) % 5 == 4
    train, test = (part.feat_5.to_numpy(float) for part in (table[~held], table[held]))
    data = load("noaa_weather", SHARED, target="feat_5")
    found = make("drift", data, tasks=10)
    first = train[: len(found[0].train)]
    for column, whole in (("train", train), ("test", test)):
        y = torch.cat([getattr(e, column).read()[1] for e in found]).squeeze(1).numpy()
        np.testing.assert_allclose(y, (whole - first.mean()) / first.std(), rtol=1e-4, atol=1e-5)
    assert found[0].shape == (8,)
    assert found[0].stream["target"] == "feat_5"
    other = make("drift", load("noaa_weather", SHARED, target="feat_4"), tasks=10)
    assert other[0].stream["data"] != found[0].stream["data"]


class Untaught:
    """A learner of one's own that answers with zeros of another shape."""

    def fit(self, experience):
        pass

    def predict(self, x, seen):
        assert not seen
        return torch.zeros(len(x) * 2)


def test_learners_of_ones_own_answer_with_targets():
    record = bench.run(stream(), Untaught())
    _, y = read(stream()[0].test)
    assert record.scores[0][0] == pytest.approx(r2(0 * y, y))


@pytest.mark.parametrize(("call", "words"), [
    (lambda s: bench.stream(tasks(), "class"), "no scenario `class`; choose domain"),
    (lambda s: bench.stream([((np.eye(3), [0.1, 0.2, 0.3]), (np.eye(3)[:1], [0.2]))]), "Task 1 has a single test example"),
    (lambda s: bench.stream([((np.eye(2), [0.1, math.nan]), (np.eye(2), [0.2, 0.1]))]), "labels of task 1's training data"),
    (lambda s: bench.stream([tasks()[0], tasks(targets=3)[1]]), "labels of 2 floating-point numbers, and task 2's"),
    (lambda s: bench.stream([tasks()[0], ((np.ones((2, 5)), [0, 1]), (np.ones((2, 5)), [0, 1]))]), "that are whole numbers"),
    (lambda s: bench.run([replace(s[0], train=bench.Subset(X, X[:, 0]))]), r"Targets of shape \(6,\)"),
    (lambda s: bench.run(s, training=Training(mask="seen")), "no labels for a mask `seen`"),
    (lambda s: bench.run(s, "replay", replay=Rehearsal(select="herding")), 'select="herding"'),
    (lambda s: bench.run(s, "replay", replay=Rehearsal(per="class")), 'per="class"'),
    (lambda s: bench.run(s, "replay", replay=Rehearsal(2)), "2 examples in total are too few for 3"),
    (lambda s: bench.run(s, MAS(), training=Training(model="gpt")), "no model `gpt`"),
    (lambda s: Buffer(5, select="entropy").add(None, [s[0].train.read()]), 'only "uniform" and "reservoir" in total'),
    (lambda s: load("digits", target="pixels"), "no column `pixels`"),
    (lambda s: load("digits", label="a", target="b"), "choose one of them"),
])  # fmt: skip
def test_what_a_regression_cannot_do(call, words):
    with pytest.raises(ValueError, match=words):
        call(stream())


def test_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="training diverged"):
        bench.run(stream(), training=Training(lr=1e6, epochs=20))


def test_a_model_of_ones_own_gives_one_output_for_each_target():
    record = bench.run(stream(), training=Training(model="tests.unit.test_regression:line"))
    assert record.config["training"]["model"] == "tests.unit.test_regression:line"
    with pytest.raises(ValueError, match=r"has to give scores of shape \(2, 2\)"):
        bench.run(stream(), training=Training(model="tests.unit.test_regression:single"))


def line(task):
    return torch.nn.Linear(*task.shape, task.outputs)


def single(task):
    return torch.nn.Linear(*task.shape, 1)
