"""Per-example gradients against plain autograd, one example at a time, in float64."""

import copy
import itertools
import math
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import pairwise
from dense import LAYERS, SCORES, close, exact, gradients_of, norm, readout, scrambled, true, truth
from rwalk import EWC, MAS, Consolidator, Kronecker
from rwalk._parameters import named_parameters
from rwalk.gradients import Squares, layer_rules, over_data, per_example_over
from rwalk.gradients.isolation import isolated


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other cost more than these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- over a loader -----------------------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 5 * 5, 3),
    ).double()


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.idle = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Branching(nn.Module):
    """Looks at its values, which cannot be mapped over."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.a(x) if x.sum().item() > 0 else self.b(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Masked(nn.Module):
    """Three of five classes open."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 5).double()

    def forward(self, x):
        return self.net(x).masked_fill(torch.tensor([False, False, True, False, True]), -math.inf)


def pairs(*shape, sizes=(4, 3), classes=3):
    return [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(classes, (n,))) for n in sizes]


MODELS = {
    "mlp": (mlp, (5,)),
    "cnn": (cnn, (2, 5, 5)),
    "lstm": (LastStep, (6, 5)),
    "branching": (Branching, (5,)),
    "tied": (Tied, (5,)),
}


@pairwise(name=MODELS, of=[torch.square, torch.abs], objective=SCORES)
def test_objectives(name, objective, of):
    make, shape = MODELS[name]
    model, data = make(), pairs(*shape)
    got = gradients_of(model, data)(objective, of)
    close(got, truth(model, named_parameters(model), data, SCORES[objective], of))


@pytest.mark.parametrize("make", [mlp, Branching], ids=["mapped", "alone"])
def test_sampled_labels_follow_the_model(make):
    model, theta = make(), None
    theta = named_parameters(model)
    x = torch.randn(1, 5, dtype=torch.float64)
    many = [x.expand(4000, 5)] if make is mlp else [x.expand(600, 5)]
    got = per_example_over(model, theta, many)("sample", torch.square)
    want = truth(model, theta, [(x, torch.zeros(1))], exact, torch.square)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.3, atol=0.05 * b.max().item() if b.numel() else 0.0)


@pytest.mark.parametrize("objective", ["true", "exact", "sample", "norm"])
def test_shut_classes_contribute_nothing(objective):
    model = Masked()
    data = [(x, torch.tensor([0, 1, 3, 0])[: len(x)]) for x, _ in pairs(5)]
    weight, bias = gradients_of(model, data)(objective, torch.square)
    assert torch.isfinite(weight).all()
    assert not weight[[2, 4]].any()
    assert weight[[0, 1, 3]].all()
    assert not bias[[2, 4]].any()
    small = nn.Linear(5, 3).double()
    small.load_state_dict({k: v[[0, 1, 3]] for k, v in model.net.state_dict().items()})
    if objective == "exact":
        close(weight[[0, 1, 3]], truth(small, named_parameters(small), data, exact, torch.square)[0])


def test_subset_of_parameters_and_frozen_ones():
    model, data = mlp(), pairs(5)
    want = truth(model, {"w": model[2].weight}, data, true, torch.square)
    model.requires_grad_(False)
    close(per_example_over(model, {"2.weight": model[2].weight}, data)("true", torch.square), want)
    slow = Branching()
    want = truth(slow, {"a": slow.a.weight}, data, true, torch.square)
    slow.requires_grad_(False)
    close(per_example_over(slow, {"a.weight": slow.a.weight}, data)("true", torch.square), want)
    assert not any(p.requires_grad for p in slow.parameters())


def test_chunks_and_cap(monkeypatch):
    model, data = mlp(), pairs(5, sizes=(7, 4))
    monkeypatch.setattr(over_data, "MEMORY", 3 * 8 * sum(p.numel() for p in model.parameters()))
    close(
        gradients_of(model, data)("true", torch.square),
        truth(model, named_parameters(model), data, true, torch.square),
    )
    first = [(data[0][0], data[0][1]), (data[1][0][:2], data[1][1][:2])]
    got = gradients_of(model, data)("true", torch.square, samples=9)
    close(got, truth(model, named_parameters(model), first, true, torch.square))


def test_cap_reads_no_further_batch():
    def stream():
        yield torch.ones(3, 5, dtype=torch.float64)
        raise AssertionError("read on")

    model = mlp()
    assert len(gradients_of(model, stream())("norm", torch.abs, samples=3)) == 4


class SharedScale(nn.Module):
    """Hugging Face style: keywords in, an output with logits; `scale` is shared by the examples and may look like a batch."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, scale, labels=None, flag=True):
        assert flag is True
        assert len(x) == 1
        return {"logits": self.net(x) * scale.sum(), "labels": labels}


def test_mappings_with_shared_tensors(monkeypatch):
    model, data = SharedScale(), pairs(5, sizes=(5, 4))
    scale = torch.ones(2, dtype=torch.float64)
    batches = [{"x": x, "scale": scale, "labels": y, "flag": True} for x, y in data]
    monkeypatch.setattr(over_data, "CHUNK", 2)
    got = gradients_of(model, batches)("true", torch.square)
    reference = nn.Sequential(model.net, Multiplied(2.0))
    close(got, truth(reference, named_parameters(model), data, true, torch.square))
    close(
        gradients_of(model, [({"x": x, "scale": scale}, y) for x, y in data])("true", torch.square),
        got,
    )
    close(gradients_of(model, [((x, scale), y) for x, y in data])("true", torch.square), got)
    close(
        gradients_of(model, [[(x, scale)] for x, _ in data])("norm", torch.abs),
        over_norm(model, batches),
    )


class Placed(nn.Module):
    """Adds what belongs to places, which all examples share, to a sequence; also takes one number for each example."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x, places, lengths=None):
        h = torch.tanh(x + places).sum(1)
        return self.head(h if lengths is None else h * lengths.unsqueeze(1))


def estimated(model, rule, batches):
    memory = Consolidator(model, rule)
    memory.estimate(batches)
    return [memory.anchor.importance()[name] for name in named_parameters(model)]


@pairwise(
    given=["first", "last", "lengths"],
    sizes=[(6,), (5,), (3,), (2, 5), (5, 2), (5, 1), (5, 5)],
    measure=[(EWC(), exact, torch.square), (MAS(), norm, torch.abs)],
)
def test_what_examples_share_is_shared_however_many_there_are(given, sizes, measure):
    rule, scores, of = measure
    model, places = Placed(), torch.randn(5, 4).double()
    if sizes == (3,):
        places = places[:3]
    data = [(torch.randn(n, len(places), 4).double(), torch.randint(3, (n,))) for n in sizes]
    if given == "lengths":
        batches = [((x, places, torch.ones(len(x)).double()), y) for x, y in data]
    else:
        batches = [({"places": places, "x": x} if given == "first" else {"x": x, "places": places}, y) for x, y in data]
    whole = nn.Module()
    whole.forward = lambda x: model(x, places)
    want = truth(whole, named_parameters(model), data, scores, of)
    close(estimated(model, rule, batches), want)


@pytest.mark.parametrize("rule", [EWC(labels="sample"), MAS(), Kronecker(measure="data")])
def test_a_row_for_all_may_come_before_the_examples(rule):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, input_ids, position_ids):
            return self.head(torch.tanh(self.words(input_ids) + self.places(position_ids)).mean(1))

    model, found = Words(), []
    batch = {"input_ids": torch.randint(7, (6, 5)), "position_ids": torch.arange(5)[None]}
    for keys in (list(batch), reversed(batch)):
        torch.manual_seed(0)
        found.append(estimated(model, rule, [{key: batch[key] for key in keys}]))
    close(*found)


@pytest.mark.parametrize("rule", [EWC(), MAS(), Kronecker(measure="data")])
def test_inputs_of_which_nobody_knows_what_they_belong_to_are_refused(rule):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.head(a + b.mean(0))

    y = torch.randint(3, (6,))
    with pytest.raises(ValueError, match="inputs of 6 and of 7 rows"):
        estimated(Both(), rule, [((torch.randn(6, 4), torch.randn(7, 4)), y)])
    model = Placed().float()
    model.forward = lambda x, places: model.head(
        (x.mean(1) + places.mean(-1, keepdim=True)) if len(x) == len(places) else x.mean(1)
    )
    square, other = ((torch.randn(5, 5, 4), torch.randn(5, 4)), y[:5]), ((torch.randn(6, 5, 4), torch.randn(5, 4)), y)
    with pytest.raises(ValueError, match=r"another dimension of the data.*a first dimension of 1"):
        estimated(model, rule, [square, other])


class Multiplied(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def over_norm(model, batches):
    return gradients_of(model, batches)("norm", torch.abs, samples=None)


def test_regression_and_reading_of_logits():
    model = mlp()
    data = [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, _ in pairs(5)]
    got = gradients_of(model, data, loss=F.mse_loss)("true", torch.square)
    close(got, truth(model, named_parameters(model), data, lambda z, y: [(((z - y) ** 2).mean(), 1.0)], torch.square))
    halves = gradients_of(model, pairs(5), logits=lambda z: z[:, :2])("norm", torch.square)
    assert not halves[3][2]


def test_half_precision_state_is_float32():
    model = nn.Linear(5, 3).bfloat16()
    got = gradients_of(model, [torch.ones(2, 5, dtype=torch.bfloat16)])("exact", torch.square)
    assert {t.dtype for t in got} == {torch.float32}


def test_compiled_and_no_grad_callers():
    model, data = mlp(), pairs(5)
    want = gradients_of(model, data)("true", torch.square)
    model[0] = torch.compile(model[0], backend="eager")
    whole = torch.compile(model, backend="eager")
    with torch.no_grad():
        close(gradients_of(whole, data)("true", torch.square), want)
    with torch.inference_mode():
        got = gradients_of(whole, data)("true", torch.square)
    close(got, want)


class Unruly(nn.Module):
    """Moves a buffer, draws numbers and can fail."""

    def __init__(self, fail_at=math.inf):
        super().__init__()
        self.net, self.calls, self.fail_at = cnn(), itertools.count(1), fail_at
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += float(x.sum()) + torch.rand(())
        if next(self.calls) > self.fail_at:
            raise RuntimeError("broken")
        return self.net(x)


@pytest.mark.parametrize("fail_at", [math.inf, 3])
def test_leaves_no_trace(fail_at):
    model, data = Unruly(fail_at), pairs(2, 5, 5)
    model.train()
    model.net[1].eval()
    model.net(data[0][0]).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data[0]), batch_size=2, shuffle=True)
    run = gradients_of(model, loader)
    if fail_at < math.inf:
        with pytest.raises(RuntimeError, match="broken"):
            run("sample", torch.square)
    else:
        run("sample", torch.square)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])


def test_undisturbed_evaluates_with_gradients():
    model = cnn()
    with torch.no_grad(), isolated(model):
        assert torch.is_grad_enabled()
        assert not model[3].training
    assert model[3].training


def test_undisturbed_leaves_the_precision_of_single_operators_alone():
    """Where a user has set one, PyTorch refuses every use of the older flag for all of them."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("this PyTorch has one flag for all operators")
    enabled, before = cudnn.enabled, cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        with isolated(cnn()):
            assert not cudnn.enabled
        assert (cudnn.enabled, cudnn.conv.fp32_precision) == (enabled, "ieee")
    finally:
        cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(
    ("batch", "objective", "options", "error", "match"),
    [
        ((torch.ones(2, 5),) * 3, "norm", {}, TypeError, "a tuple of 3"),
        ("text", "norm", {}, TypeError, "`str`"),
        (None, "norm", {}, TypeError, "`NoneType`"),
        (torch.ones(2, 5), "true", {}, ValueError, "without a target"),
        (torch.ones(2, 5), "true", {"loss": F.mse_loss}, ValueError, "without a target"),
        (torch.ones(2, 5), "exact", {"loss": F.l1_loss}, ValueError, 'use `labels="true"`'),
        (torch.ones(2, 5), "sample", {"loss": nn.CrossEntropyLoss(torch.ones(3))}, ValueError, 'use `labels="true"`'),
        (torch.ones(2, 5), "fisher", {}, ValueError, "one of"),
        (torch.ones(2, 4, 5), "exact", {}, ValueError, "in the second dimension as well as in the last"),
        (torch.ones(2, 4, 5), "exact", {"logits": lambda z: z.flatten(0, 1)}, ValueError, 'Use `labels="sample"`'),
        ((torch.ones(2, 5), torch.ones(2, 3)), "true", {}, ValueError, "Pass `loss="),
        ((torch.ones(2, 5), ["a", "b"]), "true", {}, ValueError, "`list`"),
        ((torch.ones(2, 5), torch.ones(2)), "true", {"loss": lambda z, y: z}, ValueError, "a scalar tensor"),
        ((torch.ones(2, 5), torch.ones(2)), "true", {"loss": lambda z, y: 1.0}, ValueError, "`float`"),
        (torch.ones(2, 5), "norm", {"logits": lambda z: "no"}, TypeError, "`str`"),
    ],
)
def test_errors(batch, objective, options, error, match):
    model = mlp().float()
    with pytest.raises(error, match=match) as caught:
        gradients_of(model, [batch], **options)(objective, torch.square)
    assert str(caught.value).endswith(".")


def test_no_examples():
    model = mlp()
    used_up = iter(pairs(5))
    list(used_up)
    for data, match in (([], "no examples"), (used_up, "used up"), ([torch.ones(0, 5).double()], "no examples")):
        with pytest.raises(ValueError, match=match):
            gradients_of(model, data)("norm", torch.square)


# --- during training ---------------------------------------------------------------------------------------------------------


def by_example(layer, x, readout):
    """Mean squared per-example gradient: give every example its own copy of the parameters by repeating batches.

    The layer runs on the whole batch, so that batch statistics are right, once for each example; of the output only that
    example counts.
    """
    theta = dict(layer.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in theta.items()}
    for i in range(len(x)):
        twin = copy.deepcopy(layer)
        out = twin(x)
        own = torch.autograd.grad(readout(out), out)[0]
        grads = torch.autograd.grad(out, list(twin.parameters()), _only(own, i), allow_unused=True)
        for name, g in zip(theta, grads, strict=True):
            totals[name] += g**2
    return {name: len(x) * t for name, t in totals.items()}


def _only(g, i):
    return torch.zeros_like(g).index_copy(0, torch.tensor([i]), g[i : i + 1])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, blocks, monkeypatch):
    make, shape = LAYERS[name]
    if blocks:
        monkeypatch.setattr(layer_rules, "BLOCK", 30)
        monkeypatch.setattr(layer_rules, "AT_ONCE", {"cpu": 150})
    layer, x = scrambled(make()), torch.randn(4, *shape, dtype=torch.float64)
    want = by_example(layer, x, readout)
    squares = Squares(layer, named_parameters(layer), strict=True)
    readout(layer(x)).backward()
    assert set(squares.take()) == set(want)
    for _ in range(2):
        layer.zero_grad()
        readout(layer(x)).backward()
        close(squares.take(), want if "evaluating" in name or "batch" not in name else by_example(layer, x, readout))


@pytest.mark.parametrize("shape", [(6,), ()])
@pytest.mark.parametrize("padding", [None, 1])
def test_embedding_sums_repeated_tokens(shape, padding):
    layer, x = nn.Embedding(5, 3, padding_idx=padding).double(), torch.randint(5, (4, *shape))
    want = by_example(layer, x, readout)
    squares = Squares(layer, named_parameters(layer), strict=True)
    for _ in range(2):
        layer.zero_grad()
        readout(layer(x)).backward()
        close(squares.take(), want)


class ManyViews(nn.Module):
    """Views, layouts and in-place operations of all kinds around the layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.second.weight.requires_grad_(False)
        self.last = nn.Linear(3, 3)
        self.double()

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x.transpose(2, 3))), inplace=True)
        x = self.first(x.flatten(2).transpose(1, 2))
        x = F.relu(x, inplace=True)
        return self.last(input=self.second(x).mean(1)).tanh_()


def loop(model, x, y, examples):
    """Squared per-example gradients of a model that treats examples alone, summed, and scaled as a mean over `examples`."""
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in theta.items()}
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(theta.values()))
        for name, g in zip(theta, grads, strict=True):
            totals[name] += g**2 / examples
    return totals


def test_whole_model_and_micro_batches():
    model = ManyViews()
    model.norm.eval()
    (x, y), (x2, y2) = pairs(2, 4, 5, sizes=(4, 2))
    whole = loop(model, torch.cat([x, x2]), torch.cat([y, y2]), 6)
    one = loop(model, x, y, 4)
    squares = Squares(model, named_parameters(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * 4 / 6).backward()
        (F.cross_entropy(model(x2), y2) * 2 / 6).backward()
        close(squares.take(), whole)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        close(squares.take(), one)
        assert squares.take() == {}
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) * 4 / 6 + F.cross_entropy(model(x2), y2) * 2 / 6).backward()
    close(squares.take(), whole)


def test_float32_state_of_low_precision_under_autocast():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    squares = Squares(model, named_parameters(model), strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(3, 6, 5)).float().square().sum((1, 2)).mean().backward()
    taken = squares.take()
    assert {t.dtype for t in taken.values()} == {torch.float32}
    assert len(taken) == 6


def test_empty_batch_and_no_grad_gather_nothing():
    model = mlp()
    squares = Squares(model, named_parameters(model), strict=True)
    model(torch.ones(0, 5).double()).sum().backward()
    with torch.no_grad():
        model(torch.ones(3, 5).double())
    with isolated(model):
        model(torch.ones(3, 5).double()).sum().backward()
    model(torch.ones(3, 5).double())  # no backward
    model.zero_grad()
    assert squares.take() == {}


def test_close_removes_hooks():
    model = mlp()
    squares = Squares(model, named_parameters(model))
    pending = model(torch.ones(3, 5).double()).sum()
    squares.close()
    pending.backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not squares._hooks.examples


class Wrong(nn.Module):
    """One of each kind of trouble, beside a layer that works."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fine, self.odd = nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "kind":
            self.odd = nn.MultiheadAttention(4, 2, batch_first=True)
        if kind == "parameter":
            self.odd.register_parameter("extra", nn.Parameter(torch.ones(4)))
        if kind == "sparse":
            self.odd = nn.Embedding(5, 4, max_norm=1.0)
        if kind == "tied":
            self.other = nn.Linear(4, 4)
            self.other.weight = self.odd.weight
        if kind == "positions":
            self.odd = nn.Embedding(5, 4)
        if kind == "trailing":
            self.odd = nn.LayerNorm((3, 4))
        self.double()

    def forward(self, x):
        x, odd = self.fine(x), self.odd
        if self.kind == "kind":
            return x + odd(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1))[0][:, 0]
        if self.kind in ("positions", "sparse"):
            return x + odd(torch.arange(4 if self.kind == "positions" else len(x))).sum(0)
        if self.kind == "again":
            return odd(torch.tanh(odd(x)))
        if self.kind == "outside":
            return F.linear(x, odd.weight, odd.bias)
        if self.kind == "tied":
            return self.other(odd(x))
        if self.kind == "vectors":
            return x + odd(x[0])
        return odd(x) * (odd.extra if self.kind == "parameter" else 1)


FROM_KIND = {"kind": "a `MultiheadAttention`", "parameter": "`extra`", "sparse": "max_norm", "tied": "shares a parameter"}
WHEN_RUN = {
    "positions": "is 4, that of the batch 3",
    "again": "more than once",
    "outside": "outside of its forward",
    "vectors": "no dimension for examples",
    "trailing": "no dimension for examples",
}


@pytest.mark.parametrize(("kind", "why"), FROM_KIND.items())
def test_unsupported_by_kind(kind, why):
    model, x = Wrong(kind), torch.randn(3, 4).double()
    with pytest.warns(UserWarning, match=why) as caught:
        squares = Squares(model, named_parameters(model))
    assert len(caught) == 1
    assert str(caught[0].message).startswith("The per-example gradients of some modules cannot be gathered")
    assert caught[0].filename == __file__
    for _ in range(2):
        model(x).sum(1).mean().backward()
        assert set(squares.take()) == {"fine.weight", "fine.bias"}
    squares.close()
    with pytest.raises(RuntimeError, match="`odd"):
        Squares(model, named_parameters(model), strict=True)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("kind", "why"), WHEN_RUN.items())
def test_unsupported_when_run(kind, why):
    model, x = Wrong(kind), torch.randn(3, 4).double()
    squares = Squares(model, named_parameters(model))
    model(x).sum(1).mean().backward()
    with pytest.warns(UserWarning, match=why) as caught:
        assert set(squares.take()) == {"fine.weight", "fine.bias"}
    assert len(caught) == 1
    assert caught[0].filename == __file__
    model(x).sum(1).mean().backward()
    assert set(squares.take()) == {"fine.weight", "fine.bias"}
    squares.close()
    strict = Squares(model, named_parameters(model), strict=True)
    model(x).sum(1).mean().backward()
    with pytest.raises(RuntimeError, match="`odd`"):
        strict.take()


def test_unused_heads_and_compiled_models():
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}).double()
    model.forward = lambda x: model["a"](x)
    squares = Squares(model, named_parameters(model), strict=True)
    model(torch.ones(2, 5).double()).sum().backward()
    assert set(squares.take()) == {"a.weight", "a.bias"}
    compiled = torch.compile(mlp(), backend="eager")
    squares = Squares(compiled, named_parameters(compiled))
    compiled(torch.ones(2, 5).double()).sum().backward()
    with pytest.warns(UserWarning, match="compiled"):
        assert squares.take() == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, ((x, y), *_) = mlp(), pairs(5)
    want = loop(model, x, y, len(x))
    model.forward = _checkpointed(model, reentrant)
    squares = Squares(model, named_parameters(model), strict=True)
    F.cross_entropy(model(x.requires_grad_()), y).backward()
    close(squares.take(), want)


def _checkpointed(model, reentrant):
    plain = type(model).forward
    return lambda x: torch.utils.checkpoint.checkpoint(lambda t: plain(model, t), x, use_reentrant=reentrant)


def test_a_pass_over_data_leaves_the_gathering_alone():
    model, data = mlp(), pairs(5)
    squares = Squares(model, named_parameters(model), strict=True)
    (x, y) = data[0]
    want = loop(copy.deepcopy(model), x, y, len(x))
    F.cross_entropy(model(x), y).backward()
    gradients_of(model, data)("true", torch.square)
    close(squares.take(), want)
    assert "gathered=4, of=4" in repr(squares)


# --- what a user does beside training ----------------------------------------------------------------------------------------


def per_example(model, x, y):
    loss = lambda theta, a, b: F.cross_entropy(torch.func.functional_call(model, theta, a[None]), b[None])  # noqa: E731
    theta = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(theta, x, y)


def batched_gradients(model, x, y):
    out = model(x)
    return torch.autograd.grad(
        out, list(model.parameters()), torch.eye(3).double()[:, None].expand(3, *out.shape), is_grads_batched=True
    )


def unbatched_gradients(model, x, y):
    out = model(x)
    return [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in out.flatten()]


def exported(model, x, y):
    return torch.export.export(model, (x,)).graph


def traced_by_fx(model, x, y):
    return torch.fx.symbolic_trace(model).code


BESIDE = {
    "grad of vmap": per_example,
    "jacrev": lambda m, x, y: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x, y: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x, y: torch.func.hessian(lambda t: m(t).sum())(x),
    "vjp": lambda m, x, y: torch.func.vjp(m, x)[1](torch.ones(len(x), 3).double()),
    "jvp": lambda m, x, y: torch.func.jvp(m, (x,), (x,)),
    "linearize": lambda m, x, y: torch.func.linearize(m, x)[1](x),
    "vmap": lambda m, x, y: torch.func.vmap(m)(x),
    "vectorised jacobian": lambda m, x, y: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "forward jacobian": lambda m, x, y: torch.autograd.functional.jacobian(m, x, vectorize=True, strategy="forward-mode"),
    "jacobian": lambda m, x, y: torch.autograd.functional.jacobian(m, x),
    "batched gradients": batched_gradients,
    "gradients one by one": unbatched_gradients,
    "trace": lambda m, x, y: torch.jit.trace(m, x)(x),
    "export": exported,
    "symbolic trace": traced_by_fx,
}


OWN = ("ignore:`torch.jit", "ignore:There is a performance drop", "ignore:Attempted to insert a get_attr")
"""What torch itself warns of."""


@pytest.mark.filterwarnings(*OWN)
@pytest.mark.parametrize("name", BESIDE)
def test_what_runs_beside_training_works_and_is_not_counted(name):
    """The same values as without hooks, and the next step's squares are those of the step alone."""
    model, ((x, y), *_) = mlp(), pairs(5)
    want, plain = loop(model, x, y, len(x)), BESIDE[name](copy.deepcopy(model), x, y)
    squares = Squares(model, named_parameters(model), strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        got = BESIDE[name](model, x, y)
        if isinstance(plain, str):
            assert got == plain
        elif name != "export":
            torch.testing.assert_close(got, plain)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        close(squares.take(), want)


@pytest.mark.filterwarnings(*OWN)
@pytest.mark.parametrize(
    "name", [n for n in BESIDE if n not in ("jacobian", "gradients one by one", "trace", "export", "symbolic trace")]
)
def test_a_transform_between_forward_and_step_is_not_counted(name):
    model, ((x, y), *_) = mlp(), pairs(5)
    want = loop(model, x, y, len(x))
    squares = Squares(model, named_parameters(model), strict=True)
    loss = F.cross_entropy(model(x), y)
    BESIDE[name](model, x, y)
    loss.backward()
    BESIDE[name](model, x, y)
    close(squares.take(), want)


@pytest.mark.parametrize("bias", [True, False])
def test_several_backward_passes_through_one_graph_spoil_one_step_only(bias):
    """(a + b)^2 is not a^2 + b^2; no layer is left out for good."""
    model, ((x, y), *_) = nn.Sequential(nn.Linear(5, 4, bias), nn.Linear(4, 3, bias)).double(), pairs(5)
    want = loop(model, x, y, len(x))
    squares = Squares(model, named_parameters(model))
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.warns(UserWarning, match="do not sum to the gradient in use"):
        assert squares.take() == {}
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    close(squares.take(), want)


def test_settings_of_the_process_end_with_the_last_of_two_threads_whatever_their_order():
    """Truth: what was set before; the first to come is the first to go."""

    def settings():
        fused = torch.backends.cuda.flash_sdp_enabled()
        return torch._dynamo.eval_frame._stance.stance, torch.backends.cudnn.enabled, fused

    def measure(came, go):
        with isolated(mlp()):
            came.set()
            assert go.wait(60)

    import torch._dynamo

    before, inside = settings(), ("force_eager", False, False)
    events = [(threading.Event(), threading.Event()) for _ in range(2)]
    threads = [threading.Thread(target=measure, args=pair) for pair in events]
    for thread, (came, _) in zip(threads, events, strict=True):
        thread.start()
        assert came.wait(60)
        assert settings() == inside
    for thread, (_, go) in zip(threads, events, strict=True):
        assert settings() == inside
        go.set()
        thread.join(60)
    assert settings() == before != inside
