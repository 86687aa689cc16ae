"""A weight that an embedding and linear layers share, against second moments that are written out here, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import assert_same_state
from rwalk import EWC, Consolidator, Kronecker
from rwalk.anchors import ElementwiseAnchor

V, WIDTH, LENGTH = 7, 4, 3
NAME = "embedding.weight"
EXACT = Kronecker(rank=None, share=1.0, m=1, every=1)
ESTIMATED = 300**0.5  # a task that was only estimated counts for 300 steps


class Model(nn.Module):
    """A language model: an embedding, a layer with tanh, and a head with the weight of the embedding."""

    def __init__(self, tokens=V, width=WIDTH, bias=False, functional=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tokens, width, **options)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens, bias=bias)
        self.head.weight = self.embedding.weight
        self.functional = functional
        self.double()

    def forward(self, x):
        h = torch.tanh(self.hidden(self.embedding(x)))
        return F.linear(h, self.head.weight) if self.functional else self.head(h)


def mean_loss(z, y):
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def tokens(seed, examples=5, most=V):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(most, (2, examples, LENGTH), generator=generator)
    return x, y


def only_shared(model):
    """Let the shared weight alone learn."""
    model.hidden.requires_grad_(False)
    return model


def step(model, optimizer, *batches):
    """Make one step on micro-batches."""
    optimizer.zero_grad()
    for x, y in batches:
        (mean_loss(model(x), y) / len(batches)).backward()
    optimizer.step()


def trained(model, steps, rule=EXACT, lr=0.0, strength=0.1):
    """Train a task, each step on micro-batches; return the consolidator and the optimiser."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    memory = Consolidator(model, rule, strength, average="none").attach(optimizer)
    for batches in steps:
        step(model, optimizer, *batches)
    return memory, optimizer


class Sums:
    """Sums over batches of (tokens, d d^T at the embedding, h h^T, squares at the logits), written out row by row."""

    def __init__(self, size=V, width=WIDTH):
        self.counts, self.squares = torch.zeros(2, size).double()
        self.deltas, self.hidden = torch.zeros(2, width, width).double()
        self.rows = self.padding = self.examples = 0

    def add(self, model, x, y):
        w = model.embedding.weight.detach()
        e = w[x].requires_grad_()
        h = torch.tanh(model.hidden(e))
        z = (h @ w.T) if model.head.bias is None else h @ w.T + model.head.bias.detach()
        d, g = torch.autograd.grad(mean_loss(z, y) * len(x), [e, z])
        self.examples += len(x)
        for token, dd, hh, gg in zip(x.flatten(), d.flatten(0, 1), h.detach().flatten(0, 1), g.flatten(0, 1), strict=True):
            self.rows += 1
            self.hidden += torch.outer(hh, hh)
            self.squares[: len(gg)] += gg**2
            if token == model.embedding.padding_idx:
                self.padding += 1
            else:
                self.counts[token] += 1
                self.deltas += torch.outer(dd, dd)
        return self

    def matrices(self):
        """The diagonal over tokens, the other matrix, and the trace of the sum of both Kronecker products."""
        a, g = self.counts / (self.rows - self.padding), self.deltas / self.examples
        h, z = self.hidden / self.rows, self.squares / self.examples
        total = a.sum() * g.trace() + z.sum() * h.trace()
        return (a * g.trace() + z * h.trace()) / total, g * a.sum() + h * z.sum(), total


def assert_held(memory, sums, steps=1):
    """Compare the shared weight, the only one that is held in layers, with the sums."""
    a, g, total = sums.matrices()
    assert float(total) == pytest.approx(float(a.sum() * g.trace()))
    assert set(memory.anchor.layers) == {NAME}
    assert NAME not in memory.anchor.omega
    layer = memory.anchor.layers[NAME]
    assert layer.inputs.basis.numel() == 0  # a diagonal is kept as one
    assert torch.allclose(layer.inputs.diagonal()[0], a, rtol=1e-9, atol=1e-12)
    unit = total / (len(a) * len(g)) * steps**0.5
    assert torch.allclose(layer.outputs.matrix()[0] * unit, g, rtol=1e-9, atol=1e-12 * float(g.max()))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"bias": True}], ids=str)
def test_one_product_of_the_traces_of_both_uses(options):
    model = only_shared(Model(**options))
    memory, _ = trained(model, [[tokens(1)]])
    memory.consolidate()
    assert_held(memory, Sums().add(model, *tokens(1)))
    assert ("head.bias" in memory.anchor.omega) == ("bias" in options)


def test_micro_batches_and_steps_add_up():
    model = only_shared(Model())
    memory, _ = trained(model, [[tokens(1), tokens(2)], [tokens(3), tokens(4)]])
    memory.consolidate()
    sums = Sums()
    for seed in range(1, 5):
        sums.add(model, *tokens(seed))
    assert_held(memory, sums, 2)


@pytest.mark.parametrize("size", [5, 2])
def test_over_data_as_in_training(size):
    """With the data's own labels; several batches are several parts of the same sum."""
    model, (x, y) = only_shared(Model()), tokens(1)
    memory = Consolidator(model, Kronecker(measure="data", rank=None, share=1.0, labels="true"))
    memory.estimate(list(zip(x.split(size), y.split(size), strict=True)), loss=mean_loss)
    assert_held(memory, Sums().add(model, x, y), 300)
    assert not any(m._forward_hooks for m in model.modules())


class Last(Model):
    """A model that predicts one token from the last one it is given, and has seen the others."""

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embedding(x))).mean(1))


def test_over_data_with_every_label_by_its_probability():
    model, (x, _) = only_shared(Last()), tokens(1)
    memory = Consolidator(model, Kronecker(measure="data", rank=None, share=1.0, labels="exact"))
    memory.estimate([(x, x[:, 0])])
    w = model.embedding.weight.detach()
    e = w[x].requires_grad_()
    h = torch.tanh(model.hidden(e)).mean(1)
    p = (h @ w.T).softmax(-1)
    counts, deltas = torch.bincount(x.flatten(), minlength=V) / x.numel(), torch.zeros(WIDTH, WIDTH).double()
    for c in range(V):
        (d,) = torch.autograd.grad(p[:, c].log().sum(), e, retain_graph=True)
        deltas += torch.einsum("n,nli,nlj->ij", p[:, c].detach(), d, d) / len(x)
    hidden, squares = (h.T @ h).detach() / len(x), (p - p**2).detach().mean(0)
    total = deltas.trace() + squares.sum() * hidden.trace()
    layer = memory.anchor.layers[NAME]
    a = (counts * deltas.trace() + squares * hidden.trace()) / total
    assert torch.allclose(layer.inputs.diagonal()[0], a, rtol=1e-9)
    unit = total / (V * WIDTH) * ESTIMATED
    assert torch.allclose(layer.outputs.matrix()[0] * unit, deltas + hidden * squares.sum(), rtol=1e-9)


@pytest.mark.parametrize("writes", [True, False])
def test_a_model_that_only_reads_or_only_writes_with_the_weight(writes):
    model, (x, y) = only_shared(Model()), tokens(1)
    memory, optimizer = trained(model, [])
    vectors = torch.randn(5, LENGTH, WIDTH).double()
    model.forward = lambda v: (model.head if writes else model.embedding)(v)
    mean_loss(model(vectors if writes else x), y % WIDTH).backward()
    optimizer.step()
    memory.consolidate()
    layer = memory.anchor.layers[NAME]
    if writes:
        flat = vectors.flatten(0, 1)
        assert torch.allclose(_normed(layer.outputs.matrix()[0]), _normed(flat.T @ flat), rtol=1e-9)
    else:
        counts = torch.bincount(x.flatten(), minlength=V).double()
        assert torch.allclose(layer.inputs.diagonal()[0], counts / x.numel(), rtol=1e-9)


def _normed(matrix):
    return matrix / matrix.trace()


def test_tasks_are_joined_as_those_of_all_layers():
    model = only_shared(Model())
    memory, optimizer = trained(model, [[tokens(1)]])
    memory.consolidate()
    step(model, optimizer, tokens(2))
    memory.consolidate()
    first, second = (Sums().add(model, *tokens(seed)).matrices() for seed in (1, 2))
    layer = memory.anchor.layers[NAME]
    assert torch.allclose(layer.inputs.diagonal()[0], (first[0] + second[0]) / 2, rtol=1e-9)
    truth = sum(g / (total / (V * WIDTH)) for _, g, total in (first, second))
    assert torch.allclose(layer.outputs.matrix()[0], truth, rtol=1e-9)


@pytest.mark.parametrize("rule", [EXACT, Kronecker(rank=2, m=1, every=1)], ids=["exact", "leading"])
def test_the_pull_is_the_minimum_of_the_dense_quadratic(rule):
    model = only_shared(Model(width=12))
    memory, optimizer = trained(model, [[tokens(s)] for s in range(3)], rule, lr=0.5, strength=0.3)
    memory.consolidate()
    layer, point = memory.anchor.layers[NAME], memory.anchor.point[NAME]
    plain = copy.deepcopy(model)
    step(plain, torch.optim.SGD([plain.embedding.weight], lr=0.5), tokens(9))
    step(model, optimizer, tokens(9))
    quadratic = torch.kron(torch.diag(layer.inputs.diagonal()[0]), layer.outputs.matrix()[0])
    moved = (plain.embedding.weight - point).detach().flatten()
    d = torch.linalg.solve(torch.eye(len(moved)).double() + 2 * 0.3 * 0.5 * quadratic, moved)
    assert torch.allclose((model.embedding.weight - point).detach().flatten(), d, rtol=1e-8, atol=1e-12)
    d = (model.embedding.weight - point).detach().flatten()
    assert float(memory.anchor.penalty({NAME: model.embedding.weight})) == pytest.approx(float(d @ quadratic @ d))


def test_steps_with_several_loss_scales_and_sizes_count_alike():
    model = only_shared(Model())
    memory, optimizer = trained(model, [])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    sums = Sums()
    for examples in (5, 2, 3):
        x, y = tokens(examples, examples)
        optimizer.zero_grad()
        scaler.scale(mean_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        sums.add(model, x, y)
    memory.consolidate()
    assert_held(memory, sums, 3)


def test_a_task_is_resumed_from_a_file_bit_for_bit(tmp_path):
    rule = Kronecker(rank=2, m=1, every=2)
    model = Model(width=12)
    memory, optimizer = trained(model, [[tokens(s)] for s in range(3)], rule, lr=0.3)
    memory.save(tmp_path / "state.safetensors")
    other = copy.deepcopy(model)
    resumed = Consolidator(other, rule, average="none")
    resumed.load(tmp_path / "state.safetensors")
    assert_same_state(memory, resumed)
    again = torch.optim.SGD(other.parameters(), lr=0.3)
    resumed.attach(again)
    for task in range(2):
        for m, o in ((model, optimizer), (other, again)):
            step(m, o, tokens(5 + task))
        memory.consolidate()
        resumed.consolidate()
        assert_same_state(memory, resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert NAME in resumed.anchor.layers


def test_copies_measure_by_themselves():
    model = only_shared(Model())
    memory, _ = trained(model, [[tokens(1)]])
    other, twin = copy.deepcopy((model, memory))
    memory.consolidate()
    twin.detach()
    optimizer = torch.optim.SGD([other.embedding.weight], lr=0.0)
    twin.attach(optimizer)
    step(other, optimizer, tokens(2))
    twin.consolidate()
    assert_held(memory, Sums().add(model, *tokens(1)))
    assert_held(twin, Sums().add(model, *tokens(1)).add(model, *tokens(2)), 2)


def old_state(memory):
    """Return a state as earlier versions saved it: the weight alone."""
    state = memory.state_dict()
    del state["moments"]["layers"][NAME]
    state["moments"]["squares"][NAME] = torch.ones(V, WIDTH).double()
    state["moments"]["seen"][NAME] = 1
    return state


@pytest.mark.parametrize("more", [0, 2])
def test_a_state_that_measured_the_weight_alone_keeps_it_alone(more):
    model = Model()
    memory, optimizer = trained(model, [[tokens(1)]])
    resumed = Consolidator(model, EXACT, average="none")
    resumed.load_state_dict(old_state(memory))
    memory.detach()
    resumed.attach(optimizer)
    for _ in range(2):
        for seed in range(more):
            step(model, optimizer, tokens(seed))
        resumed.consolidate()
        assert set(resumed.anchor.layers) == {"hidden.weight"}
        assert (resumed.anchor.omega[NAME] > 0).all()


def test_an_anchor_that_holds_the_weight_alone_keeps_it_alone():
    model, (x, y) = Model(), tokens(1)
    first = Consolidator(model, EWC(labels="true"))
    first.estimate([(x, y)], loss=mean_loss)
    omega = {name: importance for name, importance in first.anchor.omega.items() if name == NAME}
    memory = Consolidator(model, EXACT, 0.1, average="none")
    memory.adopt(ElementwiseAnchor({NAME: first.anchor.point[NAME]}, omega))
    memory.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    step(model, optimizer, (x, y))
    memory.consolidate()
    assert set(memory.anchor.layers) == {"hidden.weight"}
    assert (memory.anchor.omega[NAME] > omega[NAME]).any()


class HeadFirst(nn.Module):
    """A model whose shared weight has the name of the head."""

    def __init__(self, shared):
        super().__init__()
        self.head, self.hidden = nn.Linear(WIDTH, V, bias=False), nn.Linear(WIDTH, WIDTH)
        self.embedding = nn.Embedding(V, WIDTH)
        if shared:
            self.embedding.weight = self.head.weight
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embedding(x))))


def test_an_anchor_of_a_linear_layer_of_the_same_name_stays_as_it_is():
    """The weight is arranged the other way round there, so that nothing can be added to it."""
    apart, shared = HeadFirst(False), HeadFirst(True)
    first, _ = trained(apart, [[tokens(1)]])
    first.consolidate()
    memory = Consolidator(shared, EXACT, 0.1, average="none")
    memory.adopt(first.anchor)
    memory.attach(optimizer := torch.optim.SGD(shared.parameters(), lr=0.0))
    step(shared, optimizer, tokens(2))
    memory.consolidate()
    now, before = (m.anchor.layers for m in (memory, first))
    assert torch.equal(now["head.weight"].inputs.matrix(), before["head.weight"].inputs.matrix())
    assert not torch.equal(now["hidden.weight"].inputs.matrix(), before["hidden.weight"].inputs.matrix())


def test_a_weight_that_has_the_name_of_the_head():
    model = HeadFirst(True)
    memory, _ = trained(model, [[tokens(1)]])
    memory.consolidate()
    assert set(memory.anchor.layers) == {"head.weight", "hidden.weight"}
    assert memory.anchor.layers["head.weight"].inputs.size == V


def test_damaged_sums_are_refused():
    memory, _ = trained(Model(), [[tokens(1)]])
    for spoil in (lambda head: head["sums"].pop(), lambda head: head.update(rows=-1)):
        state = memory.state_dict()
        spoil(state["moments"]["layers"][NAME]["head"])
        with pytest.raises(ValueError, match=r"damaged: `embedding\.weight`"):
            Consolidator(Model(), EXACT, average="none").load_state_dict(state)


def grow(model, size):
    """Replace both layers by larger ones that share a weight."""
    old = model.embedding.weight.detach()
    model.embedding, model.head = nn.Embedding(size, WIDTH).double(), nn.Linear(WIDTH, size, bias=False).double()
    with torch.no_grad():
        model.embedding.weight[: len(old)] = old
    model.head.weight = model.embedding.weight


@pytest.mark.parametrize("amid", [True, False], ids=["in the middle of a task", "between tasks"])
def test_the_vocabulary_grows(amid):
    model = only_shared(Model())
    memory, _ = trained(model, [[tokens(1)]])
    first = Sums(V + 2).add(model, *tokens(1))
    if not amid:
        memory.consolidate()
    memory.detach()
    grow(model, V + 2)
    optimizer = torch.optim.SGD([model.embedding.weight], lr=0.0)
    memory.attach(optimizer)
    step(model, optimizer, tokens(2, most=V + 2))
    memory.consolidate()
    if amid:
        assert_held(memory, first.add(model, *tokens(2, most=V + 2)), 2)
    else:
        second = Sums(V + 2).add(model, *tokens(2, most=V + 2)).matrices()[0]
        old = first.matrices()[0]
        assert torch.allclose(memory.anchor.layers[NAME].inputs.diagonal()[0], (old + second) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", ["training", "data"])
def test_importance_takes_little_memory_and_no_tensor_has_the_vocabulary_squared(measure):
    size, width = 1000, 48
    model = only_shared(Model(size, width))
    rule = Kronecker(measure=measure, rank=8, m=1)
    memory, _ = trained(model, [[tokens(s, most=size)] for s in range(3)], rule)
    if measure == "training":
        moments = memory.state_dict()["moments"]
        entry = moments["layers"][NAME]
        sums = [*entry["sums"], *entry["head"]["sums"]]
        assert not moments["squares"]
        assert sum(t.numel() for t in sums) < 0.2 * size * width
    memory.consolidate([tokens(1, most=size)] if measure == "data" else None)
    assert not memory.anchor.omega
    held = memory.anchor.layers[NAME].tensors()
    assert sum(t.nbytes for t in held) < 1.5 * size * width


@pytest.mark.parametrize(
    "make",
    [lambda: Model(functional=True), lambda: Model(max_norm=1.0), lambda: Model(scale_grad_by_freq=True)],
    ids=["a use that is not seen", "max_norm", "scale_grad_by_freq"],
)
def test_a_weight_with_another_gradient_is_held_alone(make):
    model = make()
    with pytest.warns(UserWarning, match=r"other gradients than inputs and outputs give \(`embedding\.weight`\)"):
        memory, _ = trained(model, [[tokens(1)]])
    memory.consolidate()
    assert NAME in memory.anchor.omega
    assert set(memory.anchor.layers) == {"hidden.weight"}
