"""The two pulls and tail averaging: formulas by hand, every strength, real optimisers."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import optim
from torch.nn import functional as F

from cases import batches, mlp, train
from rwalk import EWC, L2, Consolidator, Kronecker, RWalk, TaskFisher
from rwalk.consolidation import proximal

OPTIMIZERS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), "lr"),
    "momentum": (lambda p: optim.SGD(p, lr=0.02, momentum=0.8), "lr / (1 - momentum)"),
    "nesterov": (lambda p: optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True), "lr / (1 - momentum)"),
    "dampened": (
        lambda p: optim.SGD(p, lr=0.02, momentum=0.8, dampening=0.6),
        "lr * (1 - dampening) / (1 - momentum)",
    ),
    "dampening alone": (lambda p: optim.SGD(p, lr=0.02, dampening=0.6), "lr"),
    "adam": (lambda p: optim.Adam(p, lr=0.01), "lr / (sqrt(v) + eps), per coordinate"),
    "amsgrad": (lambda p: optim.Adam(p, lr=0.01, amsgrad=True), "lr / (sqrt(v) + eps), per coordinate"),
    "adamw": (lambda p: optim.AdamW(p, lr=0.01, betas=(0.8, 0.95)), "lr / (sqrt(v) + eps), per coordinate"),
    "rmsprop": (lambda p: optim.RMSprop(p, lr=0.01), "lr"),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.05), "lr"),
}


def metric_by_hand(name, optimizer, parameter):
    group = optimizer.param_groups[0]
    if name == "dampened":
        return 0.02 * (1 - 0.6) / (1 - 0.8)
    if name in ("momentum", "nesterov"):
        return 0.02 / (1 - 0.8)
    if name in ("adam", "amsgrad", "adamw"):
        state = optimizer.state[parameter]
        v = state["max_exp_avg_sq" if name == "amsgrad" else "exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        return group["lr"] / (np.sqrt(v.numpy()) + group["eps"])
    return group["lr"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_proximal_step_is_the_weighted_mean_in_the_optimisers_metric(name):
    make, words = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    memory = Consolidator(model, RWalk(), strength=0.7, pull="proximal").attach(optimizer)
    train(model, optimizer, batches(0, 15))
    memory.consolidate()
    plain = copy.deepcopy(model)
    other = make(plain.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in batches(1, 4):
        plain.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(plain, other, [batch])
        train(model, optimizer, [batch])
        for (key, ours), free in zip(model.named_parameters(), plain.parameters(), strict=True):
            w = 2 * metric_by_hand(name, other, free) * 0.7 * memory.anchor.omega[key].numpy()
            expected = (free.detach().numpy() + w * memory.anchor.point[key].numpy()) / (1 + w)
            np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-10, atol=1e-14)
    assert proximal.metric(optimizer) == words
    assert memory.summary().settings["metric of the pull"] == words


def test_groups_have_their_own_learning_rates():
    model = mlp()
    optimizer = optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.0}], lr=1.0)
    memory = Consolidator(model, L2(), strength=5.0, pull="proximal")
    memory.estimate()
    memory.attach(optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = memory.anchor.point[name] + 1 / (1 + 2 * (0.1 if name[0] == "0" else 0.0) * 5.0)
        assert torch.allclose(parameter, expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strengths_up_to_1e8_stay_finite_and_hold_ever_harder(name):
    drift = []
    for strength in (0.0, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e8):
        model = mlp(torch.float32)
        optimizer = OPTIMIZERS[name][0](model.parameters())
        memory = Consolidator(model, L2(), strength, pull="proximal").attach(optimizer)
        train(model, optimizer, [(x.astype(np.float32), y) for x, y in batches(0, 10)])
        memory.consolidate()
        train(model, optimizer, [(x.astype(np.float32), y) for x, y in batches(1, 40)])
        moved = torch.cat([(p.detach() - memory.anchor.point[n]).flatten() for n, p in model.named_parameters()])
        assert torch.isfinite(moved).all()
        drift.append(float(moved.norm()))
    assert all(b <= a * 1.001 for a, b in pairwise(drift)), drift
    assert drift[-1] < 1e-3 * drift[0]


def test_the_gradient_pull_warns_once_a_task_where_it_would_overshoot():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, L2(), strength=6.0)
    memory.estimate()
    memory.attach(optimizer)
    with pytest.warns(UserWarning, match=r'strength 6, learning rate 0\.1.*pull="proximal"') as caught:
        train(model, optimizer, batches(0, 3))
    assert len(caught) == 1
    memory.consolidate()
    memory.strength = 4.9
    train(model, optimizer, batches(1, 3))


def test_the_matrix_geometry_is_the_default_and_the_diagonal_recipe_holds_four_tensors_per_parameter():
    model = mlp(torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    assert Consolidator(model).rule == Kronecker()
    memory = Consolidator(model, TaskFisher()).attach(optimizer)
    for consolidator in (memory, Consolidator(model)):
        assert (consolidator.strength, consolidator.pull, consolidator.average) == (0.1, "proximal", "tail")
    size = sum(p.numel() * 4 for p in model.parameters())
    for task in range(3):
        train(model, optimizer, [(x.astype(np.float32), y) for x, y in batches(task, 9)])
        memory.consolidate()
    assert memory.state_bytes == 4 * size
    paper = Consolidator(model, RWalk())
    assert (paper.strength, paper.pull, paper.average) == (1.0, "gradient", "none")


@pytest.mark.parametrize("options", [{"pull": "both"}, {"average": "all"}, {"strength": -1.0}], ids=str)
def test_unknown_options(options):
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be"):
        Consolidator(mlp(), RWalk(), **options)


def normed():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)
    ).double()


def test_averaging_recomputes_the_statistics_of_batchnorm_over_the_data():
    model = normed()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(), average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 12))
    loader = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 5)]
    random = torch.get_rng_state()
    memory.consolidate(loader)
    assert torch.equal(random, torch.get_rng_state())
    with torch.no_grad():
        outputs = [model[0](x) for x, _ in loader]
    mean = torch.stack([h.mean(0) for h in outputs]).mean(0)
    variance = torch.stack([h.var(0) for h in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, rtol=1e-10)
    assert torch.allclose(model[1].running_var, variance, rtol=1e-10)
    assert model[1].momentum == 0.1
    assert all(m.training for m in model.modules())


def test_averaging_without_data_says_that_batchnorm_is_not_in_line():
    model = normed()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(), average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 3))
    with pytest.warns(UserWarning, match=r"BatchNorm.*averaged weights.*consolidate\(loader\)"):
        memory.consolidate()


def test_the_path_ends_where_the_optimiser_was_not_at_the_average():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plain = Consolidator(model, RWalk()).attach(optimizer)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(0, 13))
    plain.consolidate()
    plain.detach()
    model.load_state_dict(start)
    averaged = Consolidator(model, RWalk(), average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 13))
    averaged.consolidate()
    for name, omega in plain.anchor.omega.items():
        assert torch.equal(omega, averaged.anchor.omega[name])
        assert not torch.equal(plain.anchor.point[name], averaged.anchor.point[name])


def test_statistics_that_cannot_be_recomputed_are_left_alone():
    model = normed()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = (torch.as_tensor(t) for t in batches(0, 1)[0])
    for data in (iter([]), [(x[:1], y[:1])]):
        with pytest.raises(ValueError, match="No batch has more than one example"):
            memory.consolidate(data)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    memory.consolidate([(x, y), (x[:1], y[:1])])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.filterwarnings("ignore:Another memory has learned")
def test_statistics_stay_where_nothing_was_averaged_or_the_user_froze_them():
    model = normed()
    x, y = (torch.as_tensor(t) for t in batches(0, 1)[0])
    model(x)
    before = model[1].running_mean.clone()
    memory = Consolidator(model, EWC(), average="tail")
    memory.estimate([(x, y)])
    assert torch.equal(model[1].running_mean, before)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model).attach(optimizer)
    model[1].eval()
    train(model, optimizer, batches(0, 3))
    memory.consolidate([(x, y)])
    assert torch.equal(model[1].running_mean, before)
    assert not model[1].training


def test_a_learning_rate_that_warms_up_is_warned_of_when_it_overshoots():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=1e-4)
    memory = Consolidator(model, L2(), strength=6.0)
    memory.estimate()
    memory.attach(optimizer)
    train(model, optimizer, batches(0, 2))
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="strength 6, learning rate 0.1"):
        train(model, optimizer, batches(1, 1))
    train(model, optimizer, batches(1, 2))


# Optimisers of other libraries


class Foreign(optim.Optimizer):
    """Adam as others write it, with its second moment under another name or in another form."""

    def __init__(self, parameters, form, lr=0.02, betas=(0.8, 0.95), eps=1e-6):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, **({"step": 0} if form == "step in group" else {})})
        self.form = form

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"first": torch.zeros_like(p), "v": torch.zeros_like(p), "n": 0}
                state["n"] += 1
                state["first"].lerp_(p.grad, 1 - group["betas"][0])
                state["v"].lerp_(p.grad.square(), 1 - group["betas"][1])
                self._keep(state)
                v = state["seen"] / (1 - group["betas"][1] ** state["n"])
                p.addcdiv_(state["first"] / (1 - group["betas"][0] ** state["n"]), v.sqrt() + group["eps"], value=-group["lr"])

    def _keep(self, state):
        state["seen"] = state["v"].clone()
        if self.form == "float":
            state |= {"step": state["n"], "state2": state["v"]}
        elif self.form == "step in group":
            state |= {"exp_avg_sq": state["v"]}
        elif self.form == "eight bits":
            codes, values, largest = quantised(state["v"])
            state |= {"step": state["n"], "state2": codes, "qmap2": values, "absmax2": largest}
            state["seen"] = (values[codes.long()] * largest.repeat_interleave(16)[: codes.numel()].view(codes.shape)).double()
        elif self.form == "unknown":
            state |= {"step": state["n"], "variance": state["v"]}


def quantised(v, size=16):
    """Eight bits with a scale for each block of 16, as bitsandbytes has them."""
    values = torch.linspace(0, 1, 256)
    flat = F.pad(v.flatten(), (0, -v.numel() % size)).view(-1, size)
    largest = flat.amax(1).clamp(min=1e-30)
    codes = (flat / largest[:, None] * 255).round().to(torch.uint8)
    return codes.flatten()[: v.numel()].view(v.shape), values, largest.float()


@pytest.mark.parametrize("form", ["float", "step in group", "eight bits", "unknown"])
def test_the_second_moment_of_other_libraries_is_recognised_or_a_warning_says_that_it_is_not(form):
    torch.manual_seed(2)
    model = torch.nn.Linear(9, 5).double()
    optimizer = Foreign(model.parameters(), form)
    memory = Consolidator(model, L2(), 3.0, pull="proximal").attach(optimizer)
    memory.consolidate()
    point = {name: p.detach().clone() for name, p in model.named_parameters()}
    for n in range(1, 5):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        plain = copy.deepcopy(model)
        other = Foreign(plain.parameters(), form)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        other.step()
        if form == "unknown" and n == 1:
            with pytest.warns(UserWarning, match="`Foreign` scales each weight's step"):
                optimizer.step()
        else:
            optimizer.step()
        for (name, ours), free in zip(model.named_parameters(), plain.parameters(), strict=True):
            v = other.state[free]["seen"] / (1 - 0.95**n)
            w = 2 * 3.0 * (0.02 if form == "unknown" else 0.02 / (v.sqrt() + 1e-6))
            expected = (free + w * point[name]) / (1 + w)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


class Given(optim.Optimizer):
    """Moves along the gradient; its settings and its state are those that a test gives it."""

    def __init__(self, parameters, settings, state):
        super().__init__(parameters, settings)
        self.given = state

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(p.grad, alpha=0.01)
            if self.given is not None:
                torch.manual_seed(p.numel())
                self.state[p] |= {"exp_avg_sq": torch.rand_like(p), **self.given}


class Lamb(Given):
    """Has Adam's moments; the length of its steps is that of the weights."""


ADAM = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}
FOUND = {**ADAM, "d": 0.02, "growth_rate": 2.0, "k": 7}
CORRECTED = 1 - 0.95**7
RECOGNISED = {
    "step": (ADAM, {"step": 7}, lambda v: 0.3 / (np.sqrt(v / CORRECTED) + 1e-3)),
    "t": (ADAM, {"t": 7}, lambda v: 0.3 / (np.sqrt(v / CORRECTED) + 1e-3)),
    "k": ({**ADAM, "k": 7}, {}, lambda v: 0.3 / (np.sqrt(v / CORRECTED) + 1e-3)),
    "uncorrected": ({**ADAM, "bias_correction": False}, {"step": 7}, lambda v: 0.3 / (np.sqrt(v) + 1e-3)),
    "warmed up": ({**ADAM, "k": 7, "scheduled_lr": 0.1}, {}, lambda v: 0.1 / (np.sqrt(v / CORRECTED) + 1e-3)),
    "d": ({**FOUND, "use_bias_correction": False}, {}, lambda v: 0.02 * 0.3 / (np.sqrt(v) + 1e-3)),
    "d in v": (
        {**FOUND, "d_coef": 1.0, "use_bias_correction": False}, {}, lambda v: 0.02 * 0.3 / (np.sqrt(v) / 0.02 + 1e-3)
    ),
    "d in v, corrected": (
        {**FOUND, "d_coef": 1.0, "use_bias_correction": True},
        {},
        lambda v: 0.02 * 0.3 / (np.sqrt(v / CORRECTED) / 0.02 + 1e-3),
    ),
}  # fmt: skip


def pulled_once(kind, settings, state):
    """Make one pulled step; return the memory, the optimiser, and by how much of the way each weight was drawn."""
    model = mlp()
    optimizer = kind(model.parameters(), settings, state)
    memory = Consolidator(model, L2(), 0.7, pull="proximal")
    memory.estimate()
    memory.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, -100.0)  # a move by 1
    optimizer.step()
    point = memory.anchor.point
    return memory, optimizer, {p: 1 - (p.detach() - point[name]).numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", RECOGNISED)
def test_a_second_moment_is_read_as_its_optimiser_counts_scales_and_corrects_it(form):
    settings, state, metric = RECOGNISED[form]
    memory, optimizer, drawn = pulled_once(Given, settings, state)
    for p, share in drawn.items():
        w = 2 * 0.7 * metric(optimizer.state[p]["exp_avg_sq"].numpy())
        np.testing.assert_allclose(share, w / (1 + w), rtol=1e-9, atol=1e-14)
    lr = "d * lr" if "d" in settings else "lr"
    assert memory.summary().settings["metric of the pull"] == f"{lr} / (sqrt(v) + eps), per coordinate"


@pytest.mark.parametrize(
    ("kind", "settings", "state", "lr"),
    [
        (Given, ADAM, {}, 0.3),
        (Given, ADAM, None, 0.3),
        (Given, {"lr": 0.3}, None, 0.3),
        (Given, {**ADAM, "betas": (0.9, 0.8, 0.95)}, {"step": 7}, 0.3),
        (Given, {**ADAM, "betas": None, "eps": (1e-30, 1e-3), "lr": None}, {"step": 7}, 0.0),
        (Lamb, ADAM, {"step": 7}, 0.3),
    ],
    ids=["uncounted", "kept elsewhere", "nothing known", "three betas", "Adafactor", "LAMB"],
)
def test_an_optimiser_whose_steps_are_not_known_is_warned_of_and_the_summary_says_so(kind, settings, state, lr):
    with pytest.warns(UserWarning, match=f"`{kind.__name__}` scales each weight's step") as caught:
        memory, _, drawn = pulled_once(kind, settings, state)
    assert len(caught) == 1
    for share in drawn.values():
        np.testing.assert_allclose(share, 1.4 * lr / (1 + 1.4 * lr), rtol=1e-9, atol=1e-14)
    assert memory.summary().settings["metric of the pull"] == f"lr, as far as is known of `{kind.__name__}`"


def test_one_parameter_whose_second_moment_has_another_shape_is_enough_for_the_warning():
    class Projected(Given):
        def step(self, closure=None):
            super().step()
            weight = self.param_groups[0]["params"][0]
            self.state[weight]["exp_avg_sq"] = torch.ones(2, 5).double()

    with pytest.warns(UserWarning, match="`Projected` scales"):
        memory, optimizer, drawn = pulled_once(Projected, ADAM, {"step": 7})
    words = "lr / (sqrt(v) + eps), per coordinate, as far as is known of `Projected`, otherwise lr"
    assert memory.summary().settings["metric of the pull"] == words
    first, *others = drawn
    np.testing.assert_allclose(drawn[first], 0.42 / 1.42, rtol=1e-9)
    for p in others:
        w = 2 * 0.7 * RECOGNISED["step"][2](optimizer.state[p]["exp_avg_sq"].numpy())
        np.testing.assert_allclose(drawn[p], w / (1 + w), rtol=1e-9)


def test_a_subclass_that_leaves_the_step_of_pytorch_alone_is_known():
    class Named(optim.SGD):
        def __init__(self, parameters, settings, state):
            super().__init__(parameters, **settings)

    memory, _, drawn = pulled_once(Named, {"lr": 0.01, "momentum": 0.5}, None)
    assert memory.summary().settings["metric of the pull"] == "lr / (1 - momentum)"
    for share in drawn.values():
        np.testing.assert_allclose(share, 0.028 / 1.028, rtol=1e-9)
