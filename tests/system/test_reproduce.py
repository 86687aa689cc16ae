"""The released arithmetic against its definition in NumPy, and the script of the tables on a small data set."""

import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from reproduce import permuted_mnist, released, split, transfer
from reproduce.together import Together
from rwalk import L2, RWalk, bench, kernels
from rwalk.anchors import ElementwiseAnchor
from rwalk.bench import Training
from rwalk.bench.baselines import Rehearsal
from rwalk.bench.dataset import DataSet
from rwalk.bench.models import build
from rwalk.bench.streams import Subset
from rwalk.bench.training import Learner
from rwalk.consolidation.settings import resolve
from rwalk.rules.base import Step, TaskEnd

SHAPES = [(3, 2), (4,)]


def walk(rng, steps):
    """Random positions and gradients: one more position than gradients."""
    theta = [np.cumsum(rng.normal(size=(steps + 1, *shape)), 0) for shape in SHAPES]
    return theta, [rng.normal(size=(steps, *shape)) for shape in SHAPES]


def stretched(raw):
    low, high = min(r.min() for r in raw), max(r.max() for r in raw)
    return [(r - low) / (high - low) for r in raw]


def passed(step, after):
    """Make both passes over a step that ends at `after`."""
    columns = {"path": step.made.path, "last": step.made.last}
    if step.made.path is not None:
        columns["previous"] = [torch.zeros_like(path) for path in step.made.path]
    layout = kernels.laid_out(None, step.theta, columns)
    layout.before(kernels.BeforeStep(step.grad))
    torch._foreach_copy_(step.theta, after)
    layout.after(kernels.AfterStep([True] * len(after)))


def taught(rule, tasks):
    """Take a rule through positions and gradients; return its importance after each task."""
    state, omegas = rule.init([torch.tensor(t[0]) for t in tasks[0][0]]), []
    for theta, grad in tasks:
        for k in range(len(grad[0])):
            now = [torch.tensor(t[k]) for t in theta]
            step = Step(now, kernels.StepGradients(torch.tensor(g[k]) for g in grad))
            state = rule.observe(state, step)
            passed(step, [torch.tensor(t[k + 1]) for t in theta])
        now = {str(i): torch.tensor(t[-1]) for i, t in enumerate(theta)}
        anchor, state = rule.conclude(state, TaskEnd(now, now, ElementwiseAnchor()))
        omegas.append([w.numpy() for w in anchor.omega.values()])
    return omegas


def transcribed(tasks):
    """Their RWALK, line by line as their script and model run it."""
    running, total, omegas = [np.zeros(s) for s in SHAPES], None, []
    for theta, grad in tasks:
        fresh, small, score = ([np.zeros(s) for s in SHAPES] for _ in range(3))
        old = [t[0] for t in theta]
        for k in range(len(grad[0])):
            for i in range(len(SHAPES)):
                if (k + 1) % 10 == 0:
                    distance = running[i] * (theta[i][k] - old[i]) ** 2
                    score[i] = score[i] + np.maximum(small[i] / (1e-3 + distance), 0)
                    running[i] = (1 - 0.9) * running[i] + (1 / 10) * 0.9 * fresh[i]
                    old[i], small[i] = theta[i][k], 0 * small[i]
                fresh[i] = fresh[i] + grad[i][k] ** 2
                small[i] = small[i] - grad[i][k] * (theta[i][k + 1] - theta[i][k])
        score = [2 * s for s in score] if total is None else score
        total = [np.zeros(s) for s in SHAPES] if total is None else total
        total = [t + (t + s) / 2 for t, s in zip(total, score, strict=True)]
        omegas.append([f + s for f, s in zip(stretched(running), stretched(total), strict=True)])
    return omegas


def test_the_released_walk():
    rng = np.random.default_rng(0)
    tasks = [walk(rng, steps) for steps in (34, 30, 19)]
    for ours, theirs in zip(taught(released.ReleasedRWalk(), tasks), transcribed(tasks), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_released_running_fisher_information():
    rng = np.random.default_rng(1)
    tasks = [walk(rng, 25)]
    grad = [g**2 for g in tasks[0][1]]
    expected = [0.1 * (0.09 * g[:9].sum(0)) + 0.09 * g[9:19].sum(0) for g in grad]
    (ours,) = taught(released.ReleasedEWC(), tasks)
    for a, b in zip(ours, stretched(expected), strict=True):
        assert np.allclose(a, b, rtol=1e-9)


def test_the_released_agem_keeps_what_its_ring_holds():
    """Truth: a ring of four places for each class of each task, written to as batches are trained on."""
    ring = {}

    class Watched(released.ReleasedAGEM):
        def gradient(self, learner, batch):
            for example, label in zip(batch.x, batch.y.tolist(), strict=True):
                ring.setdefault((len(self.tasks), label), []).append(example)
            super().gradient(learner, batch)

    tasks = bench.permuted("digits", tasks=2)
    watched = Watched(Rehearsal(4, "class"), 3)
    learner = Learner(lambda: build("mlp", tasks[0], (4,)), Training(batch_size=7), 3, addition=watched)
    for task in tasks:
        learner.fit(task)
    kept = watched.buffer.sample(80)
    assert len(kept.y) == 80
    for (task, label), examples in ring.items():
        held = kept.x[(kept.task == task) & (kept.y == label)]
        assert {tuple(x.flatten().tolist()) for x in held} == {tuple(x.flatten().tolist()) for x in examples[-4:]}


@pytest.fixture
def small(monkeypatch):
    """The script of permuted MNIST on two small tasks of noise."""
    x, y = torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    monkeypatch.setattr(permuted_mnist, "TASKS", 2)
    monkeypatch.setattr(permuted_mnist, "KEPT", 10)
    return DataSet("mnist", x, y, x[:20], y[:20], tuple("0123456789"))


@pytest.mark.parametrize("name", permuted_mnist.METHODS)
def test_every_method_runs_and_its_record_is_found_again(name, tmp_path, small, capsys):
    method, tasks = permuted_mnist.METHODS[name], partial(permuted_mnist.stream, small, 0)
    first = permuted_mnist.one(tasks, name, method, 0, tmp_path)
    assert "seed 0" in capsys.readouterr().out
    assert permuted_mnist.one(tasks, name, method, 0, tmp_path).scores == first.scores
    assert not capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert method.about in permuted_mnist.table({name: [first]})


def test_another_strength_is_another_run(tmp_path, small):
    method, tasks = permuted_mnist.METHODS["recipe"], partial(permuted_mnist.stream, small, 0)
    for strength in (0.1, 0.2):
        permuted_mnist.one(tasks, "recipe", method._replace(strength=strength), 0, tmp_path)
    assert sorted(json.loads(p.read_text())["config"]["strength"] for p in tmp_path.iterdir()) == [0.1, 0.2]


def test_strengths_are_chosen_on_other_tasks_and_on_examples_that_are_not_trained_on(small):
    tasks = permuted_mnist.early(small)
    assert len(tasks) == 3
    trained, held = tasks[0].train.read()[0].sort(1).values, tasks[0].test.read()[0].sort(1).values
    whole = small.train_x.flatten(1).sort(1).values  # whatever the order of the pixels
    assert torch.equal(held.flatten(1).sort(1).values, whole[:10])
    assert torch.equal(trained.flatten(1).sort(1).values, whole[10:])
    first = permuted_mnist.stream(small, 0)[0].train.read()[0]
    assert not torch.equal(first, tasks[0].train.read()[0])


def scores(learner, tasks):
    for task in tasks:
        learner.fit(task)
    return learner.model(tasks[0].test.read()[0]).detach()


def test_training_together_is_training_on_one_task_that_holds_all():
    tasks = bench.permuted("digits", tasks=2)
    x, y = (torch.cat(column) for column in zip(*(task.train.read() for task in tasks), strict=True))
    whole = replace(tasks[0], train=Subset(x, y))
    training = Training(batch_size=32)

    def learner(kind, *first, **options):
        torch.manual_seed(0)
        return kind(*first, partial(build, "mlp", tasks[0], (16,)), training, 0, **options)

    for memory in (None, resolve(L2(), 0.0, None, "tail")):
        together, plain = learner(Together, 2, memory=memory), learner(Learner, memory=memory)
        assert torch.equal(scores(together, tasks), scores(plain, [whole]))


@pytest.mark.parametrize("name", [name for name in split.METHODS if "Avalanche" not in name])
def test_every_method_runs_on_split_streams(name, tmp_path, monkeypatch):
    target = split.Target("digits", lambda: bench.split("digits", tasks=2), Training(batch_size=64), split.STRENGTHS)
    monkeypatch.setattr(split, "KEPT", Rehearsal(20))
    first = split.one(name, target, 0, tmp_path)
    monkeypatch.setattr(bench, "run", None)
    assert split.one(name, target, 0, tmp_path).scores == first.scores
    assert f"{100 * first.average:.2f}" in split.row(name, target, [first])


def test_the_network_without_dropout_trains_as_the_cnn_evaluates():
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    (task,) = bench.split(DataSet("noise", x, y, x, y, ("a", "b")), tasks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = build("cnn", task, ())
        torch.manual_seed(0)
        bare = split.undropped(task)
    torch.testing.assert_close(bare.train()(x), usual.eval()(x))
    assert not torch.equal(usual.train()(x), bare(x))


def test_in_eval_mode_each_task_begins_with_one_usual_step():
    modes = []

    def build():
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training) if torch.is_grad_enabled() else None)
        return model

    tasks = bench.split("digits", tasks=2)
    learner = split.InEvalMode(build, Training(batch_size=64), 0, memory=resolve(RWalk(), 1.0))
    bench.run(tasks, learner)
    steps = [-(-len(task.train.read()[1]) // 64) for task in tasks]
    assert modes == [k == 0 for n in steps for k in range(n)]


def test_a_method_that_diverges_says_so_and_stops_no_other(tmp_path):
    wild = split.Target("digits", lambda: bench.split("digits", tasks=2), Training(batch_size=64), {"EWC": 1e9})
    with pytest.warns(UserWarning, match="overshoot"):
        assert split.several("EWC", wild, [0], tmp_path) is None
    assert "| EWC, strength 1e+09 | diverges | – |" in split.row("EWC", wild, None)


def test_avalanches_plugin_learns_the_same_stream():
    if find_spec("avalanche") is None:
        pytest.skip("needs Avalanche: make peers")
    from reproduce.avalanche_rwalk import AvalancheRWalk

    tasks = bench.split("digits", tasks=2)
    theirs = AvalancheRWalk(1.0, partial(build, "mlp", tasks[0], (64,)), Training(3, 16), 0)
    record = bench.run(tasks, theirs, training=Training(3, 16))
    assert record.scores[0][0] > 0.9
    assert record.scores[1][1] > 0.9


def test_the_table_of_transfer_shows_the_best_strength_beside_the_default(tmp_path):
    setting = transfer.Setting(lambda seed: bench.permuted("digits", tasks=2, seed=seed), Training(batch_size=128))
    assert transfer.one(setting, transfer.METHODS["joint"], None, 0, tmp_path).average > 0.3
    found = {"fine-tuning": {None: [40.0, 50.0]}, "averaging alone": {0.0: [50.0]}, "RWalk": {1: [60.0], 10: [70.0]},
             "EWC, averaged": {1: [61.0]}, "recipe": {0.1: [71.0], 0.15: [69.0]},
             "default": {transfer.DEFAULT: [80.0, 82.0], 0.2: [85.0, 83.0]}, "joint": {None: [90.0]}}  # fmt: skip
    cells = ["here", "45.0", "50.0", "70.0 (10)", "61.0 (1)", "71.0 (0.1)", "81.0", "-3.0", "90.0"]
    assert transfer.row("here", found) == cells
    assert len(cells) == len(transfer.HEADINGS)


def test_a_strength_at_which_a_run_diverges_scores_nothing(tmp_path):
    setting = transfer.Setting(lambda seed: bench.permuted("digits", tasks=2, seed=seed), Training(batch_size=32))
    with pytest.warns(UserWarning, match="The gradient pull overshoots"):
        assert transfer.accuracy(setting, transfer.METHODS["RWalk"], 1e9, 0, tmp_path) == 0
    assert transfer.accuracy(setting, transfer.METHODS["RWalk"], 1.0, 0, tmp_path) > 10


def test_the_released_networks_first_weights():
    torch.manual_seed(0)
    weights = [p.detach() for p in released.network(784, 10).parameters()]
    assert [tuple(w.shape) for w in weights] == [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)]
    assert all((w == 0.1).all() for w in weights[1::2])
    assert weights[0].abs().max() <= 0.2
    assert weights[0].std() == pytest.approx(0.1 * 0.8796, rel=0.01)  # of a normal cut off at two deviations
