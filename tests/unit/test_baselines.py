"""Replay, A-GEM, learning without forgetting and cumulative training, against their definitions in float64 NumPy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rwalk import RWalk, bench
from rwalk.bench import Rehearsal, Training
from rwalk.bench.baselines import AGEM, LwF, Past, Replay
from rwalk.bench.dataset import DataSet
from rwalk.bench.models import mlp
from rwalk.bench.training import Learner
from rwalk.consolidation.consolidator import Consolidator
from rwalk.replay import Buffer
from tests.oracle import softmax_gradient

SMALL = Training(hidden=(16,), batch_size=50)
LINE = Training(hidden=(), batch_size=8, epochs=2, lr=0.3)


def stream(scenario="class", tasks=3):
    """Six classes of points in five dimensions, in float64."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(14)
    x = torch.randn(84, 5, generator=generator, dtype=torch.float64) + F.one_hot(y)[:, :5]
    return bench.split(DataSet("points", x, y, x, y, tuple("abcdef")), tasks=tasks, scenario=scenario)


def line(outputs=6):
    return mlp((5,), outputs, ()).double()


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


class Truth:
    """Softmax regression under plain SGD: gradients over some of the outputs, and batches as the bench draws them."""

    def __init__(self, learner):
        self.theta = [p.detach().clone().numpy() for p in learner.model.parameters()]
        self.generator = torch.Generator().manual_seed(0)

    def batches(self, y):
        for _ in range(LINE.epochs):
            yield from torch.randperm(len(y), generator=self.generator).split(LINE.batch_size)

    def gradient(self, x, y, labels):
        """Of mean cross-entropy where only `labels` compete, in the shape of the whole."""
        weight, bias = self.theta
        parts = softmax_gradient(weight[labels], bias[labels], x.numpy(), np.searchsorted(labels, y.numpy()))
        return self.whole(parts, labels)

    def whole(self, parts, labels):
        found = [np.zeros_like(t) for t in self.theta]
        for into, part in zip(found, parts, strict=True):
            into[labels] = part
        return found

    def step(self, gradient):
        for t, g in zip(self.theta, gradient, strict=True):
            t -= LINE.lr * g

    def matches(self, learner):
        for t, p in zip(self.theta, learner.model.parameters(), strict=True):
            np.testing.assert_allclose(p.detach().numpy(), t, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_a_gem_is_its_equation(scenario):
    """g - (g.r / r.r) r where g.r < 0; memory batches as a buffer of the same seed gives them."""
    learner = Learner(lambda: line(6 if scenario == "class" else 2), LINE, addition=AGEM(Rehearsal(18, batch=4), 0))
    truth, buffer, seen, projected = Truth(learner), Buffer(18, seed=1), [], [0, 0]
    for e in stream(scenario):
        learner.fit(e)
        seen = sorted({*seen, *e.classes})
        x, y = e.train.read()
        for rows in truth.batches(y):
            r = None
            if len(buffer):
                old = buffer.sample(4)
                r = truth.gradient(old.x, old.y, seen)
            g = truth.gradient(x[rows], y[rows], seen)
            if r is not None:
                gr, rr = (sum((a * b).sum() for a, b in zip(v, r, strict=True)) for v in (g, r))
                projected[int(gr < 0)] += 1
                g = [a - gr / rr * b for a, b in zip(g, r, strict=True)] if gr < 0 else g
            truth.step(g)
        buffer.add(None, [(x, y)])
        truth.matches(learner)
    assert projected[1] > 3
    assert scenario == "class" or projected[0] > 3  # tasks that share their labels conflict in part of the steps only
    assert learner.memory_sizes()["stored_examples"] == 18


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_learning_without_forgetting_is_its_equation(scenario):
    """The gradient of -sum p' log q' over an earlier task's outputs, p' and q' softmax(z/2), is (q' - p')/2 at z."""
    strength = 1.5
    learner = Learner(line, LINE, addition=LwF(strength))
    truth, seen, old = Truth(learner), [], []
    for e in stream(scenario):
        learner.fit(e)
        seen += e.classes
        mine = seen if scenario == "class" else list(e.classes)
        x, y = e.train.read()
        teacher = [t.copy() for t in truth.theta]
        for rows in truth.batches(y):
            inputs = x[rows].numpy()
            total = truth.gradient(x[rows], y[rows], mine)
            for labels in old:
                p, q = (softmax((inputs @ w[labels].T + b[labels]) / 2) for w, b in (teacher, truth.theta))
                error = (q - p) / 2 / len(inputs) * strength
                for t, part in zip(total, truth.whole([error.T @ inputs, error.sum(0)], labels), strict=True):
                    t += part
            truth.step(total)
        old = [list(seen)] if scenario == "class" else [*old, mine]
        truth.matches(learner)
    assert learner.memory_sizes()["state_bytes"] == 8 * (5 * 6 + 6)


def test_cumulative_training_goes_on_from_the_last_weights_with_all_data():
    learner = Learner(line, LINE, addition=Past(anew=False))
    truth, seen, data = Truth(learner), [], []
    for e in stream():
        learner.fit(e)
        seen += e.classes
        data.append(e.train.read())
        x, y = (torch.cat(column) for column in zip(*data, strict=True))
        for rows in truth.batches(y):
            truth.step(truth.gradient(x[rows], y[rows], seen))
        truth.matches(learner)
    assert learner.memory_sizes()["stored_examples"] == 84


def test_replayed_examples_compete_as_their_own_task_does():
    """Task-incremental: each of the mixed batch's rows has a softmax over its own task's outputs; the loss is their mean."""
    learner = Learner(line, LINE, addition=Replay(Rehearsal(20, batch=3), 0))
    truth, buffer, tasks = Truth(learner), Buffer(20, seed=1), []
    for e in stream("task"):
        learner.fit(e)
        x, y = e.train.read()
        for rows in truth.batches(y):
            parts = [(x[rows], y[rows], list(e.classes))]
            if len(buffer):
                old = buffer.sample(3)
                parts += [(old.x[old.task == k], old.y[old.task == k], tasks[k]) for k in set(old.task.tolist())]
            count = sum(len(p[1]) for p in parts)
            grads = [[g * len(p[1]) / count for g in truth.gradient(*p)] for p in parts]
            truth.step([sum(g) for g in zip(*grads, strict=True)])
        tasks.append(list(e.classes))
        buffer.add(None, [(x, y)])
        truth.matches(learner)


def test_a_run_beside_a_rule_equals_the_plain_loop():
    """The bench's learner does no more than a user's loop with a consolidator and a buffer, bit for bit."""
    experiences = bench.split("digits", tasks=5, scenario="class")
    rehearsal = Rehearsal(30, select="herding")
    record = bench.run(experiences, RWalk(), strength=2.0, seed=7, training=SMALL, replay=rehearsal)
    assert record.method == "rwalk+replay"
    torch.manual_seed(7)
    model = mlp((1, 8, 8), 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(), strength=2.0).attach(optimizer)
    generator, buffer = torch.Generator().manual_seed(7), Buffer(30, select="herding", seed=8)
    for k, experience in enumerate(experiences):
        x, y = experience.train.read()
        seen = 2 * k + 2
        for rows in torch.randperm(len(y), generator=generator).split(50):
            inputs, labels, _ = buffer.mix(x[rows], y[rows])
            optimizer.zero_grad()
            shut = torch.arange(10) >= seen
            F.cross_entropy(model(inputs).masked_fill(shut, -torch.inf), labels).backward()
            optimizer.step()
        memory.consolidate()
        buffer.add(model, [(x, y)])
        for j, other in enumerate(experiences[: k + 1]):
            x, y = other.test.read()
            assert record.scores[k][j] == (model(x)[:, :seen].argmax(1) == y).double().mean().item()


def test_records_say_what_is_stored_and_what_a_step_costs():
    experiences = bench.split("digits", tasks=2, scenario="class")
    rows, own = [len(e.train) for e in experiences], SMALL.batch_size
    steps = [-(-n // own) for n in rows]
    found = {m: bench.run(experiences, m, training=SMALL) for m in ("finetune", "replay", "agem", "lwf", "cumulative")}
    assert {m: r.memory["stored_examples"] for m, r in found.items()} == {
        "finetune": 0, "replay": 200, "agem": 200, "lwf": 0, "cumulative": sum(rows)}  # fmt: skip
    held = 200 * (64 * 4 + 3 * 8)  # float32 inputs; label, task and key in eight bytes each
    assert {m: r.memory["state_bytes"] for m, r in found.items()} == {
        "finetune": 0, "replay": held, "agem": held, "lwf": found["lwf"].memory["model_bytes"], "cumulative": 0}  # fmt: skip
    for name in ("replay", "agem"):
        assert found[name].timings["examples_per_step"] == pytest.approx((sum(rows) + rows[1]) / sum(steps))
    assert found["finetune"].timings["examples_per_step"] == pytest.approx(sum(rows) / sum(steps))
    assert found["replay"].config["replay"] == {"size": 200, "per": "total", "select": "uniform", "batch": None}
    assert (found["lwf"].config["strength"], found["lwf"].config["temperature"]) == (1.0, 2.0)


@pytest.mark.parametrize("select", ["uniform", "plane", "entropy", "herding", "reservoir"])
def test_a_few_examples_hold_what_fine_tuning_forgets(select):
    experiences, training = bench.split("digits", tasks=5, scenario="class"), Training(epochs=5, hidden=(64,))
    plain = bench.run(experiences, "finetune", training=training)
    record = bench.run(experiences, "replay", training=training, replay=Rehearsal(100, select=select))
    assert plain.average < 0.3
    assert record.average > plain.average + 0.3
    assert record.memory["stored_examples"] == 100


def test_texts_that_are_continued_are_replayed_uniformly_over_tasks():
    x, at = torch.randint(256, (40, 9)), torch.arange(40) % 2
    data = DataSet("c", x[:, :-1], x[:, 1:], x[:, :-1], x[:, 1:], tuple(map(chr, range(256))), 256, at, at, ("a", "b"))
    record = bench.run(bench.domain(data), "replay", training=Training(batch_size=10), replay=8)
    assert record.memory["stored_examples"] == 8
    with pytest.raises(ValueError, match='select="herding"'):
        bench.run(bench.domain(data), "replay", replay=Rehearsal(8, select="herding"))


@pytest.mark.parametrize("method", ["replay", "agem", "lwf", RWalk()], ids=str)
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_every_comparator_runs_in_every_scenario(method, scenario):
    experiences = bench.split("digits", tasks=5, scenario=scenario)
    kept = None if method == "lwf" else 40
    record = bench.run(experiences, method, training=SMALL, replay=kept)
    again = bench.run(experiences, method, training=SMALL, replay=kept)
    assert record.scores == again.scores


@pytest.mark.parametrize(("call", "kind", "word"), [
    (lambda s: bench.run(s, "finetune", replay=200), ValueError, "Method `finetune` does not use `replay`"),
    (lambda s: bench.run(s, "lwf", replay=200), ValueError, "Method `lwf` does not use `replay`"),
    (lambda s: bench.run(s, "replay", replay="200"), TypeError, "`replay` is '200'"),
    (lambda s: bench.run(s, "replay", replay=0), ValueError, "size"),
    (lambda s: bench.run(s, "agem", replay=9), ValueError, "9 examples in total are too few for 10 classes"),
    (lambda s: bench.run(s, "lwf", strength=-1.0), ValueError, "strength"),
    (lambda s: Rehearsal(select="best"), ValueError, "select"),
    (lambda s: Rehearsal(per="label"), ValueError, "per"),
    (lambda s: Rehearsal(batch=0), ValueError, "batch=0"),
])  # fmt: skip
def test_impossible_rehearsals(call, kind, word):
    with pytest.raises(kind, match=word):
        call(bench.split("digits", tasks=5))
