"""The buffer: what it keeps against picks worked out by hand or in NumPy, and that nothing of it is lost or left to chance."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rwalk import RWalk
from rwalk._io import states
from rwalk.consolidation.consolidator import Consolidator
from rwalk.replay import Buffer, project_
from rwalk.replay.selections import SELECTIONS


class Known(torch.nn.Module):
    """A model whose features are its inputs: one linear layer, with weights that a test writes down."""

    def __init__(self, weight):
        super().__init__()
        weight = torch.tensor(weight)
        self.head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(x)


def task(n=40, labels=(0, 1), seed=0, width=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    return x, torch.tensor(labels)[torch.randint(len(labels), (n,), generator=generator)]


def kept(buffer):
    """What is kept of each class, as rows of numbers."""
    held = buffer.sample(len(buffer))
    return {
        key: {tuple(row) for row in held.x[(held.task == key[0]) & (held.y == key[1])].tolist()}
        for key in zip(held.task.tolist(), held.y.tolist(), strict=True)
    }


def herded(features, count):
    """Algorithm 4 of iCaRL, as it is written."""
    phi = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, picks = phi.mean(0), []
    for k in range(1, count + 1):
        norms = [np.linalg.norm(mean - (phi[i] + phi[picks].sum(0)) / k) if i not in picks else np.inf for i in range(len(phi))]
        picks.append(int(np.argmin(norms)))
    return picks


@pytest.mark.parametrize("count", [1, 2, 7, 19])
def test_herding_is_icarls_algorithm(count):
    x, y = task(60, labels=(0, 1), width=4)
    buffer = Buffer(count, per="class", select="herding")
    buffer.add(Known([[1.0] * 4] * 2), [(x, y)])
    for label in (0, 1):
        mine = x[y == label].double().numpy()
        assert kept(buffer)[0, label] == {tuple(row) for row in x[y == label][herded(mine, count)].tolist()}


def test_herding_by_hand():
    """Unit vectors at 0, 90 and 180 degrees: their mean is (0, 1/3). The nearest is (0, 1); then (0, 1) + (1, 0) over two is as
    near as (0, 1) + (-1, 0), so the first of them."""
    x = torch.tensor([[2.0, 0.0], [-5.0, 0.0], [0.0, 0.25]])
    buffer = Buffer(2, select="herding")
    buffer.add(None, [(x, torch.zeros(3, dtype=torch.int64))], features=lambda x: x)
    assert kept(buffer) == {(0, 0): {(0.0, 0.25), (2.0, 0.0)}}


@pytest.mark.parametrize(("ones", "zeros", "first"), [(1, 2, 0.0), (2, 1, 3.0)])
def test_herding_takes_features_that_are_zero_as_they_are(ones, zeros, first):
    """Unit vectors (1, 0) and dead features (0, 0): the mean is (1/3, 0) or (2/3, 0), and the nearer of the two comes first."""
    x = torch.tensor([[3.0, 0.0]] * ones + [[0.0, 0.0]] * zeros)
    buffer = Buffer(1, select="herding")
    buffer.add(None, [(x, torch.zeros(3, dtype=torch.int64))], features=lambda x: x)
    assert kept(buffer) == {(0, 0): {(first, 0.0)}}


def test_entropy_keeps_where_the_output_is_least_sure():
    """Logits (a, 0, 0): the nearer a is to 0, the higher the entropy; a shut class counts for nothing."""
    x = torch.tensor([[3.0], [0.25], [-1.0], [0.125], [8.0]])
    y = torch.zeros(5, dtype=torch.int64)
    buffer = Buffer(2, select="entropy")
    buffer.add(Known([[1.0], [0.0], [0.0]]), [(x, y)])
    assert kept(buffer)[0, 0] == {(0.25,), (0.125,)}
    shut = Buffer(2, select="entropy")
    closed = torch.tensor([True, False, False])  # (0, 0) everywhere: all equal, and the first ones stay
    shut.add(Known([[1.0], [0.0], [0.0]]), [(x, y)], logits=lambda out: out.masked_fill(closed, -math.inf))
    assert kept(shut)[0, 0] == {(3.0,), (0.25,)}


@pytest.mark.parametrize("label", [0, 1])
def test_the_entropy_of_one_logit_is_that_of_a_chance(label):
    x = torch.tensor([[3.0], [0.25], [-1.0], [0.125], [-8.0]])
    buffer = Buffer(2, select="entropy")
    buffer.add(Known([[1.0]]), [(x, torch.full((5,), label))])
    assert kept(buffer)[0, label] == {(0.25,), (0.125,)}
    with pytest.raises(ValueError, match="labels 0 and 1, not 2"):
        Buffer(2, select="entropy").add(Known([[1.0]]), [(x, torch.full((5,), 2))])


@pytest.mark.parametrize("select", ["entropy", "plane", "herding"])
def test_examples_that_depend_on_each_other_are_refused(select):
    """An LSTM that takes places first; features that are made of all of a batch."""

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = torch.nn.LSTM(3, 3), torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.lstm(x.unsqueeze(1))[0].squeeze(1))

    buffer, data = Buffer(3, select=select), [(torch.rand(6, 3), LABELS)]
    with pytest.raises(ValueError, match="depends on the other examples"):
        buffer.add(Recurrent(), data)
    if select != "entropy":
        with pytest.raises(ValueError, match="depends on the other examples"):
            buffer.add(torch.nn.Linear(3, 2), data, features=lambda x: x - x.mean(0))
    if select == "herding":
        with pytest.raises(ValueError, match="depends on the other examples"):
            buffer.add(None, data, features=lambda x: x.cumsum(0))
    assert not len(buffer)


def test_plane_distance_draws_with_weights_one_over_the_distance():
    """phi(x).w is 1, 2 and -4 for three examples: weights 1, 1/2 and 1/4. All orders of two, against the closed form."""
    x, weight = torch.tensor([[1.0, 7.0], [2.0, 5.0], [-4.0, 3.0]]), [[9.0, 9.0], [1.0, 0.0]]
    q, runs = np.array([4.0, 2.0, 1.0]) / 7, 1500
    seen, model = Counter(), Known(weight)
    for seed in range(runs):
        buffer = Buffer(2, select="plane", seed=seed)
        buffer.add(model, [(x, torch.ones(3, dtype=torch.int64))])
        seen[frozenset(row[0] for row in kept(buffer)[0, 1])] += 1
    for i, j in itertools.combinations(range(3), 2):
        chance = q[i] * q[j] / (1 - q[i]) + q[j] * q[i] / (1 - q[j])
        error = math.sqrt(chance * (1 - chance) / runs)
        assert abs(seen[frozenset((x[i, 0].item(), x[j, 0].item()))] / runs - chance) < 4 * error


def test_plane_distance_surely_keeps_what_lies_on_the_plane():
    x = torch.cat([torch.randn(50, 2) + 3, torch.tensor([[0.0, 4.0]])])
    for seed in range(20):
        buffer = Buffer(1, select="plane", seed=seed)
        buffer.add(Known([[1.0, 0.0]]), [(x, torch.zeros(51, dtype=torch.int64))])
        assert kept(buffer) == {(0, 0): {(0.0, 4.0)}}


@pytest.mark.parametrize("select", ["uniform", "reservoir"])
def test_samples_are_uniform(select):
    """Each of 30 examples stays in 10 of 30 buffers on average. For sums over inclusions, sampling without replacement makes
    sum (n_i - E)^2 / (E (1 - p)) chi-square with 29 degrees of freedom times 30/29; 4 deviations of it are allowed."""
    runs, n, m = 1500, 30, 10
    x, y = torch.arange(float(n))[:, None], torch.zeros(n, dtype=torch.int64)
    hits = np.zeros(n)
    for seed in range(runs):
        buffer = Buffer(m, select=select, seed=seed)
        parts = zip(x.split(7), y.split(7), strict=True) if select == "reservoir" else [(x, y)]
        for part in parts:
            buffer.add(None, [part])
        hits[buffer.sample(m).x[:, 0].long()] += 1
    expected = runs * m / n
    statistic = ((hits - expected) ** 2).sum() / (expected * (1 - m / n)) * (n - 1) / n
    assert abs(statistic - (n - 1)) < 4 * math.sqrt(2 * (n - 1))


def test_a_reservoir_holds_a_stream_of_any_cut():
    """How a stream is cut into parts changes nothing, and late examples have the chance of early ones."""
    x = torch.arange(200.0)[:, None]
    y = torch.arange(200) % 2
    results = []
    for cut in (1, 9, 200):
        buffer = Buffer(5, per="class", select="reservoir", seed=3)
        for a, b in zip(x.split(cut), y.split(cut), strict=True):
            buffer.add(None, [(a, b)])
        assert buffer.counts == {(0, 0): 5, (0, 1): 5}
        assert set(buffer.sample(10).task.tolist()) == {0}
        results.append(kept(buffer))
    assert all(all(row[0] % 2 == label for row in rows) for (_, label), rows in results[0].items())
    total = [Buffer(50, select="reservoir", seed=1) for _ in range(2)]
    total[0].add(None, [(x, y)])
    for part in zip(x.split(13), y.split(13), strict=True):
        total[1].add(None, [part])
    assert kept(total[0]) == kept(total[1])
    assert len(total[0]) == 50


def test_a_reservoir_in_total_takes_targets_of_any_form():
    buffer = Buffer(4, select="reservoir")
    buffer.add(None, [(torch.zeros(6, 5, dtype=torch.int64), torch.rand(6, 5))])
    x, y, _ = buffer.mix(torch.ones(2, 5, dtype=torch.int64), torch.rand(2, 5))
    assert x.shape == y.shape == (4, 5)


@pytest.mark.parametrize("select", [s for s in SELECTIONS if s != "reservoir"])
def test_classes_that_arrive_take_from_the_others_what_was_chosen_last(select):
    """Truth: the same selection under the smaller budget. Of 60 in total two classes have 30 each, four 15, six 10."""
    model = Known(np.random.default_rng(0).normal(size=(6, 3)).tolist())
    shared = Buffer(60, select=select, seed=5)
    before = {}
    for k, m in enumerate((30, 15, 10)):
        shared.add(model, [task(200, labels=(2 * k, 2 * k + 1), seed=k)])
        assert shared.counts == {(t, 2 * t + i): m for t in range(k + 1) for i in range(2)}
        now = kept(shared)
        assert all(now[key] <= rows for key, rows in before.items())
        before = now
    small = Buffer(10, per="class", select=select, seed=5)
    small.add(model, [task(200, labels=(0, 1), seed=0)])
    assert kept(small) == {key: rows for key, rows in before.items() if key[0] == 0}


def test_labels_of_different_tasks_are_different_classes_and_small_classes_are_kept_whole():
    buffer = Buffer(12)
    buffer.add(None, [(torch.zeros(2, 1), torch.tensor([0, 1]))])
    buffer.add(None, [(torch.ones(8, 1), torch.tensor([0, 1]).repeat(4))], task=4)
    assert buffer.counts == {(0, 0): 1, (0, 1): 1, (4, 0): 3, (4, 1): 3}
    assert buffer.tasks == 5
    held = buffer.sample(100)
    assert torch.equal(held.x[:, 0], (held.task == 4).float())


def test_a_selection_that_fails_has_used_up_no_chance():
    buffer = Buffer(3, select="plane")
    before = buffer.state_dict()
    with pytest.raises(ValueError, match=r"The selection `plane` has returned NaN among its keys"):
        buffer.add(LINEAR, [(GOOD[0][0] * math.nan, LABELS)])
    assert torch.equal(before["generator"], buffer.state_dict()["generator"])
    assert len(buffer) == 0


def test_a_selection_of_ones_own():
    def nearest(candidates, count, generator):
        return candidates.x[:, 0].abs().double()

    buffer = Buffer(2, select=nearest)
    buffer.add(None, [(torch.tensor([[4.0], [-1.0], [2.0]]), torch.zeros(3, dtype=torch.int64))])
    assert kept(buffer) == {(0, 0): {(-1.0,), (2.0,)}}


def test_features_are_the_input_of_the_linear_layer_that_is_called_last():
    """A head that is registered first, and dropout, which must be off: herding on what the hook sees is that on the truth."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 2)
            self.body = torch.nn.Linear(3, 4)

        def forward(self, x):
            return {"logits": self.head(F.dropout(torch.tanh(self.body(x)), 0.5, self.training))}

    model, (x, y) = Odd(), task(30, labels=(0,))
    buffer = Buffer(5, select="herding")
    buffer.add(model, zip(x.split(7), y.split(7), strict=True))
    phi = torch.tanh(model.body(x)).detach().double().numpy()
    assert kept(buffer)[0, 0] == {tuple(row) for row in x[herded(phi, 5)].tolist()}
    assert model.training
    assert not model.head._forward_hooks
    other = Buffer(5, select="herding")
    other.add(model, [(x, y)], features=lambda x: x[:, :2])
    assert kept(other)[0, 0] == {tuple(row) for row in x[herded(x[:, :2].double().numpy(), 5)].tolist()}


def test_mixing_appends_examples_of_earlier_tasks_and_says_where_each_comes_from():
    buffer = Buffer(20, seed=2)
    x, y = torch.full((4, 1), -1.0), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(buffer.mix(x, y).x, x)
    assert buffer.mix(x, y, task=3).task.tolist() == [3] * 4
    buffer.add(None, [(torch.arange(20.0)[:, None], torch.ones(20, dtype=torch.int64))])
    mixed = buffer.mix(x, y)
    assert torch.equal(mixed.x[:4], x)
    assert mixed.task.tolist() == [1] * 4 + [0] * 4
    assert mixed.y.tolist() == [0] * 4 + [1] * 4
    assert len(set(mixed.x[4:, 0].tolist())) == 4
    assert len(buffer.mix(x, y, 7).y) == 11
    assert len(buffer.mix(x, y, 0).y) == 4
    assert sorted(buffer.mix(x, y, 99).x[4:, 0].tolist()) == list(range(20))


def test_a_rule_beside_replay_sees_the_gradient_of_the_mixed_batch():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(alpha=1.0)).attach(optimizer)
    buffer = Buffer(8)
    buffer.add(model, [task(20)])
    x, y, _ = buffer.mix(*task(6, seed=1))
    assert len(y) == 12
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    expected = model.weight.grad.clone()
    optimizer.step()
    fisher = memory.state_dict()["state"]["fisher"][0]
    assert torch.equal(fisher, expected.square())


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_buffer_that_was_saved_goes_on_as_if_nothing_had_happened(tmp_path, select):
    model = Known(np.random.default_rng(0).normal(size=(4, 3)).tolist())
    one, two = Buffer(20, select=select, seed=4), Buffer(20, select=select)
    two.load_state_dict(one.state_dict())  # empty, but chance stands elsewhere
    for k in range(2):
        for buffer in (one, two):
            buffer.add(model, [task(50, labels=(2 * k, 2 * k + 1), seed=k)], task=k)
        assert all(torch.equal(a, b) for a, b in zip(one.sample(9), two.sample(9), strict=True))
        one.save(tmp_path / "b")
        two = Buffer(20, select=select, seed=99)
        two.load(tmp_path / "b")
        assert two.nbytes == one.nbytes > 20 * (3 * 4 + 8)
    assert states.load(tmp_path / "b", "buffer")["select"] == select
    with pytest.raises(ValueError, match=r"`.*b`.* buffer"):
        Consolidator(model).load(tmp_path / "b")


@pytest.mark.parametrize("select", SELECTIONS)
def test_examples_kept_in_inference_mode_can_be_trained_on(tmp_path, select):
    model = Known([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with torch.inference_mode():
        buffer, again = Buffer(6, select=select), Buffer(6, select=select)
        buffer.add(model, [task()])
        buffer.save(tmp_path / "buffer")
        again.load(tmp_path / "buffer")
        mixed = again.mix(*(column.clone() for column in task(4, seed=1)), 3)
    for x, y, _ in (buffer.sample(6), again.sample(6), mixed):
        assert not x.is_inference()
        F.cross_entropy(model(x), y).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("select", SELECTIONS)
def test_a_gpu_keeps_what_the_cpu_keeps(tmp_path, select):
    """Integers, so that sums are the same everywhere; a buffer from a file is on the CPU, and its batches need not be."""
    model = Known([[1.0, 2.0, -3.0], [2.0, -1.0, 1.0], [0.0, 1.0, 4.0], [1.0, 1.0, -1.0]])
    here, there = Buffer(12, select=select), Buffer(12, select=select)
    for k in range(2):
        x, y = task(40, labels=(2 * k, 2 * k + 1), seed=k)
        x = (4 * x).round()
        here.add(model.cpu(), [(x, y)])
        there.add(model.cuda(), [(x.cuda(), y.cuda())])
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.sample(12), there.sample(12), strict=True))
        there.save(tmp_path / "b")
        there.load(tmp_path / "b")
    assert {column.device.type for column in there.mix(x.cuda(), y.cuda())} == {"cuda"}


LABELS = torch.zeros(6, dtype=torch.int64)
GOOD = [(torch.rand(6, 3), LABELS)]
LINEAR = Known([[1.0, 0.0, 0.0]])


@pytest.mark.parametrize(("call", "kind", "word"), [
    (lambda b: Buffer(0), ValueError, "size=0"),
    (lambda b: Buffer(2.5), ValueError, "size=2.5"),
    (lambda b: Buffer(3, per="label"), ValueError, "label"),
    (lambda b: Buffer(3, select="best"), ValueError, "herding"),
    (lambda b: Buffer(3).sample(1), ValueError, "The buffer is empty"),
    (lambda b: Buffer(3, select="herding").add(None, GOOD), ValueError, "needs features"),
    (lambda b: Buffer(3, select="plane").add(torch.nn.Flatten(), GOOD), ValueError, "needs features"),
    (lambda b: Buffer(3, select="entropy").add(None, GOOD), ValueError, "a model's output"),
    (lambda b: Buffer(3, select="plane").add(LINEAR, [(GOOD[0][0], LABELS + 1)]), ValueError, "and the label 1"),
    (lambda b: Buffer(3, select="plane").add(LINEAR, GOOD, features=lambda x: x[:, :2]), ValueError, "features of width 2"),
    (lambda b: Buffer(3, select="herding").add(None, GOOD, features=lambda x: x[0]), ValueError, "`features` returned shape"),
    (lambda b: Buffer(3, select=lambda c, n, g: c.x).add(None, GOOD), ValueError, r"keys of shape \(6, 3\)"),
    (lambda b: Buffer(3, select="entropy").add(LINEAR, [(GOOD[0][0] * math.nan, LABELS)]), ValueError, "NaN"),
    (lambda b: b.add(None, GOOD, task=0), ValueError, "label 0 of task 0 are in the buffer already"),
    (lambda b: b.add(None, [(torch.rand(12, 3), torch.arange(12))]), ValueError, "no room for 14 classes"),
    (lambda b: b.add(None, [(torch.rand(6, 4), LABELS)]), ValueError, r"inputs of shape \(4,\)"),
    (lambda b: b.add(None, [(torch.rand(6, 3).double(), LABELS)]), ValueError, "float64"),
    (lambda b: b.mix(torch.rand(6, 4), LABELS), ValueError, r"inputs of shape \(4,\)"),
    (lambda b: b.add(None, [(torch.rand(6, 3), torch.rand(6))]), ValueError, "labels of shape"),
    (lambda b: b.add(None, []), ValueError, "no examples"),
    (lambda b: b.add(None, [torch.rand(3)]), TypeError, "pairs of input and label"),
    (lambda b: b.add(None, [(torch.rand(6, 3), LABELS[:5])]), TypeError, "pairs of input and label"),
    (lambda b: b.add(None, (torch.rand(6, 3), LABELS)), TypeError, "a tuple of tensors"),
    (lambda b: b.load_state_dict(Buffer(11).state_dict()), ValueError, "size 11"),
    (lambda b: b.load_state_dict(b.state_dict() | {"generator": torch.zeros(3)}), ValueError, "damaged"),
    (lambda b: b.load_state_dict(b.state_dict() | {"held": {"x": LABELS}}), ValueError, "damaged"),
    (lambda b: b.load_state_dict(b.state_dict() | {"held": {**b.state_dict()["held"], "y": LABELS}}), ValueError, "belong"),
])  # fmt: skip
def test_mistakes_are_named_and_change_nothing(call, kind, word):
    buffer = Buffer(10)
    buffer.add(None, [task(20)])
    before = buffer.state_dict()
    with pytest.raises(kind, match=rf"(?s){word}") as caught:
        call(buffer)
    assert str(caught.value).endswith(".")
    after = buffer.state_dict()
    assert all(torch.equal(before["held"][k], after["held"][k]) for k in before["held"])
    assert torch.equal(before["generator"], after["generator"])


@pytest.mark.parametrize("angle", [10.0, 80.0, 100.0, 170.0])
def test_a_gem_projects_by_the_formula(angle):
    """g - (g.r / r.r) r in float64 NumPy, on two tensors that are one vector."""
    generator = np.random.default_rng(0)
    r, other = generator.normal(size=(2, 7))
    other -= other @ r / (r @ r) * r
    turn = np.radians(angle)
    g = np.cos(turn) * r / np.linalg.norm(r) + np.sin(turn) * other / np.linalg.norm(other)
    grad = [torch.tensor(g[:4]).view(2, 2), torch.tensor(g[4:])]
    project_(grad, [torch.tensor(r[:4]).view(2, 2), torch.tensor(r[4:])])
    expected = g if g @ r >= 0 else g - (g @ r) / (r @ r) * r
    np.testing.assert_allclose(torch.cat([t.flatten() for t in grad]).numpy(), expected, rtol=1e-13, atol=1e-15)
    assert (angle < 90) == bool(np.array_equal(expected, g))


def test_a_gem_by_hand_and_without_a_reference():
    grad = [torch.tensor([1.0, -1.0])]
    project_(grad, [torch.tensor([0.0, 2.0])])
    assert grad[0].tolist() == [1.0, 0.0]
    project_(grad, [torch.zeros(2)])
    assert grad[0].tolist() == [1.0, 0.0]


def test_an_empty_buffer_is_a_buffer():
    assert bool(Buffer(3))
    assert len(Buffer(3)) == 0
