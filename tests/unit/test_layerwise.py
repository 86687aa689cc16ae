"""Per-example gradients layer by layer against plain autograd, one example at a time: what may be, and what must not."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as modules

from cases import pairwise
from dense import LAYERS, SCORES, close, exact, gradients_of, readout, scrambled, true, truth
from rwalk import EWC, MAS, Consolidator
from rwalk._parameters import named_parameters
from rwalk.gradients import layer_rules, layerwise, over_data, per_example_over


@pytest.fixture
def summed(monkeypatch):
    """Note for which parameters the last pass over data went layer by layer to its end."""
    found, take = set(), layerwise.LayerwiseSums.take

    def noting(self):
        found.clear()
        found.update(self.names)
        return take(self)

    monkeypatch.setattr(layerwise.LayerwiseSums, "take", noting)
    return found


class TwoLayers(nn.Module):
    """Two linear layers, `a` and `b`, and what a subclass does with them."""

    def __init__(self, wide=5):
        super().__init__()
        self.a, self.b = nn.Linear(wide, 5), nn.Linear(5, 3)
        self.more()
        self.double()

    def more(self):
        pass

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class ConvNet(TwoLayers):
    """Convolutions, norms of all kinds, views and in-place operations."""

    def more(self):
        self.stem = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.deep = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False)
        self.groups, self.instances = nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)
        self.line = nn.Conv1d(6, 5, 1)
        self.statistics = nn.BatchNorm1d(5)
        with torch.no_grad():
            for module in (self.norm, self.groups, self.instances, self.statistics):
                module.weight.uniform_(0.5, 1.5)
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.groups(self.deep(self.drop(x))).mul_(2)
        x = self.statistics(self.line(F.pad(self.instances(x), (1, 1)).flatten(2)))
        return super().forward(x.mean(2))


class WordsAndPlaces(TwoLayers):
    """Embeddings of words and of places, which are not those of an example, and layers along a sequence that comes first."""

    def more(self):
        self.words, self.places = nn.Embedding(7, 5, padding_idx=0), nn.Embedding(6, 5)
        self.first, self.last = nn.LayerNorm(5), nn.RMSNorm(5)

    def forward(self, x):
        h = self.first(self.words(x) + self.places(torch.arange(x.shape[1]))).transpose(0, 1)
        return self.b(self.last(h + torch.tanh(self.a(input=h)).cumsum(0)).mean(0))


class Partly(TwoLayers):
    """Heads that are idle or detached, a layer that is also looked at without a gradient, and one example, as a vector."""

    def more(self):
        self.idle, self.detached = nn.Linear(2, 2), nn.Linear(5, 5)

    def forward(self, x):
        with torch.no_grad():
            x = x + self.a(x)
        return super().forward((x + self.detached(x).detach())[0]).unsqueeze(0)


class CalledTwice(TwoLayers):
    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class TiedLayers(TwoLayers):
    def more(self):
        self.c = nn.Linear(5, 5)
        self.c.weight = self.a.weight

    def forward(self, x):
        return super().forward(torch.tanh(self.c(x)))


class Outside(TwoLayers):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.a.weight[:3])


class Everywhere(TwoLayers):
    """Uses the weights of all of its layers outside of them, too."""

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.a.weight, self.a.bias), self.b.weight, self.b.bias)


class Bypassed(TwoLayers):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class Kept(TwoLayers):
    """Holds a parameter where a replacement does not reach."""

    def more(self):
        self.list = [self.a.weight]

    def forward(self, x):
        return super().forward(x) + (x @ self.list[0])[:, :3]


class Token(TwoLayers):
    """Has a parameter that no known layer owns."""

    def more(self):
        self.token = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return super().forward(x * self.token)


class Parametrized(TwoLayers):
    def more(self):
        nn.utils.parametrizations.weight_norm(self.a)


class Own(TwoLayers):
    """Normalises with the statistics of what it sees, which is one example."""

    def more(self):
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x):
        return self.b(self.norm(self.a(x).unsqueeze(2) * torch.arange(3.0)).mean(2) + x)


class Folded(TwoLayers):
    """Hands several rows of one example to a layer as if they were examples."""

    def more(self):
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return super().forward(self.norm(torch.cat([x, x.sin()])).unflatten(0, (2, -1)).sum(0))


class Patched(TwoLayers):
    def more(self):
        self.a.forward = lambda x: 2 * F.linear(x, self.a.weight, self.a.bias)


class MixedExamples(TwoLayers):
    """Looks at the mean over examples, of which there is one."""

    def forward(self, x):
        return super().forward(x + (x - x.mean(0, keepdim=True)).tanh())


class Looking(TwoLayers):
    """Looks at values, which cannot be mapped over."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else self.b(x)


class Choosing(TwoLayers):
    """Asks its input for yes or no."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else self.b(x)


class Fast(TwoLayers):
    """Calls a layer with weights made from its own."""

    def forward(self, x):
        fast = {"weight": self.a.weight * 2, "bias": self.a.bias.sin()}
        return self.b(torch.func.functional_call(self.a, fast, (x,)))


class Field(TwoLayers):
    """The gradient of a scalar of the layers with respect to the input, as in a Hamiltonian network."""

    def forward(self, x):
        return torch.func.grad(lambda t: super(Field, self).forward(t).sin().sum())(x)[:, :3]


class Forwards(TwoLayers):
    """A directional derivative, forwards."""

    def forward(self, x):
        return torch.func.jvp(super().forward, (x,), (x.cos(),))[1]


class Nested(TwoLayers):
    """ConvNet a layer over places itself."""

    def forward(self, x):
        return self.b(torch.vmap(self.a, in_dims=1, out_dims=1)(torch.stack([x, x.sin()], 1)).sum(1))


class Reversed(TwoLayers):
    """Changes gradients by a hook, if there are any."""

    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: -3 * g.abs())
        return self.b(torch.tanh(h))


class Hooked(TwoLayers):
    def more(self):
        self.b.register_full_backward_hook(lambda m, into, out: (None if into[0] is None else 3 * into[0],))


class CheckpointedNet(TwoLayers):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Altered(TwoLayers):
    """Its own hooks change what goes into a layer and what comes out."""

    def more(self):
        self.a.register_forward_pre_hook(lambda _, args: (args[0].sin(),))
        self.a.register_forward_hook(lambda _, args, out: out * 3 + args[0], prepend=True)


ALL = None
CASES = {
    TwoLayers: ((5,), ALL),
    ConvNet: ((2, 7, 8), ALL),
    WordsAndPlaces: ("words", ALL),
    Partly: ((5,), ALL),
    MixedExamples: ((5,), ALL),
    Altered: ((5,), ALL),
    CalledTwice: ((5,), {"b.weight", "b.bias"}),
    TiedLayers: ((5,), {"b.weight", "b.bias"}),
    Outside: ((5,), {"b.weight", "b.bias"}),
    Everywhere: ((5,), set()),
    Bypassed: ((5,), {"b.weight", "b.bias"}),
    Token: ((5,), {"a.weight", "a.bias", "b.weight", "b.bias"}),
    Parametrized: ((5,), {"b.weight", "b.bias"}),
    Own: ((5,), {"a.weight", "a.bias", "b.weight", "b.bias"}),
    Folded: ((5,), {"a.weight", "a.bias", "b.weight", "b.bias"}),
    Patched: ((5,), {"b.weight", "b.bias"}),
    Fast: ((5,), {"b.weight", "b.bias"}),
    Kept: ((5,), set()),
    Looking: ((5,), set()),
    Choosing: ((5,), ALL),
    Field: ((5,), set()),
    Forwards: ((5,), set()),
    Nested: ((5,), set()),
    Reversed: ((5,), set()),
    Hooked: ((5,), set()),
    CheckpointedNet: ((5,), set()),
}
"""Models, the shapes of their inputs, and the parameters that can be told layer by layer."""

ONE_BY_ONE = (1, 1, 1)
"""The sizes of batches for models that take one example, or whose examples depend on the others of their batch."""

COUPLED = {Partly, MixedExamples, Own}


def drawn(shape, sizes=(4, 3), classes=3):
    make = (lambda n: torch.randint(7, (n, 6))) if shape == "words" else (lambda n: torch.randn(n, *shape, dtype=torch.float64))
    return [(make(n), torch.randint(classes, (n,))) for n in sizes]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # by torch's own derivatives forwards
@pairwise(make=CASES, of=[torch.square, torch.abs], objective=SCORES)
def test_models(make, objective, of, summed):
    (shape, names), model = CASES[make], make()
    data, theta = drawn(shape, *[ONE_BY_ONE] * (make in COUPLED)), named_parameters(model)
    got = per_example_over(model, theta, data)(objective, of)
    assert summed == (set(theta) if names is ALL else names)
    close(got, truth(model, theta, data, SCORES[objective], of))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("of", [torch.square, torch.abs])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, of, summed, monkeypatch):
    make, shape = LAYERS[name]
    monkeypatch.setattr(layer_rules, "BLOCK", 30)
    monkeypatch.setattr(layer_rules, "AT_ONCE", {"cpu": 150})
    layer, data = scrambled(make()), drawn(shape, *[ONE_BY_ONE] * ("no statistics" in name))
    loss = lambda z, _: readout(z)  # noqa: E731
    got = gradients_of(layer, data, loss=loss)("true", of)
    assert summed == (set() if "no statistics" in name else set(named_parameters(layer)))
    close(got, truth(layer, named_parameters(layer), data, lambda z, _: [(readout(z), 1.0)], of))


@pytest.mark.parametrize("of", [torch.square, torch.abs])
@pytest.mark.parametrize("shape", [(6,), ()])
def test_repeated_tokens(shape, of, summed):
    layer = nn.Embedding(5, 3, padding_idx=1).double()
    data = [(torch.randint(5, (n, *shape)), torch.zeros(n)) for n in (4, 3)]
    got = gradients_of(layer, data)("norm", of)
    assert summed == {"weight"}
    close(got, truth(layer, named_parameters(layer), data, SCORES["norm"], of))


class Shut(TwoLayers):
    """Has classes that cannot be, one of them hardly."""

    def forward(self, x):
        z = super().forward(x) + torch.tensor([0.0, 0.0, -800.0])
        return torch.cat([z, x[:, :2].masked_fill(torch.ones(2, dtype=torch.bool), -math.inf)], 1)


@pytest.mark.parametrize("of", [torch.square, torch.abs])
@pytest.mark.parametrize("objective", ["true", "exact"])
def test_shut_classes(objective, of, summed):
    model, data = Shut(), drawn((5,), classes=2)
    got = gradients_of(model, data)(objective, of)
    assert summed == set(named_parameters(model))
    close(got, truth(model, named_parameters(model), data, SCORES[objective], of))


def test_frozen_parameters_and_some_only(summed):
    model, data = Token(), drawn((5,))
    want = dict(zip(named_parameters(model), truth(model, named_parameters(model), data, exact, torch.square), strict=True))
    model.a.requires_grad_(False)
    got = gradients_of(model, data)("exact", torch.square, only=["a.bias", "token"])
    assert summed == {"a.bias"}
    close(got, [want["token"], want["a.bias"]])
    assert {name for name, p in named_parameters(model).items() if p.requires_grad} == {"token", "b.weight", "b.bias"}


@pytest.mark.parametrize("held", [False, True])
def test_a_loss_that_looks_at_parameters(held, summed):
    model, data = TwoLayers(), drawn((5,))
    list_ = list(model.parameters())
    loss = lambda z, y: F.cross_entropy(z, y) + sum(p.sin().sum() for p in (list_ if held else model.parameters()))  # noqa: E731
    got = gradients_of(model, data, loss=loss)("true", torch.square)
    assert summed == set()
    close(got, truth(model, named_parameters(model), data, lambda z, y: [(loss(z, y), 1.0)], torch.square))


def test_a_loss_of_its_own_parameters_goes_by_layers(summed):
    model, data, own = TwoLayers(), drawn((5,)), nn.Linear(3, 4).double()
    loss = lambda z, y: F.cross_entropy(own(z), y)  # noqa: E731
    got = gradients_of(model, data, loss=loss)("true", torch.abs)
    assert summed == set(named_parameters(model))
    close(got, truth(model, named_parameters(model), data, lambda z, y: [(loss(z, y), 1.0)], torch.abs))


def test_other_functions_are_left_to_others(summed):
    model, data = TwoLayers(), drawn((5,))
    got = gradients_of(model, data)("true", torch.exp)
    assert summed == set()
    close(got, truth(model, named_parameters(model), data, true, torch.exp))


class Written(TwoLayers):
    """Writes into the input of a layer, which no gradient of its weight survives."""

    def forward(self, x):
        h = torch.tanh(self.a(x)) + 1
        z = self.b(h)
        h.mul_(2)
        return z + h[:, :3]


def test_inputs_that_are_written_into_are_refused():
    model, data = Written(), drawn((5,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_of(model, data)("true", torch.square)


def test_the_first_chunk_says_how_many_examples_fit(monkeypatch):
    model, data, sizes, add = TwoLayers(), drawn((5,), sizes=(9, 3)), [], layerwise.LayerwiseSums.add

    def counting(self, *args):
        sizes.append(args[-1])
        add(self, *args)

    monkeypatch.setattr(layerwise.LayerwiseSums, "add", counting)
    monkeypatch.setattr(over_data, "FIRST", 2)
    monkeypatch.setattr(over_data, "MEMORY", 4 * 8 * (5 + 5 + 5 + 3))
    close(
        gradients_of(model, data)("exact", torch.square),
        truth(model, named_parameters(model), data, exact, torch.square),
    )
    assert sizes == [2, 4, 3, 3]


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_go_by_layers(whole, summed):
    model, data = TwoLayers(), drawn((5,))
    want = truth(model, named_parameters(model), data, exact, torch.square)
    model.a = torch.compile(model.a, backend="eager")
    model = torch.compile(model, backend="eager") if whole else model
    close(gradients_of(model, data)("exact", torch.square), want)
    assert len(summed) == 4


class Methodical(TwoLayers):
    """Calls a method of its own that may be replaced."""

    def more(self):
        self.inner = self.first

    def first(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.b(self.inner(x))


def compiled_method(model):
    model.inner = torch.compile(model.first, backend="aot_eager")


COMPILED = {
    "model": lambda model: model.compile(backend="aot_eager"),
    "layer": lambda model: model.a.compile(backend="aot_eager"),
    "method": compiled_method,
}


@pytest.mark.parametrize(("rule", "objective", "of"), [(EWC(), "exact", torch.square), (MAS(), "norm", torch.abs)])
@pytest.mark.parametrize("part", COMPILED)
def test_what_is_compiled_in_its_place_is_measured(part, rule, objective, of, summed):
    model, data = Methodical(), drawn((5,))
    want = truth(model, named_parameters(model), data, SCORES[objective], of)
    COMPILED[part](model)
    model(data[0][0]).sum().backward()
    memory = Consolidator(model, rule)
    memory.estimate(data)
    close([memory.anchor.omega[name] for name in named_parameters(model)], want)
    assert len(summed) == 4


def test_a_layer_whose_call_is_not_noted_is_left_to_others(monkeypatch, summed):
    model, data = TwoLayers(), drawn((5,))
    want = truth(model, named_parameters(model), data, exact, torch.square)
    monkeypatch.setattr(layerwise._Note, "apply", staticmethod(lambda _mark, _x, output, _tap: output))
    memory = Consolidator(model, EWC())
    memory.estimate(data)
    close([memory.anchor.omega[name] for name in named_parameters(model)], want)
    assert not summed


class Shouting(TwoLayers):
    """Has its layers' outputs times 3."""

    def forward(self, x):
        return 3 * self.b(torch.tanh(3 * self.a(x)))


@pytest.mark.parametrize(("rule", "objective", "of"), [(EWC(), "exact", torch.square), (MAS(), "norm", torch.abs)])
def test_hooks_of_all_modules_are_part_of_the_model(rule, objective, of):
    model, data = TwoLayers(), drawn((5,))
    same = Shouting()
    same.load_state_dict(model.state_dict())
    memory = Consolidator(model, rule)
    handle = modules.register_module_forward_hook(lambda m, args, out: 3 * out if isinstance(m, nn.Linear) else None)
    try:
        memory.estimate(data)
    finally:
        handle.remove()
    close(
        [memory.anchor.omega[name] for name in named_parameters(model)],
        truth(same, named_parameters(same), data, SCORES[objective], of),
    )


@pytest.mark.parametrize("make", [TwoLayers, Looking, Choosing])
def test_hooks_of_gradients_are_about_training(make):
    model, data, calls = make(), drawn((5,)), []
    want = truth(model, named_parameters(model), data, exact, torch.square)
    handle = model.a.weight.register_hook(lambda g: calls.append(1) or g * 0)
    memory = Consolidator(model, EWC())
    memory.estimate(data)
    close([memory.anchor.omega[name] for name in named_parameters(model)], want)
    assert not calls
    model(data[0][0].abs()).sum().backward()
    assert calls == [1]
    assert not model.a.weight.grad.any()
    handle.remove()
    assert not model.a.weight._backward_hooks


def test_low_precision_is_summed_in_float32(summed):
    model, data = TwoLayers(), drawn((5,))
    want = truth(model, named_parameters(model), data, exact, torch.square)
    model.bfloat16()
    got = gradients_of(model, [(x.bfloat16(), y) for x, y in data])("exact", torch.square)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients_of(model, [(x.float(), y) for x, y in data])("exact", torch.square)
    assert summed == set(named_parameters(model))
    for a, b, c in zip(got, cast, want, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a.double(), c, rtol=0.1, atol=0.02)
        torch.testing.assert_close(b.double(), c, rtol=0.1, atol=0.02)


class Broken(TwoLayers):
    """Fails within a layer, or after one."""

    def forward(self, x):
        return self.b(x[:, :4]) if len(x.shape) == 2 and self.a(x).shape[1] == 5 else x


def test_nothing_is_left_behind_by_an_error():
    model = Broken()
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradients_of(model, drawn((5,)))("true", torch.square)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors_of_sums_are_not_counted_twice(monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    model = TwoLayers()
    monkeypatch.setattr(layer_rules.Sum, "add_outer", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients_of(model, drawn((5,)))("true", torch.square)


@pytest.mark.parametrize(("rule", "objective", "of"), [(EWC(), "exact", torch.square), (MAS(), "norm", torch.abs)])
def test_rules(rule, objective, of, summed):
    model, data = TwoLayers(), drawn((5,))
    memory = Consolidator(model, rule)
    memory.estimate(data)
    assert summed == set(named_parameters(model))
    want = truth(model, named_parameters(model), data, SCORES[objective], of)
    close([memory.anchor.omega[name] for name in named_parameters(model)], want)
