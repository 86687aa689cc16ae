"""Each rule against its paper's equation, computed in float64 NumPy or by hand."""

import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import Heads, MeanSquares, batches, mlp, train
from oracle import softmax_gradient, softmax_squares
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, OnlineEWC, RWalk, TaskFisher
from rwalk.anchors import ElementwiseAnchor
from rwalk.rules.base import TaskEnd

RATE = 0.05


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(5, 3).double()


def numpy(model):
    return [p.detach().numpy().copy() for p in model.parameters()]


def data(seed, size=11):
    ((x, y),) = batches(seed, 1, size=size)
    return x, y, [(torch.as_tensor(x[:7]), torch.as_tensor(y[:7])), (torch.as_tensor(x[7:]), torch.as_tensor(y[7:]))]


def close(ours, truth, rtol=1e-9):
    np.testing.assert_allclose(ours.detach().numpy(), truth, rtol=rtol, atol=1e-14)


def probabilities(weight, bias, x):
    z = x @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def exact_fisher(weight, bias, x):
    """Sum over classes of p(c) times the squared gradient of log p(c), mean over examples."""
    p = probabilities(weight, bias, x)
    total = [np.zeros_like(weight), np.zeros_like(bias)]
    for i in range(len(x)):
        for c in range(len(bias)):
            one = [g**2 for g in softmax_gradient(weight, bias, x[i : i + 1], np.array([c]))]
            total = [t + p[i, c] * g / len(x) for t, g in zip(total, one, strict=True)]
    return total


def omegas(memory):
    return list(memory.anchor.omega.values())


@pytest.mark.parametrize("labels", ["exact", "true"])
def test_ewc_measures_the_fisher_information(labels):
    model = linear()
    memory = Consolidator(model, EWC(labels=labels))
    x, y, loader = data(0)
    memory.estimate(loader)
    truth = exact_fisher(*numpy(model), x) if labels == "exact" else softmax_squares(*numpy(model), x, y)
    for ours, expected in zip(omegas(memory), truth, strict=True):
        close(ours, expected)


def test_sampled_labels_agree_with_exact_ones_in_the_mean():
    model = linear()
    x, _, loader = data(0)
    truth = exact_fisher(*numpy(model), x)
    mean = [np.zeros_like(t) for t in truth]
    for _ in range(300):
        memory = Consolidator(model, EWC(labels="sample"))
        memory.estimate(loader)
        torch.rand(1)  # the measurement leaves the random state alone, so each round has to move it
        mean = [m + o.numpy() / 300 for m, o in zip(mean, omegas(memory), strict=True)]
    for ours, expected in zip(mean, truth, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0.35, atol=0.02)


def test_ewc_over_tasks_is_the_sum_of_their_quadratics():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory = Consolidator(model, EWC(labels="true"), strength=0.3).attach(optimizer)
    kept = []
    for task in range(3):
        train(model, optimizer, batches(task, 9))
        x, y, loader = data(task + 50)
        kept.append((numpy(model), softmax_squares(*numpy(model), x, y)))
        memory.consolidate(loader)

    def quadratics(theta):
        return 0.3 * sum((f * (t - a) ** 2).sum() for at, fs in kept for t, a, f in zip(theta, at, fs, strict=True))

    differences = []
    for seed in range(4):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        differences.append(float(memory.penalty()) - quadratics(numpy(model)))
    np.testing.assert_allclose(differences, differences[0], rtol=1e-9)
    assert memory.state_bytes == 2 * sum(p.numel() * 8 for p in model.parameters())


def test_merging_keeps_the_newer_point_where_nothing_matters():
    old = ElementwiseAnchor({"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([0.0, 2.0, 3.0])})
    merged = old.merge({"w": torch.tensor([5.0, 5.0, 5.0])}, [torch.tensor([0.0, 0.0, 1.0])])
    assert merged.point["w"].tolist() == [5.0, 1.0, 2.0]
    assert merged.omega["w"].tolist() == [0.0, 2.0, 4.0]


def test_online_ewc_decays():
    model = linear()
    memory = Consolidator(model, OnlineEWC(labels="true", gamma=0.25))
    expected = 0
    for task in range(3):
        x, y, loader = data(task)
        memory.consolidate(loader)
        expected = 0.25 * expected + softmax_squares(*numpy(model), x, y)[0]
    close(memory.anchor.omega["weight"], expected)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_mas_is_the_mean_absolute_gradient_of_the_squared_output(decay):
    model = linear()
    memory = Consolidator(model, MAS(decay=decay))
    expected = [0, 0]
    for task in range(2):
        x, _, loader = data(task)
        memory.consolidate(loader)
        weight, bias = numpy(model)
        f = x @ weight.T + bias
        fresh = [np.abs(2 * f[:, :, None] * x[:, None, :]).mean(0), np.abs(2 * f).mean(0)]
        expected = [decay * e + n for e, n in zip(expected, fresh, strict=True)]
    for ours, truth in zip(omegas(memory), expected, strict=True):
        close(ours, truth)


def test_samples_caps_the_examples():
    model = linear()
    x, y, loader = data(0)
    for rule, truth in ((EWC(labels="true", samples=5), softmax_squares(*numpy(model), x[:5], y[:5])[0]),
                        (EWC(samples=8), exact_fisher(*numpy(model), x[:8])[0])):  # fmt: skip
        memory = Consolidator(model, rule)
        memory.estimate(loader)
        close(memory.anchor.omega["weight"], truth)


@pytest.mark.parametrize("toward", ["last", "first"])
def test_l2_holds_to_the_last_or_the_pretrained_weights(toward):
    model = linear()
    start = numpy(model)
    memory = Consolidator(model, L2(toward=toward), strength=0.1)
    memory.estimate()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory.attach(optimizer)
    train(model, optimizer, batches(0, 5))
    memory.consolidate()
    close(memory.anchor.point["weight"], start[0] if toward == "first" else model.weight.detach().numpy())
    assert (memory.anchor.omega["weight"] == 1).all()


def stored_path(theta, momentum, stream, strength=0.0, omega=None, point=None):
    """Train by SGD in NumPy, storing the parameters of every step; return the path integral and the move."""
    velocity = [np.zeros_like(t) for t in theta]
    path = [np.zeros_like(t) for t in theta]
    start = [t.copy() for t in theta]
    for x, y in stream:
        grad = softmax_gradient(*theta, x, y)
        for i, t in enumerate(theta):
            pull = 0 if omega is None else 2 * strength * omega[i] * (t - point[i])
            velocity[i] = momentum * velocity[i] + grad[i] + pull
            before = t.copy()
            t -= RATE * velocity[i]
            path[i] -= grad[i] * (t - before)
    return path, [t - s for t, s in zip(theta, start, strict=True)]


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_si_over_three_tasks(momentum):
    model = linear()
    theta = numpy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
    memory = Consolidator(model, SI(xi=0.02), strength=0.5).attach(optimizer)
    omega, point = None, None
    for task, steps in enumerate((150, 64, 7)):
        optimizer.state.clear()
        train(model, optimizer, batches(task, steps))
        memory.consolidate()
        path, move = stored_path(theta, momentum, batches(task, steps), 0.5, omega, point)
        fresh = [np.maximum(p / (d**2 + 0.02), 0) for p, d in zip(path, move, strict=True)]
        omega = fresh if omega is None else [o + f for o, f in zip(omega, fresh, strict=True)]
        point = [t.copy() for t in theta]
        for ours, expected in zip(omegas(memory), omega, strict=True):
            close(ours, expected, rtol=1e-8)


def test_the_path_is_exact_over_ten_thousand_steps():
    """Float32 against float64 on one and the same sequence of gradients and parameters."""
    torch.manual_seed(0)
    size, steps = 64, 10_000
    theta = torch.nn.Parameter(torch.randn(size))
    model = torch.nn.ParameterList([theta])
    optimizer = torch.optim.SGD([theta], lr=0.01)
    memory = Consolidator(model, SI()).attach(optimizer)
    truth, naive = torch.zeros(size, dtype=torch.float64), torch.zeros(size)
    drift = torch.randn(size) * 1e-3
    for _ in range(steps):
        theta.grad = torch.randn(size) * 0.1 + drift
        before = theta.detach().clone()
        optimizer.step()
        truth -= theta.grad.double() * (theta.detach().double() - before.double())
        naive -= theta.grad * (theta.detach() - before)
    path = memory.state_dict()["state"]["path"][0]
    ours = float((path - truth).norm() / truth.norm())
    stored = float((naive - truth).norm() / truth.norm())
    assert ours < 3 * stored + 1e-6, (ours, stored)


@pytest.mark.parametrize("alpha", [0.9, 0.1])
@pytest.mark.parametrize("fisher", ["batch", "example"])
@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
def test_ewcpp(alpha, fisher):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory = Consolidator(model, EWCpp(alpha=alpha, fisher=fisher), strength=0.0).attach(optimizer)
    theta, running = numpy(model), None
    for task, steps in enumerate((8, 3, 12)):
        for x, y in batches(task, steps):
            fresh = descend(theta, x, y, fisher)
            running = fresh if running is None else [alpha * f + (1 - alpha) * r for f, r in zip(fresh, running, strict=True)]
        train(model, optimizer, batches(task, steps))
        memory.consolidate()
        for ours, expected in zip(omegas(memory), running, strict=True):
            close(ours, expected)


def descend(theta, x, y, fisher):
    """Make a step of plain gradient descent in NumPy; return the squared gradient, the batch's or its examples'."""
    grad = softmax_gradient(*theta, x, y)
    squares = softmax_squares(*theta, x, y) if fisher == "example" else [g**2 for g in grad]
    for t, g in zip(theta, grad, strict=True):
        t -= RATE * g
    return squares


@pytest.mark.parametrize("fisher", ["batch", "example"])
def test_the_diagonal_recipe_sums_each_tasks_mean_in_its_own_unit(fisher):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory = Consolidator(model, TaskFisher(fisher=fisher), strength=0.0, average="none").attach(optimizer)
    theta, omega, before = numpy(model), None, None
    for task, (steps, length) in enumerate(((8, 8), (3, 5.5), (12, 23 / 3))):
        squares = [descend(theta, x, y, fisher) for x, y in batches(task, steps)]
        mean = [np.mean(each, axis=0) for each in zip(*squares, strict=True)]
        new = [m / (np.concatenate([m.ravel() for m in mean]).mean() * length**0.5) for m in mean]
        omega = new if omega is None else [o * (before / length) ** 0.5 + n for o, n in zip(omega, new, strict=True)]
        before = length
        train(model, optimizer, batches(task, steps))
        memory.consolidate()
        for ours, expected in zip(omegas(memory), omega, strict=True):
            close(ours, expected)


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
def test_on_a_quadratic_with_small_steps_the_path_sums_to_the_loss_removed():
    for rule, score in ((SI(xi=1e9), 1e9), (RWalk(eps=1e9), 1e9)):
        model = torch.nn.Linear(6, 1, bias=False).double()
        curvature = torch.linspace(0.5, 3, 6).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        memory = Consolidator(model, rule, strength=0.0).attach(optimizer)

        def loss(model=model, curvature=curvature):
            return 0.5 * (curvature * model.weight**2).sum()

        before = float(loss().detach())
        for _ in range(300):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        memory.consolidate()
        raw = memory.anchor.omega["weight"] if isinstance(rule, SI) else memory.state_dict()["state"]["total"][0]
        assert float(raw.sum()) * score == pytest.approx(before - float(loss().detach()), rel=1e-3)


class Spoilt(EWC):
    """A rule of one's own whose `conclude` does something else to what EWC has concluded."""

    spoil = staticmethod(lambda anchor, state: (anchor, state))

    def conclude(self, state, end):
        return self.spoil(*super().conclude(state, end))


@pytest.mark.parametrize(("spoil", "kind", "said"), [
    (lambda a, s: (replaced(a, math.nan), s), ValueError, r"importance of `weight` is missing, negative, not finite"),
    (lambda a, s: (replaced(a, -1.0), s), ValueError, r"importance of `weight` is missing, negative, not finite"),
    (lambda a, s: (ElementwiseAnchor(a.point, dict([*a.omega.items()][:1])), s), ValueError, "importance of `bias` is missing"),
    (lambda a, s: (a.omega, s), TypeError, "must return an anchor and the state for the next task, but returned `tuple` of"),
    (lambda a, s: a, TypeError, "must return an anchor and the state for the next task, but returned `ElementwiseAnchor`"),
    (lambda a, s: (a, (1, 2)), ValueError, r"must return a state like that of `init`, .* but returned `tuple` of \(a value"),
])  # fmt: skip
def test_what_a_rule_of_ones_own_concludes_is_checked_before_anything_changes(monkeypatch, spoil, kind, said):
    monkeypatch.setattr(Spoilt, "spoil", staticmethod(spoil))
    model, (_, _, loader) = linear(), data(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory = Consolidator(model, Spoilt()).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    with pytest.raises(kind, match=rf"`Spoilt\.conclude` .*{said}"):
        memory.consolidate(loader)
    assert (memory.tasks, memory.anchor.point) == (0, {})
    monkeypatch.setattr(Spoilt, "spoil", staticmethod(lambda anchor, state: (anchor, state)))
    memory.consolidate(loader)
    assert memory.tasks == 1


def replaced(anchor, value):
    """An anchor with one number of an importance replaced."""
    anchor.omega["weight"][0, 0] = value
    return anchor


def test_an_anchor_new_to_a_parameter_joins_without_decay():
    anchor = ElementwiseAnchor({"a": torch.ones(1)}, {"a": torch.ones(1)})
    point = {"a": torch.zeros(1), "b": torch.zeros(2)}
    finish = TaskEnd(
        point, point, anchor, lambda objective, of, samples=None: [of(torch.full_like(p, -2.0)) for p in point.values()]
    )
    for rule, expected in ((OnlineEWC(gamma=0.5), [4.5, 4.0]), (MAS(decay=0.5), [2.5, 2.0]), (EWC(), [5.0, 4.0])):
        result, _ = rule.conclude(rule.init(list(point.values())), finish)
        assert [result.omega[n][0].item() for n in ("a", "b")] == expected


@pytest.mark.parametrize("make", [
    lambda: EWC(labels="both"), lambda: EWC(samples=0), lambda: OnlineEWC(gamma=1.5), lambda: OnlineEWC(labels="none"),
    lambda: MAS(decay=-1.0), lambda: MAS(samples=-3), lambda: SI(xi=0.0), lambda: SI(xi=math.nan), lambda: L2(toward="middle"),
    lambda: EWCpp(alpha=2.0), lambda: EWCpp(alpha="mean"), lambda: EWCpp(fisher="one"), lambda: TaskFisher(fisher="one"),
    lambda: RWalk(fisher="one"),
])  # fmt: skip
def test_fields_out_of_range(make):
    with pytest.raises(ValueError, match=r"`\w+` of \w+ must be .*, but is "):
        make()


def test_an_error_while_measuring_leaves_weights_statistics_and_anchor_as_they_were():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    memory = Consolidator(model, EWC(), average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, _, _ = data(0)
    with pytest.raises(ValueError, match=r"needs data.*consolidate\(loader\)"):
        memory.consolidate()
    for broken in ([object()], [(torch.as_tensor(x), torch.zeros(11))], [(torch.as_tensor(x), torch.zeros(11).long()), 3]):
        with pytest.raises((ValueError, TypeError), match=r"The data yield|one class index|number of rows for each example"):
            memory.consolidate(broken, logits=lambda output: output.unsqueeze(0))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert memory.tasks == 0
    assert len(memory.anchor) == 0
    memory.consolidate([(torch.as_tensor(x), torch.zeros(11).long())])
    assert len(memory.anchor) == 6


def example_fisher(prepare, steps=1, strict=False):
    """Rule after a few steps of EWC++ with per-example squares; `prepare` makes the gradients of a step."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    memory = Consolidator(model, MeanSquares(fisher="example"), strict=strict).attach(optimizer)
    for x, y in batches(0, steps):
        optimizer.zero_grad()
        prepare(model, optimizer, torch.as_tensor(x), torch.as_tensor(y))
        optimizer.step()
    memory.consolidate()
    return omegas(memory)


def plain(model, optimizer, x, y):
    torch.nn.functional.cross_entropy(model(x), y).backward()


def scaled(model, optimizer, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)


def clipped(model, optimizer, x, y):
    plain(model, optimizer, x, y)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def dropped(model, optimizer, x, y):
    plain(model, optimizer, 100 * x, y)
    optimizer.zero_grad()
    plain(model, optimizer, x, y)


def explained(model, optimizer, x, y):
    inputs = (50 * x).requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)
    plain(model, optimizer, x, y)


def zeroed(model, optimizer, x, y):
    plain(model, optimizer, 100 * x, y)
    optimizer.zero_grad(set_to_none=False)
    plain(model, optimizer, x, y)


def explained_late(model, optimizer, x, y):
    plain(model, optimizer, x, y)
    inputs = (50 * x).requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)


@pytest.mark.parametrize("prepare", [dropped, explained])
def test_passes_whose_gradient_was_thrown_away_leave_nothing(prepare):
    for ours, expected in zip(example_fisher(prepare, steps=3, strict=True), example_fisher(plain, steps=3), strict=True):
        close(ours, expected.numpy())


def test_per_example_squares_follow_loss_scaling_and_clipping_by_norm():
    truth = example_fisher(plain, steps=3)
    for ours, expected in zip(example_fisher(scaled, steps=3), truth, strict=True):
        close(ours, expected.numpy())
    model = mlp()
    x, y = (torch.as_tensor(t) for t in batches(0, 1)[0])
    plain(model, None, x, y)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    for ours, expected in zip(example_fisher(clipped), example_fisher(plain), strict=True):
        close(ours, expected.numpy() * (1e-2 / norm) ** 2, rtol=1e-4)  # clipping itself adds 1e-6 to the norm


@pytest.mark.parametrize("prepare", [zeroed, explained_late])
def test_passes_that_the_gradient_does_not_hold_fall_back_to_the_batch_with_a_warning(prepare):
    with pytest.warns(UserWarning, match="do not sum to the gradient in use") as caught:
        ours = example_fisher(prepare, steps=2)
    assert len(caught) == 1
    squares = [torch.zeros_like(o) for o in ours]
    for x, y in batches(0, 2):
        torch.manual_seed(0)
        model = mlp()
        plain(model, None, torch.as_tensor(x), torch.as_tensor(y))
        squares = [s + p.grad**2 / 2 for s, p in zip(squares, model.parameters(), strict=True)]
    for o, expected in zip(ours, squares, strict=True):
        close(o, expected.numpy())
    with pytest.raises(RuntimeError, match="do not sum"):
        example_fisher(prepare, strict=True)


class Sequence(torch.nn.Module):
    """Rows of five numbers, which its layers see with time first."""

    def __init__(self, encoder=False):
        super().__init__()
        self.encoder = torch.nn.TransformerEncoderLayer(5, 1, 4, 0.0) if encoder else torch.nn.Linear(5, 5)
        self.norm, self.head = torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.encoder(x.transpose(0, 1)))).mean(0))


class Shared(torch.nn.Module):
    """An autoencoder whose second half is the first one's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 4), torch.nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(F.linear(torch.tanh(self.first(x)), self.first.weight.T))


class Unbiased(torch.nn.Module):
    """Convolution, table and layer, without a bias."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 6, padding_idx=0)
        self.conv = torch.nn.Conv1d(1, 2, 2, bias=False)
        self.last = torch.nn.Linear(14, 3, bias=False)
        self.double()

    def forward(self, x):
        tokens = (x * 4).long().abs().clamp(max=8)
        return self.last(torch.cat([self.conv(x.unsqueeze(1)).flatten(1), self.table(tokens).mean(1)], 1).tanh())


def unbiased():
    return torch.nn.Sequential(torch.nn.Linear(5, 7, False), torch.nn.Tanh(), torch.nn.Linear(7, 3, False)).double()


def overridden():
    model = mlp()
    model[0].forward = lambda x: F.linear(x, 2 * model[0].weight, model[0].bias)
    return model


def frozen_rows():
    model = mlp()
    model[2].weight.register_hook(lambda g: g * torch.tensor([[0.0], [1.0], [1.0]]))
    return model


def objective(model, x, y):
    return F.cross_entropy(model(x), y)


def decayed(model, x, y):
    return objective(model, x, y) + model[0].weight.square().sum()


def data_of(steps=3, shape=(5,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, *shape, generator=generator).double(), torch.randint(3, (6,), generator=generator))
        for _ in range(steps)
    ]


def example_truth(model, stream, loss=objective):
    """Means over steps of the squared gradients of examples, each alone, and of the batch, in the order of the parameters."""
    theta = list(model.parameters())
    each, whole = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    for x, y in stream:
        for i in range(len(x)):
            for total, g in zip(each, torch.autograd.grad(loss(model, x[i : i + 1], y[i : i + 1]), theta), strict=True):
                total += g.square() / len(x) / len(stream)
        for total, g in zip(whole, torch.autograd.grad(loss(model, x, y), theta), strict=True):
            total += g.square() / len(stream)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, each, strict=True)), dict(zip(names, whole, strict=True))


def example_steps(model, stream, loss=objective, change=lambda model: None):
    """Importance of EWC++ over steps that move nothing; and its consolidator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    memory = Consolidator(model, MeanSquares(fisher="example")).attach(optimizer)
    for x, y in stream:
        optimizer.zero_grad()
        loss(model, x, y).backward()
        change(model)
        optimizer.step()
    memory.consolidate()
    return memory.anchor.omega


@pytest.mark.parametrize(
    ("make", "loss", "odd"),
    [
        (Shared, objective, {"first.weight"}),
        (overridden, objective, {"0.weight"}),
        (mlp, decayed, {"0.weight"}),
        (frozen_rows, objective, {"2.weight"}),
    ],
)
def test_a_parameter_whose_gradient_is_more_than_its_layers_is_told_from_all_others(make, loss, odd):
    model = make()
    each, whole = example_truth(model, data_of(), loss)
    with pytest.warns(UserWarning, match="does not sum to its gradient") as caught:
        ours = example_steps(model, data_of(), loss)
    (said,) = (str(w.message) for w in caught)
    assert {name for name in ours if f"`{name}`" in said} == odd
    for name, omega in ours.items():
        close(omega, (whole if name in odd else each)[name].numpy())


@pytest.mark.filterwarnings("ignore:The per-example gradients of some modules.*MultiheadAttention")
@pytest.mark.parametrize("encoder", [False, True])
def test_layers_with_time_first_are_told_where_it_is_as_long_as_the_batch(encoder):
    model, stream = Sequence(encoder), data_of(shape=(6, 5))
    each, whole = example_truth(model, stream)
    with pytest.warns(UserWarning, match="is 6 where the model is given 2 examples"):
        ours = example_steps(model, stream)
    for name, omega in ours.items():
        close(omega, (each if name.startswith("head") else whole)[name].numpy())


@pytest.mark.filterwarnings("ignore:Another memory has learned")
@pytest.mark.parametrize("make", [unbiased, Unbiased])
def test_without_a_bias_scale_and_clipping_are_followed(make):
    model = make()
    each, _ = example_truth(model, data_of())
    for ours, truth in zip(example_steps(model, data_of()).values(), each.values(), strict=True):
        close(ours, truth.numpy())

    def quarter(model):
        for p in model.parameters():
            p.grad.mul_(0.25)

    for ours, truth in zip(example_steps(model, data_of(), change=quarter).values(), each.values(), strict=True):
        close(ours, truth.numpy() / 16)


@pytest.mark.parametrize("make", [unbiased, Unbiased])
def test_without_a_bias_a_dropped_pass_is_noticed_at_a_later_step(make):
    model, stream = make(), data_of()
    each, whole = (example_truth(model, part) for part in (stream[:2], stream[2:]))

    def late(model, x, y):
        if x is stream[2][0]:
            objective(model, 3 * x.flip(0), y).backward()
            model.zero_grad(set_to_none=False)
        return objective(model, x, y)

    with pytest.warns(UserWarning, match="do not sum to the gradient in use"):
        ours = example_steps(model, stream, late)
    for name, omega in ours.items():
        close(omega, (each[0][name] * 2 / 3 + whole[1][name] / 3).numpy())


def test_each_task_begins_with_a_look_at_all_parameters():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    memory = Consolidator(model, MeanSquares(fisher="example"), 0.0).attach(optimizer)
    for loss, warned in ((objective, 0), (decayed, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, y in data_of():
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
            memory.consolidate()
        assert len(caught) == warned


def test_a_hook_on_all_modules_leaves_the_square_of_the_batch():
    model = mlp()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: out.sin() if m is model[0] else None)
    with hook:
        _, whole = example_truth(model, data_of())
        with pytest.warns(UserWarning, match="a forward hook on all modules") as caught:
            ours = example_steps(model, data_of())
    assert len(caught) == 1
    for omega, truth in zip(ours.values(), whole.values(), strict=True):
        close(omega, truth.numpy())


def test_gradients_are_checked_beside_training_and_a_script_is_refused_in_plain_words():
    model, x = mlp(), torch.randn(4, 5).double().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    memory = Consolidator(model, MeanSquares(fisher="example")).attach(optimizer)
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradgradcheck(model, (x,))
    each, _ = example_truth(model, data_of(1))
    optimizer.zero_grad()
    objective(model, *data_of(1)[0]).backward()
    optimizer.step()
    memory.consolidate()
    for omega, truth in zip(memory.anchor.omega.values(), each.values(), strict=True):
        close(omega, truth.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(AttributeError, match=r"`torch.jit.script`.*Call `detach\(\)` before"):
            torch.jit.script(model)
        memory.detach()
        assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("rule", [EWCpp(alpha=0.5), TaskFisher()], ids=repr)
def test_a_tensor_that_takes_no_part_in_a_task_adds_nothing_to_a_running_fisher_information(rule):
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule, 1.0, average="none").attach(optimizer)
    train(model, optimizer, batches(0, 5))
    memory.consolidate()
    before = {name: omega.clone() for name, omega in memory.anchor.omega.items()}
    memory.consolidate()
    assert all(torch.equal(omega, before[name]) for name, omega in memory.anchor.omega.items())
    model.on = 1
    train(model, optimizer, batches(1, 5))
    memory.consolidate()
    assert torch.equal(memory.anchor.omega["heads.0.weight"], before["heads.0.weight"])
    assert not torch.equal(memory.anchor.omega["trunk.weight"], before["trunk.weight"])


def test_a_file_with_two_rules_is_refused(monkeypatch):
    """Truth: a module as if it lay among the rules; one of its two would be lost."""
    import rwalk.rules as found

    module = types.ModuleType("rwalk.rules.two")
    for name in ("One", "Two"):
        setattr(module, name, type(name, (EWC,), {"__module__": module.__name__}))
    assert found._rules_of("ewc", sys.modules["rwalk.rules.ewc"]) == [EWC]
    with pytest.raises(ImportError, match=r"`two.py` has the rules One, Two. Give each a file of its own"):
        found._rules_of("two", module)
