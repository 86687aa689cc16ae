"""Kronecker factors against dense matrices: NumPy's kron, plain autograd and linear solves, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, train
from rwalk import EWC, Anchor, Consolidator, Kronecker, KroneckerAnchor, bench
from rwalk.anchors import ElementwiseAnchor
from rwalk.distributed.shards import ALONE

LAYERS = {"0.weight": "0.bias", "2.weight": "2.bias"}
ESTIMATED = 300**0.5  # a task that was only estimated counts for 300 steps


def measured_on_data(**more):
    """The rule that measures on data and keeps all directions."""
    return Kronecker(measure="data", rank=None, share=1.0, **more)


def kron(layer):
    return np.kron(layer.outputs.matrix()[0], layer.inputs.matrix()[0])


def data(task, steps=3, **more):
    return [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(task, steps, **more)]


def stacked(bias, weight):
    """[bias | weight] as one long vector, row by row, as np.kron(G, A) wants it."""
    return torch.cat([bias.unsqueeze(1), weight], 1).detach().numpy().ravel()


def dense_fisher(model, x):
    """The exact Fisher information of all parameters at inputs x, layer by layer: lists of (probability, gradient) vectors."""
    found = []
    for one in x:
        score = F.log_softmax(model(one.unsqueeze(0)), 1)[0]
        for value in score:
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            named = dict(zip(dict(model.named_parameters()), grads, strict=True))
            found.append((value.detach().exp().item() / len(x), named))
    return found


def factors(model, x):
    """A and G of the layers of `mlp` by their definition, and one per-example gradient at a time."""
    hidden = torch.tanh(model[0](x)).detach()
    inputs = {"0.weight": x, "2.weight": hidden}
    extended = {w: np.hstack([np.ones((len(h), 1)), h]) for w, h in inputs.items()}
    a = {w: e.T @ e / len(e) for w, e in extended.items()}
    g = {w: sum(p * np.outer(d[b], d[b]) for p, d in dense_fisher(model, x)) for w, b in LAYERS.items()}
    return a, g


def quadratics(measured, steps=5):
    """For each layer np.kron(G, A), the sum and the mean over tasks, each in the unit of its own mean diagonal."""
    units = []
    for a, g in measured:
        diagonal = np.concatenate([np.outer(np.diag(g[w]), np.diag(a[w])).ravel() for w in LAYERS])
        units.append(diagonal.mean() * steps**0.5)
    return {
        w: np.kron(
            sum(g[w] / unit for (_, g), unit in zip(measured, units, strict=True)),
            sum(a[w] for a, _ in measured) / len(measured),
        )
        for w in LAYERS
    }


def consolidated(tasks=2, rule=None, **options):
    """A model after some tasks, its consolidator, and the quadratics by definition."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule or measured_on_data(labels="exact", every=1), 0.02, **options).attach(optimizer)
    measured = []
    for task in range(tasks):
        train(model, optimizer, batches(task, 5))
        memory.consolidate(data(task))
        measured.append(factors(model, torch.cat([x for x, _ in data(task)])))
    return model, optimizer, memory, quadratics(measured)


def test_one_example_of_one_layer_is_the_whole_fisher_information():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x = torch.randn(1, 4).double()
    memory = Consolidator(model, measured_on_data(labels="exact"))
    memory.estimate([(x, torch.zeros(1).long())])
    vectors = [(p, stacked(d["bias"], d["weight"])) for p, d in dense_fisher(model, x)]
    truth = sum(p * np.outer(v, v) for p, v in vectors)
    truth /= np.diag(truth).mean() * ESTIMATED
    assert np.allclose(kron(memory.anchor.layers["weight"]), truth, rtol=1e-10, atol=1e-12)


def test_a_linear_model_with_one_residual_is_the_whole_fisher_information_too():
    """With squared loss and targets that are all off by the same, gradients at the output do not depend on the input."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, off = torch.randn(9, 4).double(), torch.tensor([0.5, -2.0, 1.0]).double()
    memory = Consolidator(model, measured_on_data(labels="true"))
    memory.estimate([(x, model(x).detach() + off)], loss=lambda output, y: (output - y).square().sum() / 2)
    extended = np.hstack([np.ones((9, 1)), x])
    vectors = [np.outer(off, e).ravel() for e in extended]
    truth = sum(np.outer(v, v) for v in vectors)
    truth /= np.diag(truth).mean() * ESTIMATED
    assert np.allclose(kron(memory.anchor.layers["weight"]), truth, rtol=1e-10, atol=1e-12)


def test_matrices_are_those_of_the_definition_joined_over_tasks_and_importance_is_the_diagonal():
    _, _, memory, truth = consolidated()
    for weight, bias in LAYERS.items():
        assert np.allclose(kron(memory.anchor.layers[weight]), truth[weight], rtol=1e-9, atol=1e-12)
        importance = memory.anchor.importance()
        diagonal = stacked(importance[bias], importance[weight])
        assert np.allclose(diagonal, np.diag(truth[weight]), rtol=1e-9)


def test_the_penalty_is_the_dense_quadratic_form():
    model, _, memory, truth = consolidated(average="none")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = {n: p - memory.anchor.point[n] for n, p in model.named_parameters()}
    vectors = {w: stacked(moved[b], moved[w]) for w, b in LAYERS.items()}
    assert float(memory.penalty()) == pytest.approx(0.02 * sum(v @ truth[w] @ v for w, v in vectors.items()), rel=1e-9)
    assert memory.summary().figures["share held in layers"] == 1


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.7), (0.0, 0.7)])
@pytest.mark.parametrize("every", [1, 3])
def test_the_pull_is_the_dense_proximal_step(every, momentum, dampening):
    """(I + 2 * lr * strength * K) d_new = d for each layer, with all learning rates since the last pull."""
    model, _, memory, truth = consolidated(rule=measured_on_data(labels="exact", every=every), average="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum, dampening=dampening)
    memory.attach(optimizer)
    point = {n: p.clone() for n, p in memory.anchor.point.items()}
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=0.3, momentum=momentum, dampening=dampening)
    behind, reach = 0.0, (1 - dampening) / (1 - momentum) if momentum else 1.0

    def draw(behind):
        for weight, bias in LAYERS.items():
            theta = dict(other.named_parameters())
            k = np.eye(len(truth[weight])) + 2 * 0.02 * reach * behind * truth[weight]
            d = np.linalg.solve(k, stacked(theta[bias] - point[bias], theta[weight] - point[weight])).reshape(
                theta[weight].shape[0], -1
            )
            with torch.no_grad():
                theta[bias].copy_(point[bias] + torch.as_tensor(d[:, 0]))
                theta[weight].copy_(point[weight] + torch.as_tensor(d[:, 1:]))

    def assert_close():
        assert all(
            torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(model.parameters(), other.parameters(), strict=True)
        )

    for t, lr in enumerate([0.3, 0.3, 0.1, 0.2, 0.05], start=1):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = lr
        train(model, optimizer, batches(20 + t, 1))
        train(other, plain, batches(20 + t, 1))
        behind += lr
        if t % every == 0:
            draw(behind)
            behind = 0.0
        assert_close()
    memory.consolidate(data(5))
    draw(behind)
    assert_close()


def test_under_adam_a_layer_has_one_step_size_from_the_mean_of_its_denominators():
    model, _, memory, truth = consolidated(average="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    memory.attach(optimizer)
    assert "one mean for each layer" in memory.summary().settings["metric of the pull"]
    other = copy.deepcopy(model)
    plain = torch.optim.Adam(other.parameters(), lr=0.01)
    train(model, optimizer, batches(9, 1))
    train(other, plain, batches(9, 1))
    now, theta, point = dict(model.named_parameters()), dict(other.named_parameters()), memory.anchor.point
    for weight, bias in LAYERS.items():
        second = plain.state[theta[weight]]["exp_avg_sq"] / (1 - 0.999)
        step = 0.01 / float(second.sqrt().mean() + 1e-8)
        d = stacked(theta[bias] - point[bias], theta[weight] - point[weight])
        d = np.linalg.solve(np.eye(len(d)) + 2 * 0.02 * step * truth[weight], d)
        assert np.allclose(stacked(now[bias] - point[bias], now[weight] - point[weight]), d, rtol=1e-8, atol=1e-12)


class Mixed(torch.nn.Module):
    """A convolution, a layer without bias whose output is overwritten, one used through its weight alone, and a tied pair."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv1d(1, 2, 2)
        self.dense = torch.nn.Linear(8, 4, bias=False)
        self.functional = torch.nn.Linear(4, 4)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = torch.nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = self.dense(torch.tanh(self.conv(x.unsqueeze(1))).flatten(1)).relu_()
        h = h + F.linear(h, self.functional.weight, self.functional.bias)
        return self.last(self.second(torch.tanh(self.first(h))))


def test_what_is_no_plain_layer_is_held_as_under_ewc():
    model = Mixed()
    reference, memory = Consolidator(model, EWC()), Consolidator(model, measured_on_data(labels="exact"))
    reference.estimate(data(0))
    with pytest.warns(UserWarning, match=r"layers of `functional\.weight` were not seen at work"):
        memory.estimate(data(0))
    assert set(memory.anchor.layers) == {"dense.weight", "last.weight", "conv.weight", "first.weight"}
    ewc, ours = reference.anchor.omega, memory.anchor.omega
    assert set(ours) == {"functional.weight", "functional.bias", "first.bias", "second.bias"}
    ratio = ewc["first.bias"][0] / ours["first.bias"][0]
    assert all(torch.allclose(ours[n] * ratio, ewc[n], rtol=1e-9) for n in ours)
    mean = torch.cat([o.flatten() for o in ours.values()]).mean()
    assert float(mean) == pytest.approx(1 / ESTIMATED)
    hidden = torch.tanh(model.conv(torch.cat([x for x, _ in data(0)]).unsqueeze(1))).flatten(1)
    layer = memory.anchor.layers["dense.weight"]
    assert layer.arrangement.bias is None
    assert torch.allclose(layer.inputs.matrix()[0], hidden.T @ hidden / len(hidden), rtol=1e-9, atol=1e-12)
    ours, truth = layer.outputs.diagonal()[0], torch.as_tensor(_relu_gradients(model))
    assert torch.allclose(ours / ours.sum(), truth / truth.sum(), rtol=1e-9)


def _relu_gradients(model):
    """The exact Fisher information of a bias that `dense` does not have."""
    shift = torch.zeros(4).double().requires_grad_()
    dense, total = model.dense, np.zeros(4)
    x = torch.cat([x for x, _ in data(0)])
    handle = dense.register_forward_hook(lambda m, a, o: o + shift)
    for one in x:
        score = F.log_softmax(model(one.unsqueeze(0)), 1)[0]
        for value in score:
            (g,) = torch.autograd.grad(value, shift, retain_graph=True)
            total += (value.exp() * g**2).detach().numpy() / len(x)
    handle.remove()
    return total


@pytest.mark.filterwarnings("ignore:The layers of `functional.weight` were not seen at work")
@pytest.mark.parametrize("adam", [False, True])
def test_what_is_held_alone_is_pulled_alone(adam):
    """The proximal step of a weight outside of layers, (theta + w * point) / (1 + w), which makes up for two steps."""
    model = Mixed()
    memory = Consolidator(model, Kronecker(every=2), 0.5, average="none")
    memory.estimate(data(0))
    other = copy.deepcopy(model)
    both = [
        torch.optim.Adam(m.parameters(), lr=0.1) if adam else torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)
    ]
    memory.attach(both[0])
    train(model, both[0], batches(1, 1))
    train(other, both[1], batches(1, 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    train(model, both[0], batches(2, 1))
    train(other, both[1], batches(2, 1))
    second = both[1].state[other.functional.weight]["exp_avg_sq"] / (1 - 0.999**2) if adam else None
    step = 0.1 / (second.sqrt() + 1e-8) if adam else 0.1
    w = 2 * 2 * step * 0.5 * memory.anchor.omega["functional.weight"]
    expected = (other.functional.weight + w * memory.anchor.point["functional.weight"]) / (1 + w)
    assert torch.allclose(model.functional.weight, expected, rtol=1e-10)


def test_along_a_sequence_inputs_are_averaged_and_gradients_summed():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(5, 6, 4).double(), torch.randn(5, 6, 3).double()
    memory = Consolidator(model, measured_on_data(labels="true"))
    memory.estimate([(x, y)], loss=lambda output, target: (output - target).square().sum() / 2)
    extended = torch.cat([torch.ones(5, 6, 1).double(), x], 2).reshape(30, 5)
    d = (model(x) - y).detach().reshape(30, 3)
    a, g = extended.T @ extended / 30, d.T @ d / 5
    scale = torch.outer(g.diagonal(), a.diagonal()).mean() * ESTIMATED
    layer = memory.anchor.layers["weight"]
    assert torch.allclose(layer.inputs.matrix()[0], a, rtol=1e-10)
    assert torch.allclose(layer.outputs.matrix()[0] * scale, g, rtol=1e-10)


def test_labels_drawn_from_the_model_come_near_the_exact_ones():
    model = mlp()
    found = []
    for labels in ("exact", "sample"):
        memory = Consolidator(model, measured_on_data(labels=labels))
        memory.estimate(data(0, 1000))
        found.append(memory.anchor.layers["2.weight"].outputs.matrix())
    assert torch.allclose(*found, atol=0.05 * float(found[0].max()))


def test_measuring_leaves_no_trace_and_a_cap_counts():
    model = mlp()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, other = (Consolidator(model, measured_on_data(labels="exact", samples=n)) for n in (6, None))
    one.estimate(data(0))
    other.estimate(data(0)[:1])
    assert_equal = torch.testing.assert_close
    assert_equal(
        one.anchor.layers["0.weight"].inputs.matrix(), other.anchor.layers["0.weight"].inputs.matrix(), rtol=1e-12, atol=0
    )
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.state_dict(keep_vars=True).items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_file_keeps_the_anchor_and_a_state_what_the_pull_is_behind_with(tmp_path):
    model, optimizer, memory, _ = consolidated(rule=Kronecker(every=4))
    train(model, optimizer, batches(7, 3))
    memory.anchor.save(tmp_path / "anchor.safetensors")
    loaded = Anchor.load(tmp_path / "anchor.safetensors")
    assert type(loaded) is KroneckerAnchor
    theta = dict(model.named_parameters())
    assert float(loaded.penalty(theta)) == float(memory.anchor.penalty(theta)) > 0
    state = memory.state_dict()["turns"]
    assert (state["lengths"]["0.weight"], state["since"]) == (pytest.approx(3 * 2 * 0.02 * 0.1), 3)
    other = copy.deepcopy(model)
    resumed = Consolidator(other, memory.rule)
    resumed.load_state_dict(memory.state_dict())
    assert_same_state(memory, resumed)
    held = [t for layer in memory.anchor.layers.values() for t in (*layer.inputs, *layer.outputs)]
    columns = [memory.anchor.point, memory.anchor.omega, memory.state_dict()["tail"]["average"]]
    sums = [t for entry in memory.state_dict()["moments"]["layers"].values() for t in entry["sums"]]
    assert memory.state_bytes == sum(t.nbytes for t in [*held, *sums, *(t for c in columns for t in c.values())])


@pytest.mark.parametrize("steps", [31, 45, 55])
def test_rows_that_wait_to_be_joined_go_on_waiting_in_a_state(steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(90, 70), torch.nn.Tanh(), torch.nn.Linear(70, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model).attach(optimizer)
    chance = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 90, generator=chance).double(), torch.randint(3, (4,), generator=chance)) for _ in range(80)]
    train(model, optimizer, data[:steps])
    other = copy.deepcopy(model)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    resumed = Consolidator(other)
    resumed.load_state_dict(memory.state_dict())
    resumed.attach(other_optimizer)
    for m, o, c in ((model, optimizer, memory), (other, other_optimizer, resumed)):
        train(m, o, data[steps:])
        c.consolidate()
    assert_same_state(memory, resumed)


def test_adopted_layers_keep_their_quadratic_under_other_names_and_grow():
    _, _, memory, _ = consolidated()
    wide = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 9), "b": torch.nn.Linear(9, 4)}).double()
    wide.forward = lambda x: wide["b"](torch.tanh(wide["a"](x)))
    names = {"0.weight": "a.weight", "0.bias": "a.bias", "2.weight": "b.weight", "2.bias": "b.bias"}
    with torch.no_grad():
        for old, new in names.items():
            p, kept = dict(wide.named_parameters())[new], memory.anchor.point[old]
            p[tuple(map(slice, kept.shape))] = kept + 1
    second = Consolidator(wide, Kronecker(), 1.0)
    second.adopt(memory.anchor, rename=names)
    theta = {n: p + 1 for n, p in memory.anchor.point.items()}
    assert float(second.penalty()) == pytest.approx(float(memory.anchor.penalty(theta)), rel=1e-12)
    assert second.anchor.layers["a.weight"].arrangement.bias == "a.bias"
    assert (second.anchor.importance()["a.weight"][:, 5:] == 0).all()


def test_layers_that_an_adopted_anchor_holds_weight_by_weight_stay_so():
    model = mlp()
    first = Consolidator(model, EWC())
    first.estimate(data(0))
    memory = Consolidator(model, measured_on_data(labels="exact"))
    memory.adopt(ElementwiseAnchor({n: p for n, p in first.anchor.point.items() if n[0] == "0"}, first.anchor.omega))
    memory.consolidate(data(1))
    assert set(memory.anchor.layers) == {"2.weight"}
    assert (memory.anchor.omega["0.weight"] > first.anchor.omega["0.weight"]).all()


def test_a_bias_that_thaws_later_is_held_alone():
    model = mlp()
    model[0].bias.requires_grad_(False)
    memory = Consolidator(model, Kronecker(measure="data"))
    memory.estimate(data(0))
    assert memory.anchor.layers["0.weight"].arrangement.bias is None
    model[0].bias.requires_grad_(True)
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    memory.consolidate(data(1))
    assert memory.anchor.layers["0.weight"].arrangement.bias is None
    assert memory.anchor.omega["0.bias"].sum() > 0
    assert memory.anchor.elementwise.point.keys() == {"0.bias"}


def estimated(labels, batches):
    return Consolidator(mlp(), measured_on_data(labels=labels)).estimate(batches)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Consolidator(mlp(), Kronecker(), pull="gradient"), ValueError, "Kronecker cannot pull on gradients"),
        (lambda: Kronecker(every=0), ValueError, "`every` of Kronecker must be"),
        (lambda: Kronecker(labels="all"), ValueError, "one of exact, sample, true"),
        (lambda: Kronecker(samples=0), ValueError, "`samples` of Kronecker must be"),
        (lambda: Consolidator(mlp(), EWC()).adopt(consolidated(1)[2].anchor), ValueError, r"Use the rule `Kronecker\(\)`"),
        (lambda: consolidated(1)[2].anchor.merge({}, []), TypeError, "merged into a KroneckerAnchor"),
        (lambda: estimated("true", [(torch.ones(2, 5).double(), torch.ones(3).long())]), ValueError, r"\(3,\).* 2 examples"),
        (lambda: estimated("true", [torch.ones(2, 5).double()]), ValueError, "without a target"),
        (lambda: estimated("exact", []), ValueError, "no examples"),
        (lambda: estimated("sample", [torch.full((2, 5), torch.nan).double()]), ValueError, "NaN or infinite"),
    ],
)  # fmt: skip
def test_refusals(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("damage", ["inputs", "outputs", "bias", "tasks", "groups", "missing"])
def test_damaged_layers_are_refused_and_change_nothing(damage):
    _, _, memory, _ = consolidated(1)
    state = memory.state_dict()
    entry = state["anchor"]["layers"]["0.weight"]
    if damage == "missing":
        del entry["inputs"]
    else:
        entry[damage] = {"bias": "2.bias", "tasks": 1.5, "groups": 2}.get(damage, [torch.zeros(2, 2), torch.zeros(2)])
    other = Consolidator(mlp(), memory.rule)
    with pytest.raises(ValueError, match=r"state is damaged: `0\.weight`"):
        other.load_state_dict(state)
    assert not len(other.anchor)


def test_the_runner_takes_it_by_name_and_settings():
    stream = bench.permuted("digits", tasks=2)
    record = bench.run(
        stream, Kronecker(measure="data", labels="exact", samples=100), training=bench.Training(hidden=(16,), batch_size=50)
    )
    assert (record.method, record.config["pull"], record.config["average"]) == ("kronecker", "proximal", "tail")
    assert record.config["strength"] == Kronecker.defaults.strength


class Shared(torch.nn.Module):
    """An autoencoder whose second half is the first one's weight, a norm, and a layer that takes its input by keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = torch.nn.Linear(5, 4), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(input=self.norm(F.linear(torch.tanh(self.first(x)), self.first.weight.T)))


def doubled():
    model = mlp()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return model


@pytest.mark.parametrize(("make", "odd", "fine"), [(Shared, "first", "last"), (doubled, "0", "2")])
def test_a_layer_whose_weight_has_another_gradient_is_held_as_under_ewc(make, odd, fine):
    model = make()
    memory = Consolidator(model, measured_on_data(labels="exact"))
    with pytest.warns(UserWarning, match=rf"give \(`{odd}.weight`\)") as caught:
        memory.estimate(data(0))
    assert len(caught) == 1
    assert set(memory.anchor.layers) == {f"{fine}.weight"}
    ours, theta = memory.anchor.omega, dict(model.named_parameters())
    x = torch.cat([x for x, _ in data(0)])
    truth = {name: sum(p * d[name] ** 2 for p, d in dense_fisher(model, x)) for name in theta}
    ratio = truth[f"{odd}.bias"] / ours[f"{odd}.bias"]
    assert torch.allclose(ours[f"{odd}.weight"] * ratio[0], truth[f"{odd}.weight"], rtol=1e-9)


class Times(torch.nn.Module):
    def forward(self, x):
        return 3 * x


def test_a_hook_that_changes_an_output_is_no_part_of_the_layer():
    model, plain = mlp(), mlp()
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    plain = torch.nn.Sequential(plain[0], Times(), plain[1], plain[2])
    ours, truth = (Consolidator(m, measured_on_data(labels="exact")) for m in (model, plain))
    for memory in (ours, truth):
        memory.estimate(data(0))
    for name, other in {"0": "0", "2": "3"}.items():
        one, two = ours.anchor.importance()[f"{name}.weight"], truth.anchor.importance()[f"{other}.weight"]
        assert torch.allclose(one, two, rtol=1e-9)


def test_under_a_hook_on_all_modules_that_changes_outputs_layers_are_left_out():
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: 3 * out if m is model[0] else None)
    model = mlp()
    memory = Consolidator(model, measured_on_data(labels="exact"))
    with hook, pytest.warns(UserWarning, match=r"give \(`0.weight`\)"):
        memory.estimate(data(0))
    assert set(memory.anchor.layers) == {"2.weight"}


class Twice(torch.nn.Module):
    """Calls a layer once more, without gradients."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        with torch.no_grad():
            fixed = self.net[0](10 * x)
        return self.net[2](torch.tanh(self.net[0](x)) + fixed)


def test_a_call_without_gradients_does_not_count():
    memory = Consolidator(Twice(), measured_on_data(labels="exact"))
    memory.estimate(data(0))
    x = torch.cat([x for x, _ in data(0)])
    extended = torch.cat([torch.ones(len(x), 1).double(), x], 1)
    inputs = memory.anchor.layers["net.0.weight"].inputs.matrix()
    assert torch.allclose(inputs[0], extended.T @ extended / len(x), rtol=1e-9)


def test_a_pull_that_overflows_goes_all_the_way():
    """Truth: w / (1 + w) where w is infinity."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, Kronecker(every=1), strength=1e30, average="none").attach(optimizer)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    for task in range(2):
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if task == 0:
            memory.consolidate()
            for omega in memory.anchor.omega.values():
                omega.mul_(1e30)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), memory.anchor.point[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["frozen weights", "no learning rate for weights", "no learning rate for biases"])
@pytest.mark.parametrize("adam", [False, True])
def test_a_bias_whose_weight_makes_no_step_is_pulled_alone_and_what_makes_none_stays(how, adam):
    """To the minimum over the bias of step / 2 * v^T kron(G, A) v + |b' - b|^2 / 2, wherever the weight is."""
    model, optimizer, memory, truth = consolidated(rule=measured_on_data(labels="exact", every=2), average="none")
    train(model, optimizer, batches(9, 1))  # the weights leave the anchor, too
    lrs = {"weight": 0.0 if how == "no learning rate for weights" else 0.1, "bias": 0.0 if how.endswith("biases") else 0.1}
    groups = [{"params": [p for n, p in model.named_parameters() if key in n], "lr": lr} for key, lr in lrs.items()]
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(groups)
    memory.detach()
    memory.attach(optimizer)
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(how != "frozen weights")
    memory._memory.turns.reset()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = copy.deepcopy((model, optimizer))
    for stream in (batches(1, 1), batches(2, 1)):
        train(model, optimizer, stream)
        train(*twin, stream)
    now, theta, point = dict(model.named_parameters()), dict(twin[0].named_parameters()), memory.anchor.point
    for weight, bias in LAYERS.items():
        if how.endswith("biases"):
            assert torch.equal(now[bias], start[bias])
            assert not torch.equal(now[weight], theta[weight])
            continue
        assert torch.equal(now[weight], start[weight])
        second = twin[1].state[theta[bias]]["exp_avg_sq"] / (1 - 0.999**2) if adam else None
        step = 2 * 0.02 * 0.2 / (float(second.sqrt().mean()) + 1e-8 if adam else 1)
        v = torch.as_tensor(stacked(theta[bias] - point[bias], theta[weight] - point[weight]))
        ours = torch.arange(0, len(v), len(v) // len(theta[bias]))
        k = step * torch.as_tensor(truth[weight])
        move = torch.linalg.solve(k[ours][:, ours] + torch.eye(len(ours)), -(k @ v)[ours])
        assert not torch.allclose(move, torch.zeros(()).double(), atol=1e-6)
        assert torch.allclose(now[bias], theta[bias] + move, rtol=1e-8, atol=1e-12)


def partly_odd(tasks=2, term=True):
    """A model whose first layer has a term on its weight in the loss from the second task on, and its squared gradients."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, Kronecker(m=1, every=1, rank=None, share=1.0), 0.02, average="none").attach(optimizer)
    train(model, optimizer, batches(0, 5))
    memory.consolidate()
    first, squares = dict(memory.anchor.layers), []
    for task in range(1, tasks):
        found = []
        for n, (x, y) in enumerate(data(task, 5)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + (0.3 * model[0].weight.square().sum() if term else 0)).backward()
            found.append([p.grad.square() for p in model[0].parameters()])
            if term and task == 1 and n == 0:
                with pytest.warns(UserWarning, match=r"other gradients than inputs and outputs give \(`0\.weight`\)"):
                    optimizer.step()
            else:
                optimizer.step()
        memory.consolidate()
        squares.append([sum(g) / 5 for g in zip(*found, strict=True)])
    return model, optimizer, memory, first["0.weight"], squares


def test_a_layer_that_no_longer_fits_is_held_by_both_what_it_was_and_one_by_one():
    model, optimizer, memory, first, squares = partly_odd(tasks=3)
    truth = {"0.weight": 0.0, "0.bias": 0.0}
    for weight, bias in squares:
        unit = torch.cat([weight.flatten(), bias]).mean() * 5**0.5
        truth = {"0.weight": truth["0.weight"] + weight / unit, "0.bias": truth["0.bias"] + bias / unit}
    anchor = memory.anchor
    assert anchor.omega.keys() == truth.keys()
    assert all(torch.allclose(anchor.omega[n], o, rtol=1e-9) for n, o in truth.items())
    assert (anchor.layers["0.weight"].tasks, anchor.layers["2.weight"].tasks) == (1, 3)
    assert np.allclose(kron(anchor.layers["0.weight"]), kron(first), rtol=1e-10)
    dense = {w: kron(layer) for w, layer in anchor.layers.items()}
    dense["0.weight"] = dense["0.weight"] + np.diag(stacked(truth["0.bias"], truth["0.weight"]))
    importance, totals = anchor.importance(), anchor.totals(ALONE)
    for weight, bias in LAYERS.items():
        assert np.allclose(stacked(importance[bias], importance[weight]), np.diag(dense[weight]), rtol=1e-9)
        assert totals[weight] + totals[bias] == pytest.approx(np.trace(dense[weight]), rel=1e-9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = {n: p - anchor.point[n] for n, p in model.named_parameters()}
    vectors = {w: stacked(moved[b], moved[w]) for w, b in LAYERS.items()}
    assert float(memory.penalty()) == pytest.approx(0.02 * sum(v @ dense[w] @ v for w, v in vectors.items()), rel=1e-9)
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    train(model, optimizer, batches(7, 1))
    train(other, plain, batches(7, 1))
    step, point, free = 2 * 0.02 * 0.1, anchor.point, dict(other.named_parameters())
    d = stacked(free["0.bias"] - point["0.bias"], free["0.weight"] - point["0.weight"])
    d = np.linalg.solve(np.eye(len(d)) + step * kron(first), d)  # one after the other
    d = d / (1 + step * stacked(truth["0.bias"], truth["0.weight"]))
    now = dict(model.named_parameters())
    assert np.allclose(stacked(now["0.bias"] - point["0.bias"], now["0.weight"] - point["0.weight"]), d, rtol=1e-8, atol=1e-12)


def test_what_is_held_by_both_is_saved_followed_and_renamed(tmp_path):
    model, optimizer, memory, _, _ = partly_odd()
    memory.anchor.save(tmp_path / "anchor.safetensors")
    for anchor in (Anchor.load(tmp_path / "anchor.safetensors"), memory.anchor.renamed({n: n for n in memory.anchor.point})):
        assert all(torch.equal(o, anchor.importance()[n]) for n, o in memory.anchor.importance().items())
    without = memory.anchor.renamed({n: f"new.{n}" for n in memory.anchor.point if n != "0.weight"})  # the bias remains
    assert "new.0.weight" not in without.layers
    assert torch.allclose(without.importance()["new.0.bias"], memory.anchor.importance()["0.bias"], rtol=1e-12)
    resumed = Consolidator(copy.deepcopy(model), memory.rule, 0.02, average="none")
    step = torch.optim.SGD(resumed.model.parameters(), lr=0.1)
    resumed.load_state_dict(memory.state_dict())
    resumed.attach(step)
    for m, o, c in ((model, optimizer, memory), (resumed.model, step, resumed)):
        train(m, o, batches(3, 3))
        c.consolidate()
    assert_same_state(memory, resumed)
    assert memory.anchor.layers["0.weight"].tasks == 1
    before = memory.anchor.importance()
    wide = torch.nn.Linear(5, 9).double()
    with torch.no_grad():
        wide.weight[:7], wide.bias[:7] = model[0].weight, model[0].bias
    grown = {"0.weight": wide.weight.detach(), "0.bias": wide.bias.detach()}
    grown |= {n: p.detach() for n, p in model.named_parameters() if n not in grown}
    after = memory.anchor.align(grown).importance()
    assert torch.allclose(after["0.weight"][:7], before["0.weight"], rtol=1e-9)
    assert not after["0.weight"][7:].any()


def test_a_layer_that_fits_is_not_held_one_by_one():

    _, _, memory, _, _ = partly_odd(term=False)
    assert memory.anchor.layers["0.weight"].tasks == 2
    assert not memory.anchor.omega
