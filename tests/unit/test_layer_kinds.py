"""Second moments of every kind of layer against explicit rows, in float64, as training measures them and as data does."""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator, Kronecker

EXACT = Kronecker(rank=None, share=1.0)


class Read(nn.Module):
    """A layer, and a readout that makes its outputs matter in different ways."""

    def __init__(self, layer, read):
        super().__init__()
        self.layer, self.read = layer, read

    def forward(self, *args):
        return self.read(self.layer, *args)


def mean_loss(output, y):
    return ((output.flatten(1).tanh().sum(1) - y) ** 2).mean()


def measured(model, args, y, names, rule=EXACT):
    """What one step of plain SGD on `names` measures: layers by the names of their weights, and the examples' mean loss."""
    parameters = [p for n, p in model.named_parameters() if n in names]
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    memory = Consolidator(model, rule, 0.1, average="none").attach(optimizer)
    mean_loss(model(*args), y).backward()
    optimizer.step()
    memory.consolidate()
    return memory


def assert_layer(layer, a, g, scale):
    """Compare with A and G of each group; G in the unit of the mean element."""
    assert np.allclose(layer.inputs.matrix(), a, rtol=1e-9, atol=1e-12)
    assert np.allclose(layer.outputs.matrix() * scale, g, rtol=1e-9, atol=1e-12 * np.abs(g).max())


def unit(a, g):
    return np.mean([np.outer(np.diag(gi), np.diag(ai)) for ai, gi in zip(a, g, strict=True)])


def second_moments(rows, deltas, examples, groups=1):
    """A and G of rows (n, groups, inputs) with a 1 in front, and gradients (n, groups, outputs) at one example's size."""
    ones = np.concatenate([np.ones((*rows.shape[:2], 1)), rows], 2)
    a = np.stack([ones[:, k].T @ ones[:, k] / len(ones) for k in range(groups)])
    g = np.stack([deltas[:, k].T @ deltas[:, k] / examples for k in range(groups)])
    return a, g


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_linear(shape):
    torch.manual_seed(0)
    model = Read(nn.Linear(4, 3), lambda layer, x: layer(x)).double()
    x, y = torch.randn(shape).double(), torch.randn(5).double()
    memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    out = model.layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(out, y) * 5, out)
    a, g = second_moments(x.reshape(-1, 1, 4).numpy(), delta.reshape(-1, 1, 3).numpy(), 5)
    assert_layer(memory.anchor.layers["layer.weight"], a, g, unit(a, g))


def patches(x, module):
    """Rows of a convolution by explicit indexing: (examples * places, groups, inputs of a group * kernel)."""
    dims, pad = len(module.kernel_size), module.padding
    if isinstance(pad, str):
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(n // 2, n - n // 2) for n in whole]
    else:
        sides = [(n, n) for n in pad]
    mode = "constant" if module.padding_mode == "zeros" else "wrap"
    x = np.pad(x.numpy(), [(0, 0), (0, 0), *sides], mode)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    places = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, module.stride, strict=True)]
    width = module.in_channels // module.groups
    rows = []
    for e in range(len(x)):
        for start in itertools.product(*places):
            where = tuple(slice(s, s + r, d) for s, r, d in zip(start, reach, module.dilation, strict=True))
            cut = x[(e, slice(None), *where)]
            rows.append([cut[k * width : (k + 1) * width].ravel() for k in range(module.groups)])
    assert dims == x.ndim - 2
    return np.array(rows)


CONVOLUTIONS = [
    nn.Conv1d(3, 4, 3, stride=2, padding=1),
    nn.Conv1d(4, 6, 2, groups=2, dilation=2),
    nn.Conv2d(2, 3, 3, padding="same", dilation=2),
    nn.Conv2d(4, 4, (2, 3), stride=(1, 2), padding=1, groups=4, padding_mode="circular"),
    nn.Conv3d(1, 2, 2, padding=(1, 0, 1)),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolution(layer):
    torch.manual_seed(0)
    model = Read(layer, lambda layer, x: layer(x)).double()
    size = {1: (7,), 2: (5, 6), 3: (3, 4, 3)}[len(layer.kernel_size)]
    x, y = torch.randn(3, layer.in_channels, *size).double(), torch.randn(3).double()
    memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    out = layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(out, y) * 3, out)
    delta = delta.flatten(2).permute(0, 2, 1).reshape(-1, layer.groups, layer.out_channels // layer.groups).numpy()
    a, g = second_moments(patches(x, layer), delta, 3, layer.groups)
    assert_layer(memory.anchor.layers["layer.weight"], a, g, unit(a, g))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_convolution_over_an_empty_batch_adds_nothing(layer, rank):
    """As where no region of an image was proposed."""
    size = {1: (7,), 2: (25, 6), 3: (3, 4, 3)}[len(layer.kernel_size)]
    x, y = torch.randn(3, layer.in_channels, *size).double(), torch.randn(3).double()
    sides = []
    for empty in (True, False):
        extra = 0 if empty else None  # how many of the examples the layer is given once more
        model = Read(
            copy.deepcopy(layer), lambda layer, x, n=extra: layer(x) + (0 if n is None else layer(x[:n]).sum())
        ).double()
        found = measured(model, (x,), y, {"layer.weight", "layer.bias"}, Kronecker(rank=rank)).anchor.layers["layer.weight"]
        sides.append([found.inputs.matrix(), found.outputs.matrix()])
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(*sides, strict=True))


class Plain(nn.Linear):
    """A class of one's own that does nothing of its own."""


class Halving(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x / 2)


class Padding(nn.Conv2d):
    """Pads by itself, more on one side, as some convolutional networks from TensorFlow do."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 1, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(("kind", "before", "after"), [(Plain, 1.0, 1.0), (Halving, 0.5, 3.0)])
def test_linear_layers_of_derived_classes(kind, before, after):
    torch.manual_seed(0)
    model = Read(kind(4, 3), lambda layer, x: layer(x)).double()
    x, y = torch.randn(5, 2, 4).double(), torch.randn(5).double()
    memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    inner = F.linear(x * before, model.layer.weight, model.layer.bias).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(inner * after, y) * 5, inner)
    a, g = second_moments((x * before).reshape(-1, 1, 4).numpy(), delta.reshape(-1, 1, 3).numpy(), 5)
    assert_layer(memory.anchor.layers["layer.weight"], a, g, unit(a, g))
    assert F.linear is torch._C._nn.linear


def test_a_convolution_that_pads_by_itself():
    torch.manual_seed(0)
    layer = Padding(4, 6, 3, stride=2, groups=2)
    model = Read(layer, lambda layer, x: layer(x)).double()
    x, y = torch.randn(3, 4, 5, 6).double(), torch.randn(3).double()
    memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    out = layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(out, y) * 3, out)
    delta = delta.flatten(2).permute(0, 2, 1).reshape(-1, 2, 3).numpy()
    a, g = second_moments(patches(F.pad(x, (0, 1, 1, 2)), layer), delta, 3, 2)
    assert_layer(memory.anchor.layers["layer.weight"], a, g, unit(a, g))


class Meeting(nn.Linear):
    """A layer that tells when it has begun, and waits for another one before it ends."""

    begun, other = None, None

    def forward(self, x):
        self.begun.set()
        assert self.other.wait(30)
        return F.linear(x, self.weight, self.bias)


def test_two_threads_measure_as_if_alone_and_leave_functions_as_they_were():
    torch.manual_seed(0)
    plain, x, y = F.linear, torch.randn(2, 6, 4).double(), torch.randn(2, 6).double()
    models = [Read(Meeting(4, 3).double(), lambda layer, x: layer(x)) for _ in range(2)]
    alone = [Read(nn.Linear(4, 3).double(), lambda layer, x: layer(x)) for _ in range(2)]
    memories, (first, second, ended) = {}, (threading.Event() for _ in range(3))
    models[0].layer.begun, models[0].layer.other = first, second  # the first one ends while the second is at work
    models[1].layer.begun, models[1].layer.other = second, ended
    models[0].register_forward_hook(lambda *_: ended.set())
    models[1].register_forward_pre_hook(lambda *_: first.wait(30) and None)

    def train(n):
        memories[n] = measured(models[n], (x[n],), y[n], ["layer.weight", "layer.bias"])

    for model, other in zip(models, alone, strict=True):
        other.load_state_dict(model.state_dict())
    threads = [threading.Thread(target=train, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.linear is plain
    for n, other in enumerate(alone):
        truth = measured(other, (x[n],), y[n], ["layer.weight", "layer.bias"])
        ours, theirs = (memory.anchor.layers["layer.weight"] for memory in (memories[n], truth))
        assert torch.equal(ours.inputs.matrix(), theirs.inputs.matrix())
        assert torch.equal(ours.outputs.matrix(), theirs.outputs.matrix())


def test_a_layer_that_gives_another_weight_to_its_function_is_held_alone_with_a_warning():
    model = Read(Standardised(2, 3, 3), lambda layer, x: layer(x)).double()
    x, y = torch.randn(3, 2, 5, 6).double(), torch.randn(3).double()
    with pytest.warns(UserWarning, match="`layer.weight`.* held one by one"):
        memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    assert not memory.anchor.layers
    assert {*memory.anchor.omega} == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding):
    torch.manual_seed(0)
    model = Read(nn.Embedding(6, 4, padding_idx=padding), lambda layer, x: layer(x)).double()
    x, y = torch.randint(0, 6, (5, 3)), torch.randn(5).double()
    memory = measured(model, (x,), y, {"layer.weight"})
    out = model.layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(out, y) * 5, out)
    kept = (x != padding).flatten() if padding is not None else torch.ones(15, dtype=bool)
    tokens, d = x.flatten()[kept], delta.reshape(-1, 4)[kept].numpy()
    a = np.diag(np.bincount(tokens, minlength=6) / len(tokens))
    g = d.T @ d / 5
    layer = memory.anchor.layers["layer.weight"]
    assert layer.inputs.basis.numel() == 0  # a diagonal is kept as one
    seen = a.any(1)  # tokens that never come have no part in the unit
    assert_layer(layer, a[None], g[None], unit(a[None][:, seen][:, :, seen], g[None]))


class Conv1D(nn.Module):
    """As in Hugging Face's Transformers: a linear layer with a weight of (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def test_a_linear_layer_that_is_stored_the_other_way_round():
    torch.manual_seed(0)
    model = Read(Conv1D(), lambda layer, x: layer(x)).double()
    x, y = torch.randn(5, 2, 4).double(), torch.randn(5).double()
    memory = measured(model, (x,), y, {"layer.weight", "layer.bias"})
    out = model.layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(mean_loss(out, y) * 5, out)
    a, g = second_moments(x.reshape(-1, 1, 4).numpy(), delta.reshape(-1, 1, 3).numpy(), 5)
    assert_layer(memory.anchor.layers["layer.weight"], a, g, unit(a, g))


def attention(q, k, v, heads):
    """Attention over (batch, length, width) queries, keys and values."""
    b, n, width = q.shape
    split = [t.reshape(b, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v)]
    weight = (split[0] @ split[1].mT / (width // heads) ** 0.5).softmax(-1)
    return (weight @ split[2]).transpose(1, 2).reshape(b, n, width)


def test_packed_attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    nn.init.normal_(layer.in_proj_bias)
    model = Read(layer, lambda layer, x: layer(x, x, x)[0]).double()
    x, y = torch.randn(3, 5, 4).double(), torch.randn(3).double()
    names = {"layer.in_proj_weight", "layer.in_proj_bias", "layer.out_proj.weight", "layer.out_proj.bias"}
    memory = measured(model, (x,), y, names)
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).detach().requires_grad_()
    mixed = attention(*qkv.chunk(3, 2), 2)
    out = F.linear(mixed, layer.out_proj.weight, layer.out_proj.bias)
    deltas = torch.autograd.grad(mean_loss(out, y) * 3, [qkv, out])
    truth = [second_moments(x.reshape(-1, 1, 4).numpy(), deltas[0].reshape(-1, 1, 12).numpy(), 3)]
    truth.append(second_moments(mixed.detach().reshape(-1, 1, 4).numpy(), deltas[1].reshape(-1, 1, 4).numpy(), 3))
    sums = [np.outer(np.diag(g[0]), np.diag(a[0])) for a, g in truth]
    scale = sum(s.sum() for s in sums) / sum(s.size for s in sums)
    for name, (a, g) in zip(("layer.in_proj_weight", "layer.out_proj.weight"), truth, strict=True):
        assert_layer(memory.anchor.layers[name], a, g, scale)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_over_another_sequence(packed):
    torch.manual_seed(0)
    more = {} if packed else {"kdim": 3, "vdim": 2}
    layer = nn.MultiheadAttention(4, 2, batch_first=True, bias=packed, **more)
    model = Read(layer, lambda layer, x, k, v: layer(x, k, v)[0]).double()
    x, y = torch.randn(3, 5, 4).double(), torch.randn(3).double()
    k, v = torch.randn(3, 6, more.get("kdim", 4)).double(), torch.randn(3, 6, more.get("vdim", 4)).double()
    names = [n for n, _ in model.named_parameters()]
    memory = measured(model, (x, k, v), y, names)
    weights = layer.in_proj_weight.chunk(3) if packed else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    projected = [F.linear(t, w).detach().requires_grad_() for t, w in zip((x, k, v), weights, strict=True)]
    out = layer.out_proj(attention(*projected, 2))
    deltas = torch.autograd.grad(mean_loss(out, y) * 3, projected)
    g = [d.reshape(-1, 4).T @ d.reshape(-1, 4) / 3 for d in deltas]
    layers = memory.anchor.layers
    if packed:
        rows = torch.cat([t.reshape(-1, 4) for t in (x, k, v)])
        ones = torch.cat([torch.ones(len(rows), 1), rows], 1)
        assert torch.allclose(layers["layer.in_proj_weight"].inputs.matrix()[0], ones.T @ ones / len(ones), rtol=1e-9)
        held = layers["layer.in_proj_weight"].outputs.matrix()[0]
        truth = torch.block_diag(*g)
        assert torch.allclose(held / held.trace(), truth / truth.trace(), rtol=1e-8, atol=1e-12)
    else:
        for key, t, truth in zip("qkv", (x, k, v), g, strict=True):
            held = layers[f"layer.{key}_proj_weight"]
            flat = t.reshape(-1, t.shape[-1])
            assert torch.allclose(held.inputs.matrix()[0], flat.T @ flat / len(flat), rtol=1e-9)
            assert torch.allclose(held.outputs.matrix()[0] * truth.trace() / held.outputs.matrix()[0].trace(), truth, rtol=1e-8)
    assert F.linear is torch._C._nn.linear  # nothing is left behind


RECURRENT = [
    (nn.LSTM, {"batch_first": True, "num_layers": 2}),
    (nn.LSTM, {"bidirectional": True}),
    (nn.GRU, {"batch_first": True, "bidirectional": True, "num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_the_first_state_may_be_named_as_may_the_input(kind, options):
    torch.manual_seed(0)
    layer = kind(3, 4, **options).double()
    x, y, start = torch.randn(5, 6, 3).double(), torch.randn(5).double(), layer(torch.randn(5, 6, 3).double())[1]
    start = tuple(s.detach() for s in start) if kind is nn.LSTM else start.detach()
    calls = {
        "by place": lambda layer, x: layer(x, start),
        "state by name": lambda layer, x: layer(x, hx=start),
        "state first": lambda layer, x: layer(hx=start, input=x),
    }
    names, first = {f"layer.{n}" for n, _ in layer.named_parameters()}, None
    for read in calls.values():
        memory = measured(Read(copy.deepcopy(layer), lambda layer, x, read=read: read(layer, x)[0]), (x,), y, names)
        sides = [m for held in memory.anchor.layers.values() for m in (held.inputs.matrix(), held.outputs.matrix())]
        first = sides if first is None else first
        assert all(torch.equal(one, other) for one, other in zip(first, sides, strict=True))
    assert len(first) == 2 * sum(n.startswith("layer.weight") for n in names)


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_gates_give_the_gradients_of_recurrent_layers(kind, options):
    """Outputs are the module's, and inputs and gates' gradients multiply to the weights' gradients, last states included."""
    from rwalk.gradients.recurrent import Gates

    torch.manual_seed(0)
    layer = kind(3, 4, **options).double()
    x = torch.randn(5, 6, 3).double()
    output, last = layer(x)
    ends = list(last) if kind is nn.LSTM else [last]
    gates = Gates(layer, x, None)
    for mine, theirs in zip(gates.outputs, [output, *ends], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    coefficients = [torch.randn_like(t) for t in (output, *ends)]
    weights = {n: p for n, p in layer.named_parameters() if n.startswith("weight")}
    truth = torch.autograd.grad([output, *ends], list(weights.values()), coefficients)
    rows = {r.layer: r for r in gates.rows({n: n for n in weights}, coefficients)}
    for (name, _), gradient in zip(weights.items(), truth, strict=True):
        found = rows[name].deltas[0].T @ rows[name].inputs[0]
        assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-12)


def test_recurrent_layers_are_held_by_their_gates():
    """With one step, the gates' gradients are those of the bias, example by example."""
    torch.manual_seed(0)
    model = Read(nn.LSTM(3, 2, batch_first=True), lambda layer, x, h, c: layer(x, (h, c))[0]).double()
    x, y = torch.randn(4, 1, 3).double(), torch.randn(4).double()
    h, c = torch.randn(1, 4, 2).double(), torch.randn(1, 4, 2).double()
    deltas = []
    for i in range(4):
        loss = mean_loss(model(x[i : i + 1], h[:, i : i + 1], c[:, i : i + 1]), y[i : i + 1])
        deltas.append(torch.autograd.grad(loss, model.layer.bias_ih_l0)[0].numpy())
    deltas = np.array(deltas)[:, None]
    memory = measured(model, (x, h, c), y, {n for n, _ in model.named_parameters()})
    layers = memory.anchor.layers
    truth = {
        "layer.weight_ih_l0": second_moments(x.numpy(), deltas, 4),
        "layer.weight_hh_l0": second_moments(h.transpose(0, 1).numpy(), deltas, 4),
    }
    sums = [np.outer(np.diag(g[0]), np.diag(a[0])) for a, g in truth.values()]
    scale = sum(s.sum() for s in sums) / sum(s.size for s in sums)
    for name, (a, g) in truth.items():
        assert_layer(layers[name], a, g, scale)


class Tied(nn.Module):
    """A layer that is used twice, and two modules that share a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def test_uses_of_one_weight_add_up():
    torch.manual_seed(0)
    model = Tied()
    x, y = torch.randn(5, 4).double(), torch.randn(5).double()
    memory = measured(model, (x,), y, {"a.weight", "a.bias"})
    w, b = model.a.weight.detach(), model.a.bias.detach()
    first = F.linear(x, w, b).requires_grad_()
    second = F.linear(torch.tanh(first), w, b)
    third = F.linear(torch.tanh(second), w)
    deltas = torch.autograd.grad(mean_loss(third, y) * 5, [first, second, third])
    rows = torch.cat([x, torch.tanh(first), torch.tanh(second)]).detach()
    a, g = rows.T @ rows / 15, sum(d.T @ d for d in deltas) / 5
    layer = memory.anchor.layers["a.weight"]
    assert layer.arrangement.bias is None  # which only one of the uses has
    assert torch.allclose(layer.inputs.matrix()[0], a, rtol=1e-9)
    assert torch.allclose(layer.outputs.matrix()[0] * g.trace() / layer.outputs.matrix()[0].trace(), g, rtol=1e-9)
    assert set(memory.anchor.omega) == {"a.bias"}


@pytest.mark.parametrize("make", [
    lambda: (Read(nn.Linear(4, 3), lambda layer, x: layer(x)), torch.randn(6, 4)),
    lambda: (Read(nn.Conv2d(4, 6, 3, groups=2), lambda layer, x: layer(x)), torch.randn(6, 4, 5, 5)),
    lambda: (Read(Padding(4, 6, 3, groups=2), lambda layer, x: layer(x)), torch.randn(6, 4, 5, 5)),
    lambda: (Read(Halving(4, 3), lambda layer, x: layer(x)), torch.randn(6, 4)),
    lambda: (Read(nn.Embedding(7, 3), lambda layer, x: layer(x)), torch.randint(0, 7, (6, 4))),
    lambda: (Read(nn.LSTM(3, 2, batch_first=True), lambda layer, x: layer(x)[0]), torch.randn(6, 4, 3)),
])  # fmt: skip
def test_data_and_training_measure_the_same_on_one_batch(make):
    """With the data's own labels, a pass over data sees what one measured step on all of it sees."""
    torch.manual_seed(0)
    model, x = make()
    model = model.double()
    x, y = (x.double() if x.is_floating_point() else x), torch.randn(6).double()
    names = {n for n, _ in model.named_parameters()}
    online = measured(model, (x,), y, names).anchor
    memory = Consolidator(model, Kronecker(measure="data", rank=None, share=1.0, labels="true"))
    memory.consolidate([(x, y)], loss=lambda output, y: mean_loss(output, y))
    root = online.layers.keys()
    assert root == memory.anchor.layers.keys() != set()
    for weight, layer in memory.anchor.layers.items():
        mine = online.layers[weight]
        assert torch.allclose(layer.inputs.matrix(), mine.inputs.matrix(), rtol=1e-9, atol=1e-12)
        # a task that was only estimated counts for 300 steps
        assert torch.allclose(layer.outputs.matrix() * 300**0.5, mine.outputs.matrix(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_rows_without_a_gradient_such_as_those_of_padding_have_no_part_in_the_mean_of_inputs(kind):
    torch.manual_seed(0)
    counts = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
    if kind == "linear":
        layer, x = nn.Linear(4, 2), torch.randn(5, 3, 4).double()
    elif kind == "embedding":
        layer, x = nn.Embedding(6, 2), torch.randint(0, 6, (5, 3))
    else:
        layer, x = nn.Conv1d(4, 2, 1), torch.randn(5, 4, 3).double()
    places = (lambda out: out.mT) if kind == "convolution" else lambda out: out
    model = Read(layer, lambda layer, x: places(layer(x)) * counts.unsqueeze(2)).double()
    memory = measured(model, (x,), torch.randn(5).double(), {n for n, _ in model.named_parameters()})
    rows = F.one_hot(x, 6).double() if kind == "embedding" else torch.cat([torch.ones(5, 3, 1), places(x)], 2)
    kept = rows[counts.bool()]
    found = memory.anchor.layers["layer.weight"].inputs.matrix()[0]
    assert torch.allclose(found, kept.T @ kept / len(kept), rtol=1e-9)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_tokens_that_never_come_change_nothing(make):
    """Neither the unit, which is a mean over elements, nor the length of an embedding's pull under Adam."""

    def learned(vocabulary):
        embedding = nn.Embedding(vocabulary, 4)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 3)).double()
        with torch.no_grad():
            embedding.weight[:6] = torch.linspace(-1, 1, 24).view(6, 4)
            model[2].weight.copy_(torch.linspace(-1, 1, 36).view(3, 12))
            model[2].bias.zero_()
        optimizer = make(model.parameters(), lr=0.05)
        memory = Consolidator(model, strength=5.0).attach(optimizer)
        chance = torch.Generator().manual_seed(1)
        for step in range(40):
            x, y = torch.randint(6, (8, 3), generator=chance), torch.randint(3, (8,), generator=chance)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step == 19:
                memory.consolidate()
        return float(memory.penalty()), embedding.weight[:6], model[2].weight

    (few, *weights), (many, *others) = learned(6), learned(600)
    assert few == pytest.approx(many, rel=1e-9) != 0
    assert all(torch.allclose(w, o, rtol=1e-9) for w, o in zip(weights, others, strict=True))
