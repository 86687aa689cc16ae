"""Adapters are held by their product: against dense matrices and plain autograd, in float64."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Lora, assert_same_state, batches, tensors, train
from rwalk import Anchor, Consolidator, Kronecker
from rwalk.anchors.held import Product
from rwalk.anchors.kronecker import KroneckerAnchor
from rwalk.anchors.products import ProductFactor
from rwalk.anchors.spectrum import SecondMoment
from rwalk.gradients import adapters

EXACT = {"rank": None, "share": 1.0}
UP, DOWN = "first.lora_B.one.weight", "first.lora_A.one.weight"


class Net(nn.Module):
    def __init__(self, width=7, inputs=5, **more):
        super().__init__()
        self.first, self.second = Lora(inputs, width, **more), Lora(width, 3, **more)
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net(**more):
    torch.manual_seed(1)
    return Net(**more)


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


def attached(model, rule=None, lr=0.1, strength=0.1, average="none", make=torch.optim.SGD):
    optimizer = make(learning(model), lr=lr)
    return optimizer, Consolidator(model, rule or Kronecker(), strength, average=average).attach(optimizer)


def trained(model=None, rule=None, tasks=1, steps=11, **more):
    model = net() if model is None else model
    optimizer, memory = attached(model, rule, **more)
    for task in range(tasks):
        train(model, optimizer, batches(task, steps))
        memory.consolidate()
    return model, optimizer, memory


def batch(seed=0, size=6):
    ((x, y),) = batches(seed, 1, size)
    return torch.as_tensor(x), torch.as_tensor(y)


def shaken(model, by=0.3):
    """Move what learns somewhere else."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in learning(model):
            p.add_(by * torch.randn_like(p))


def products(anchor):
    return {name: layer for name, layer in anchor.layers.items() if isinstance(layer, ProductFactor)}


def dense(anchor, theta, names=None):
    """Sum of tr(D^T G D A), written out."""
    total = 0.0
    for up, layer in products(anchor).items():
        if names is not None and up not in names:
            continue
        down = layer.arrangement.down
        d = layer.arrangement.scale * (theta[up] @ theta[down] - anchor.point[up] @ anchor.point[down])
        total = total + torch.trace(d.T @ layer.outputs.matrix()[0] @ d @ layer.inputs.matrix()[0])
    return total


# what is measured


def outputs_of(model, x):
    """Inputs and outputs of both layers; gradients may be asked for at the outputs."""
    one = model.first(x)
    hidden = torch.tanh(one)
    return (x, one), (hidden.detach(), model.second(hidden))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_step_measures_inputs_before_dropout_and_gradients_of_the_whole_layers_outputs(dropout):
    model = net(dropout=dropout)
    optimizer, memory = attached(model, Kronecker(**EXACT), lr=0.0)
    x, y = batch()
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    memory.consolidate()
    torch.manual_seed(3)
    layers = outputs_of(model, x)
    deltas = torch.autograd.grad(F.cross_entropy(layers[1][1], y) * len(x), [out for _, out in layers])
    truth = [(seen.T @ seen / len(x), d.T @ d / len(x)) for (seen, _), d in zip(layers, deltas, strict=True)]
    diagonals = torch.cat([torch.outer(g.diagonal(), a.diagonal()).flatten() for a, g in truth])
    assert set(memory.anchor.layers) == {UP, "second.lora_B.one.weight"}
    for (a, g), layer in zip(truth, memory.anchor.layers.values(), strict=True):
        assert isinstance(layer, ProductFactor)
        assert layer.arrangement.scale == 1.5
        assert torch.allclose(layer.inputs.matrix()[0], a.detach(), rtol=1e-9, atol=1e-12)
        assert torch.allclose(layer.outputs.matrix()[0] * diagonals.mean(), g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimate", [False, True])
def test_data_measures_the_same_matrices_with_all_labels_by_their_probabilities(estimate):
    model = net()
    memory = Consolidator(model, Kronecker(measure="data", labels="exact", **EXACT), average="none")
    x, y = batch()
    if estimate:
        memory.estimate([(x, y)])
        steps = 300
    else:
        optimizer = torch.optim.SGD(learning(model), lr=0.0)
        memory.attach(optimizer)
        train(model, optimizer, [(x, y)])
        memory.consolidate([(x, y)])
        steps = 1
    layers = outputs_of(model, x)
    scores = F.log_softmax(layers[1][1], 1)
    truth = [[seen.T @ seen / len(x), 0.0] for seen, _ in layers]
    for c in range(3):
        weight = scores[:, c].detach().exp().sqrt()
        found = torch.autograd.grad((scores[:, c] * weight).sum(), [out for _, out in layers], retain_graph=True)
        for entry, d in zip(truth, found, strict=True):
            entry[1] = entry[1] + d.T @ d / len(x)
    unit = torch.cat([torch.outer(g.diagonal(), a.diagonal()).flatten() for a, g in truth]).mean() * steps**0.5
    for (a, g), layer in zip(truth, products(memory.anchor).values(), strict=True):
        assert torch.allclose(layer.inputs.matrix()[0], a, rtol=1e-9, atol=1e-12)
        assert torch.allclose(layer.outputs.matrix()[0], g / unit, rtol=1e-9, atol=1e-12)


def test_tasks_join_as_those_of_any_layer_and_the_state_is_as_large_after_each():
    model = net()
    optimizer, memory = attached(model, Kronecker(m=1, rank=3, share=1.0), lr=0.05)
    singles, sizes = [], []
    for task in range(4):
        train(model, optimizer, batches(task, 5))
        moments = memory._memory.moments.moments()[UP]
        memory.consolidate()
        singles.append(moments)
        sizes.append((memory.state_bytes, sum(t.numel() for t in tensors(memory).values() if torch.is_tensor(t))))
        assert all(torch.equal(memory.anchor.point[n], p) for n, p in model.named_parameters() if p.requires_grad)
    assert len(set(sizes)) == 1
    layer = memory.anchor.layers[UP]
    assert layer.tasks == 4
    mean = sum(m.inputs.trace.item() for m in singles) / 4
    assert layer.inputs.diagonal().sum().item() == pytest.approx(mean, rel=1e-9)


# the quadratic


@pytest.mark.parametrize("rank", [None, 2])
def test_the_penalty_is_that_of_the_dense_product(rank):
    model, _, memory = trained(rule=Kronecker(rank=rank), tasks=2)
    assert float(memory.penalty()) == 0
    shaken(model)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    assert float(memory.penalty()) == pytest.approx(0.1 * float(dense(memory.anchor, theta)), rel=1e-10)


def test_what_changes_the_factors_and_not_their_product_costs_nothing_and_is_not_pulled():
    model, _, memory = trained()
    mix = torch.tensor([[2.0, 0.5], [-1.0, 0.3]]).double()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.lora_B.one.weight.copy_(layer.lora_B.one.weight @ mix)
            layer.lora_A.one.weight.copy_(torch.linalg.inv(mix) @ layer.lora_A.one.weight)
    assert float(memory.penalty()) == pytest.approx(0, abs=1e-14)
    before = [p.clone() for p in learning(model)]
    theta = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    memory.anchor.draw(theta, Lengths(1e6), theta)
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(learning(model), before, strict=True))


def test_importance_is_the_curvature_of_the_penalty_at_the_point():
    model, _, memory = trained(rule=Kronecker(rank=2))
    anchor = memory.anchor
    found = anchor.importance()
    for name in (UP, DOWN):
        point = {n: p.clone() for n, p in anchor.point.items()}

        def penalty(values, name=name, point=point):
            return dense(anchor, {**point, name: values})

        hessian = torch.autograd.functional.hessian(penalty, anchor.point[name])
        n = anchor.point[name].numel()
        assert torch.allclose(hessian.reshape(n, n).diagonal() / 2, found[name].flatten(), rtol=1e-9, atol=1e-12)
    shares = memory.summary()
    assert shares.figures["share held in layers"] == pytest.approx(sum(map(torch.numel, learning(model))) / count(model))
    totals = anchor.totals(memory._memory.protected.shard_group)
    assert all(totals[name] == pytest.approx(float(o.sum()), rel=1e-9) for name, o in found.items())


def count(model):
    return sum(p.numel() for p in learning(model))


# the pull


class Lengths:
    """Steps of given lengths; 0 for all others."""

    def __init__(self, length, only=None):
        self.length, self.only = length, only

    def mean(self, name):
        return self.length if self.only is None or name in self.only else 0.0


def layer_of(inputs=6, outputs=5, rank=2, known=3, grown=False, scale=1.3):
    """An adapter's quadratic, its point, and factors elsewhere."""
    torch.manual_seed(0)
    sides = []
    for size in (inputs, outputs):
        moment = SecondMoment.zeros(1, size, known, torch.zeros(0).double())
        moment.add(torch.randn(1, 30, size).double() * torch.logspace(0, -1, size).double())
        side = moment.spectrum(0.9, known)
        sides.append(side.placed(torch.tensor([i + (i > 1) for i in range(size)]), size + 2) if grown else side)
    shapes = {"up": (sides[1].size, rank), "down": (rank, sides[0].size)}
    point, theta = ({n: torch.randn(shape).double() for n, shape in shapes.items()} for _ in range(2))
    return KroneckerAnchor(point, {}, {"up": ProductFactor(Product("down", scale), *sides)}), theta


CASES = pytest.mark.parametrize("more", [{}, {"known": None}, {"grown": True}, {"rank": 1}, {"rank": 7, "scale": 0.5}], ids=str)


@CASES
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("step", [0.01, 0.7, 40.0])
def test_each_factor_moves_to_the_dense_minimiser_with_the_other_as_it_is(more, name, step):
    anchor, theta = layer_of(**more)
    start = theta[name].clone()

    def objective(values):
        return (
            step / 2 * dense_of(anchor, {**theta, name: values.reshape(start.shape)})
            + (values - start.flatten()).square().sum() / 2
        )

    zero = torch.zeros(start.numel()).double()
    gradient = torch.autograd.functional.jacobian(objective, zero)
    hessian = torch.autograd.functional.hessian(objective, zero)
    truth = torch.linalg.solve(hessian, -gradient).reshape(start.shape)
    anchor.draw(theta, Lengths(step, {name}), theta)
    assert torch.allclose(theta[name], truth, rtol=1e-8, atol=1e-9)


def dense_of(anchor, theta):
    return dense(anchor, theta)


@CASES
def test_a_short_pull_goes_along_the_gradient_of_the_dense_penalty(more):
    anchor, theta = layer_of(**more)
    variables = {n: t.clone().requires_grad_() for n, t in theta.items()}
    gradients = torch.autograd.grad(dense(anchor, variables), list(variables.values()))
    before = {n: t.clone() for n, t in theta.items()}
    anchor.draw(theta, Lengths(1e-10), theta)
    for (name, then), g in zip(before.items(), gradients, strict=True):
        assert torch.allclose((then - theta[name]) / 1e-10, g / 2, rtol=1e-4, atol=1e-4 * float(g.abs().max()))


@CASES
@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3, 1e8, 1e300])
def test_no_strength_overshoots_and_a_huge_one_brings_the_product_back(more, step):
    anchor, theta = layer_of(**more)
    before = float(dense(anchor, theta))
    for _ in range(3):
        anchor.draw(theta, Lengths(step), theta)
        now = float(dense(anchor, theta))
        assert now <= before * (1 + 1e-9) + 1e-12
        before = now
        assert all(torch.isfinite(t).all() for t in theta.values())
    if step >= 1e8:
        assert before < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_near_zero_and_low_precision_stay_finite(dtype):
    anchor, theta = layer_of()
    point = {n: p.to(dtype) for n, p in anchor.point.items()}
    for start in ({n: torch.zeros_like(p) for n, p in point.items()}, {n: p * 1e-3 for n, p in point.items()}, dict(theta)):
        moved = {n: t.to(dtype, copy=True) for n, t in start.items()}
        held = KroneckerAnchor(point, {}, anchor.layers).align(moved)
        for step in (1e-3, 1e3, 1e30):
            held.draw(moved, Lengths(step), moved)
            assert all(torch.isfinite(t).all() for t in moved.values())
        assert torch.isfinite(held.penalty(moved))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_training_at_any_strength_is_finite_and_holds_harder(make):
    drifts = []
    for strength in (0.0, 1e-2, 1.0, 1e2, 1e5, 1e10):
        model, optimizer, memory = trained(lr=0.05, strength=strength, make=make)
        train(model, optimizer, batches(1, 40))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        drifts.append(float(dense(memory.anchor, model.state_dict())))
    assert all(b <= a * 1.001 for a, b in pairwise(drifts)), drifts
    assert drifts[-1] < 1e-6 * drifts[0]


def test_a_turn_is_one_pull_of_all_steps_since():
    model, optimizer, memory = trained(strength=0.3)
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(learning(other), lr=0.1)
    train(model, optimizer, batches(4, 10))
    train(other, plain, batches(4, 10))
    theta = {n: p.detach() for n, p in other.named_parameters() if p.requires_grad}
    memory.anchor.draw(theta, Lengths(10 * 2 * 0.3 * 0.1), theta)
    for name, p in model.named_parameters():
        assert torch.allclose(p, dict(other.named_parameters())[name], rtol=1e-9, atol=1e-12)


# what goes on around it


def test_a_state_in_the_middle_of_a_task_continues_bit_for_bit(tmp_path):
    model, optimizer, memory = trained(average="tail")
    train(model, optimizer, batches(1, 13))
    memory.save(tmp_path / "state")
    again = net()
    again.load_state_dict(model.state_dict())
    second = torch.optim.SGD(learning(again), lr=0.1)
    loaded = Consolidator(again, Kronecker(), 0.1, average="tail")
    loaded.load(tmp_path / "state")
    loaded.attach(second)
    assert_same_state(loaded, memory)
    copied = copy.deepcopy((model, optimizer, memory))
    runs = [(model, optimizer, memory), (again, second, loaded), copied]
    for one, its, held in runs:
        train(one, its, batches(2, 18))
        held.consolidate()
        train(one, its, batches(3, 11))
    for one, _, held in runs[1:]:
        assert_same_state(held, memory)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True))


def test_an_anchor_is_saved_and_adopted_under_other_names(tmp_path):
    model, _, memory = trained()
    memory.anchor.save(tmp_path / "anchor")
    anchor = Anchor.load(tmp_path / "anchor")

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x):
            return self.inner(x)

    other = Around()
    optimizer, held = attached(other)
    held.adopt(anchor, rename=lambda name: f"inner.{name}")
    layer = held.anchor.layers[f"inner.{UP}"]
    assert layer.arrangement.down == f"inner.{DOWN}"
    shaken(model)
    shaken(other)
    assert float(held.penalty()) == pytest.approx(float(memory.penalty()), rel=1e-12)
    train(other, optimizer, batches(1, 11))
    held.consolidate()
    assert held.anchor.layers[f"inner.{UP}"].tasks == 2


@pytest.mark.parametrize("spoil", ["down", "scale", "inputs", "tasks"])
def test_damage_is_named(tmp_path, spoil):
    _, _, memory = trained()
    content = memory.state_dict()
    entry = content["anchor"]["layers"][UP]
    entry[spoil] = {"down": "second.lora_A.one.weight", "scale": 1, "inputs": entry["inputs"][:2], "tasks": 0}[spoil]
    with pytest.raises(ValueError, match=r"lora_B\.one"):
        Consolidator(net(), Kronecker(), 0.1, average="none").load_state_dict(content)


def test_a_wider_adapter_keeps_its_quadratic_and_what_joins_the_layer_counts_nothing():
    model, _, memory = trained()
    point = memory.anchor.point
    shaken(model)
    theta = {n: p.detach() for n, p in model.named_parameters() if n in point}
    before = float(memory.anchor.penalty(theta))
    wide = dict(theta)
    wide[UP] = torch.cat([theta[UP], torch.zeros(7, 1).double()], 1)
    wide[DOWN] = torch.cat([theta[DOWN], torch.randn(1, 5).double()])
    assert float(memory.anchor.align(wide).penalty(wide)) == pytest.approx(before, rel=1e-10)
    wide[UP], wide[DOWN] = F.pad(theta[UP], (0, 0, 0, 2)), F.pad(theta[DOWN], (0, 3))
    grown = memory.anchor.align(wide)
    wide[UP], wide[DOWN] = wide[UP].clone(), wide[DOWN].clone()
    wide[UP][7:], wide[DOWN][:, 5:] = 3.0, -2.0
    assert float(grown.penalty(wide)) == pytest.approx(before, rel=1e-10)
    assert (grown.importance()[UP][7:] == 0).all()


def test_one_factor_without_the_other_is_held_element_by_element():
    _, _, memory = trained()
    anchor, diagonal = memory.anchor, memory.anchor.importance()
    kept = {n: p for n, p in anchor.point.items() if n != DOWN}
    assert torch.equal(anchor.align(kept).omega[UP], diagonal[UP])
    renamed = anchor.renamed({UP: "other"})
    assert torch.equal(renamed.omega["other"], diagonal[UP])
    assert not renamed.layers
    with pytest.warns(UserWarning, match="held element by element"):
        alone = anchor.without_products()
    assert not alone.layers
    assert all(torch.equal(o, diagonal[n]) for n, o in alone.omega.items())


def test_each_of_two_active_adapters_is_held_by_itself_in_the_same_matrices():
    model = net(keys=("one", "two"))
    _, _, memory = trained(model)
    one, two = (memory.anchor.layers[f"first.lora_B.{key}.weight"] for key in ("one", "two"))
    assert torch.equal(one.inputs.matrix(), two.inputs.matrix())
    assert torch.equal(one.outputs.matrix(), two.outputs.matrix())
    shaken(model)
    assert float(memory.penalty()) == pytest.approx(0.1 * float(dense(memory.anchor, model.state_dict())), rel=1e-10)


def switched(model, key):
    """As PEFT's `set_adapter`."""
    for layer in (model.first, model.second):
        layer.active_adapters = [key]
        for other in layer.lora_A:
            layer.lora_A[other].requires_grad_(other == key)
            layer.lora_B[other].requires_grad_(other == key)


def test_an_adapter_for_each_task_is_measured_in_its_own_task_alone():
    model = net(keys=("one", "two"))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora" in n], lr=0.1)
    switched(model, "one")
    memory = Consolidator(model, Kronecker(), 0.1, average="none").attach(optimizer)
    train(model, optimizer, batches(0, 11))
    memory.consolidate()
    first = {n: copy.deepcopy(layer) for n, layer in memory.anchor.layers.items()}
    assert set(first) == {UP, "second.lora_B.one.weight"}
    switched(model, "two")
    train(model, optimizer, batches(1, 11))
    memory.consolidate()
    assert set(products(memory.anchor)) == {*first, "first.lora_B.two.weight", "second.lora_B.two.weight"}
    assert not memory.anchor.omega
    for name, layer in first.items():
        assert torch.equal(memory.anchor.layers[name].inputs.matrix(), layer.inputs.matrix())
        assert memory.anchor.layers[name].tasks == 1


def test_what_is_held_beside_adapters_is_as_without_them():
    """A head that learns as a whole."""
    model = net()
    model.second = nn.Linear(7, 3).double()
    model, _, memory = trained(model)
    assert isinstance(memory.anchor.layers[UP], ProductFactor)
    layer = memory.anchor.layers["second.weight"]
    assert layer.arrangement.bias == "second.bias"
    assert not memory.anchor.omega


# merged adapters


def merged(layer, key="one", sign=1):
    """Add an adapter's product to the layer's own weight, as PEFT's `merge` does."""
    with torch.no_grad():
        product = layer.lora_B[key].weight @ layer.lora_A[key].weight * layer.scaling[key]
        layer.base_layer.weight.add_(sign * product)


def reset(layer, key="one"):
    torch.manual_seed(8)
    nn.init.zeros_(layer.lora_B[key].weight)
    nn.init.normal_(layer.lora_A[key].weight)


def whole_weights(model):
    """The weights of both layers with what adapters add."""
    found = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        gains = [layer.lora_B[k].weight @ layer.lora_A[k].weight * layer.scaling[k] for k in layer.active_adapters]
        found[name] = (layer.base_layer.weight + sum(gains)).detach().clone()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("between", ["nothing", "attach", "save"])
def test_where_the_base_has_taken_an_adapter_up_the_whole_weight_stays_held(dtype, between, tmp_path):
    model = net()
    for layer in (model.first, model.second):
        layer.base_layer.to(dtype)
        layer.register_forward_pre_hook(lambda layer, args: layer.base_layer.double() and None)
        layer.register_forward_hook(lambda layer, args, out: layer.base_layer.to(dtype) and None)
    model, optimizer, memory = trained(model)
    before, layers = whole_weights(model), dict(memory.anchor.layers)
    for layer in (model.first, model.second):
        merged(layer)
        reset(layer)
    if between == "attach":
        memory.detach()
        memory.attach(torch.optim.SGD(learning(model), lr=0.1))
    if between == "save":
        memory.save(tmp_path / "state")
        memory.load(tmp_path / "state")
    assert float(memory.penalty()) == 0
    train(model, optimizer if between != "attach" else memory._memory.optimizer, batches(1, 10))
    assert all((memory.anchor.point[n] == 0).all() for n in layers)
    assert all(memory.anchor.layers[n].tasks == 1 for n in layers)
    truth = 0.0
    for (name, then), now in zip(before.items(), whole_weights(model).values(), strict=True):
        d, layer = now - then, layers[f"{name}.lora_B.one.weight"]
        truth += float(torch.trace(d.T @ layer.outputs.matrix()[0] @ d @ layer.inputs.matrix()[0]))
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert float(memory.penalty()) == pytest.approx(0.1 * truth, rel=close)
    assert truth > 0


@pytest.mark.parametrize("anew", [True, False], ids=["merged", "in place"])
def test_products_are_held_as_they_were_where_adapters_count_more_or_less_now(anew):
    model, optimizer, memory = trained()
    before, layers = whole_weights(model), dict(memory.anchor.layers)
    for layer in (model.first, model.second):
        if anew:
            merged(layer)
            reset(layer)
        layer.scaling["one"] = 0.5
    train(model, optimizer, batches(1, 10))
    truth = 0.0
    for (name, then), now in zip(before.items(), whole_weights(model).values(), strict=True):
        d, layer = now - then, layers[f"{name}.lora_B.one.weight"]
        truth += float(torch.trace(d.T @ layer.outputs.matrix()[0] @ d @ layer.inputs.matrix()[0]))
    assert float(memory.penalty()) == pytest.approx(0.1 * truth, rel=1e-9) != 0


def test_merging_for_a_while_changes_nothing():
    model, optimizer, memory = trained()
    anchor = memory.anchor
    for layer in (model.first, model.second):
        merged(layer)
        layer.merged = True
    assert float(memory.penalty()) == 0
    for layer in (model.first, model.second):
        merged(layer, sign=-1)
        layer.merged = False
    train(model, optimizer, batches(1, 10))
    assert float(memory.penalty()) > 0
    assert memory.anchor is anchor


def test_of_two_adapters_only_the_merged_one_starts_anew():
    model = net(keys=("one", "two"))
    model, optimizer, memory = trained(model)
    merged(model.first, "two")
    reset(model.first, "two")
    assert float(memory.penalty()) == 0
    assert (memory.anchor.point["first.lora_B.two.weight"] == 0).all()
    assert (memory.anchor.point[UP] != 0).any()
    train(model, optimizer, batches(1, 11))
    memory.consolidate()
    assert {layer.tasks for layer in memory.anchor.layers.values()} == {2}


def test_a_base_that_has_changed_otherwise_is_no_longer_held_with_a_warning():
    model, optimizer, memory = trained()
    with torch.no_grad():
        model.first.base_layer.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="not by the products of their adapters"):
        train(model, optimizer, batches(1, 10))
    assert set(memory.anchor.point) == {"second.lora_A.one.weight", "second.lora_B.one.weight"}
    assert set(memory.anchor.importance()) == set(memory.anchor.point)
    memory.consolidate()
    assert {n: layer.tasks for n, layer in memory.anchor.layers.items()} == {UP: 1, "second.lora_B.one.weight": 2}


# what is not measured so


def test_factors_of_which_one_is_frozen_are_held_as_layers():
    model = net()
    model.first.lora_A.requires_grad_(False)
    _, _, memory = trained(model)
    assert set(products(memory.anchor)) == {"second.lora_B.one.weight"}
    assert memory.anchor.layers[UP].inputs.size == 2


def test_dora_is_held_as_before_with_one_warning():
    adapters.WARNED.clear()
    model = net()
    model.first.lora_variant = {"one": object()}
    with pytest.warns(UserWarning, match="do more than add the product") as caught:
        model, optimizer, memory = trained(model)
    assert len(caught) == 1
    assert UP in str(caught[0].message)
    assert not isinstance(memory.anchor.layers[UP], ProductFactor)
    assert not isinstance(memory.anchor.layers[DOWN], ProductFactor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, batches(1, 11))
        memory.consolidate()


def test_factors_that_are_held_each_by_itself_stay_so():
    model = net()
    model.first.lora_B.requires_grad_(False)
    model, _, memory = trained(model)
    memory.detach()
    model.first.lora_B.requires_grad_(True)
    memory.attach(torch.optim.SGD(learning(model), lr=0.1))
    train(model, memory._memory.optimizer, batches(1, 11))
    memory.consolidate()
    assert not isinstance(memory.anchor.layers[DOWN], ProductFactor)
    assert memory.anchor.layers[DOWN].tasks == 2
    assert not isinstance(memory.anchor.layers[UP], ProductFactor)


def test_an_anchor_of_single_factors_from_an_earlier_version_is_continued(tmp_path):
    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwalk.gradients.layer_uses.find_adapters", lambda *_: {})
        _, _, memory = trained(model)
        memory.save(tmp_path / "state")
        before = {n: layer.inputs.size for n, layer in memory.anchor.layers.items()}
    again = Consolidator(model, Kronecker(), 0.1, average="none")
    again.load(tmp_path / "state")
    optimizer = torch.optim.SGD(learning(model), lr=0.1)
    again.attach(optimizer)
    train(model, optimizer, batches(1, 11))
    again.consolidate()
    assert {n: layer.inputs.size for n, layer in again.anchor.layers.items()} == before
    assert {layer.tasks for layer in again.anchor.layers.values()} == {2}
    assert not products(again.anchor)


def test_sums_of_single_factors_that_an_earlier_version_has_saved_are_left_out():
    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwalk.gradients.layer_uses.find_adapters", lambda *_: {})
        optimizer, memory = attached(model)
        train(model, optimizer, batches(0, 5))
        state = memory.state_dict()
        assert set(state["moments"]["layers"]) == {n for n, p in model.named_parameters() if p.requires_grad}
        memory.detach()
    again = Consolidator(model, Kronecker(), 0.1, average="none")
    again.load_state_dict(state)
    optimizer = torch.optim.SGD(learning(model), lr=0.1)
    again.attach(optimizer)
    train(model, optimizer, batches(1, 11))
    again.consolidate()
    assert set(products(again.anchor)) == {UP, "second.lora_B.one.weight"}


def test_an_adapter_whose_weight_is_used_elsewhere_too_is_held_one_by_one():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + F.linear(x, self.first.lora_B.one.weight[:3, :1].expand(3, 5))

    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="other gradients than inputs and outputs give"):
        _, _, memory = trained(Twice())
    assert set(memory.anchor.omega) == {UP, DOWN}


def test_an_adapter_that_is_used_elsewhere_too_in_a_later_task_is_held_by_both():
    model, optimizer, memory = trained(net())
    before = memory.anchor.layers[UP]
    for x, y in batches(1, 3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))
        (loss + model.first.lora_B.one.weight.square().sum()).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*other gradients than inputs and outputs give")
            optimizer.step()
    memory.consolidate()
    assert set(memory.anchor.omega) == {UP, DOWN}
    layer = memory.anchor.layers[UP]
    assert (layer.tasks, layer.arrangement) == (1, before.arrangement)
    apart = KroneckerAnchor(memory.anchor.point, {}, memory.anchor.layers).importance()
    for name in (UP, DOWN):
        both = apart[name] + memory.anchor.omega[name]
        assert torch.allclose(memory.anchor.importance()[name], both, rtol=1e-12)
        assert memory.anchor.omega[name].any()


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that operations have made, views of a weight excepted."""

    def __init__(self, weight):
        super().__init__()
        self.largest, self.weight = 0, weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.weight:
                self.largest = max(self.largest, t.numel())
        return made


def test_no_matrix_of_all_inputs_and_outputs_is_ever_made():
    model = net(width=300, inputs=300)
    model.second = nn.Linear(300, 3).double()
    optimizer, memory = attached(model, Kronecker(m=1, every=1, rank=4))
    stream = batches(0, 2, inputs=300)
    with Sizes(model.first.base_layer.weight) as made:
        for _ in range(2):
            train(model, optimizer, stream)
            memory.consolidate()
            memory.penalty()
            memory.summary()
    assert isinstance(memory.anchor.layers[UP], ProductFactor)
    assert made.largest < 300 * 100
