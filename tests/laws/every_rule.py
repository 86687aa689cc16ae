"""What any rule must satisfy; `test_laws` applies every law to every rule that the package finds."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch

from cases import Heads, assert_same_state, batches, mlp, train
from rwalk import Consolidator
from rwalk.rules.base import Step, TaskEnd


def trained(rule, model=None, tasks=2, lr=0.1, strength=1.0, steps=12, dtype=torch.float64, pull=None):
    """Train a model on a few tasks under a rule, with momentum, and return model, optimiser and consolidator."""
    model = mlp(dtype) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    memory = Consolidator(model, rule, strength=strength, pull=pull, average="none").attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, cast(batches(task, steps), dtype))
        memory.consolidate(sample(task, dtype))
    return model, optimizer, memory


def sample(task, dtype=torch.float64, classes=3):
    """A task's data for rules that measure on data."""
    return [(x, torch.as_tensor(y)) for x, y in cast(batches(task + 100, 3, classes=classes), dtype)]


def measured(rule, model):
    """Per-example gradients as plain autograd gives them, for calling `conclude` without a consolidator."""

    def gradients(objective, of, samples=None, only=None):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in sample(0):
            loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            for one in loss:
                grads = torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
                total = [t + of(g) / 18 for t, g in zip(total, grads, strict=True)]
        return total

    return gradients


def cast(stream, dtype):
    return [(torch.as_tensor(x).to(dtype), y) for x, y in stream]


def importance_is_finite_nonnegative_and_weight_shaped(rule):
    model, _, memory = trained(rule)
    for name, parameter in model.named_parameters():
        omega = memory.anchor.importance()[name]
        assert omega.shape == parameter.shape
        assert torch.isfinite(omega).all()
        assert (omega >= 0).all()
    assert sum(omega.sum() for omega in memory.anchor.importance().values()) > 0


def the_penalty_is_zero_at_the_anchor(rule):
    model, _, memory = trained(rule)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(memory.anchor.point[name])
    assert float(memory.penalty()) == 0


def the_pull_is_the_gradient_of_the_penalty(rule):
    if not rule.anchor_kind.by_element:
        return  # it has no gradient pull; test_kronecker holds the proximal one against a linear solve
    model, optimizer, memory = trained(rule, strength=2.5, pull="gradient")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    theta = dict(model.named_parameters())
    penalty = 2.5 * sum((memory.anchor.importance()[n] * (p - memory.anchor.point[n]) ** 2).sum() for n, p in theta.items())
    assert torch.allclose(memory.penalty(), penalty.detach(), rtol=1e-12)
    truth = torch.autograd.grad(penalty, list(theta.values()))
    for parameter in theta.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, expected in zip(theta.values(), truth, strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=1e-12, atol=1e-15)


def a_zero_learning_rate_gives_finite_importance_and_moves_nothing(rule):
    start = [p.detach().clone() for p in mlp().parameters()]
    model, _, memory = trained(rule, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.importance().values())


def tasks_of_zero_or_few_steps_are_harmless(rule):
    _, _, memory = trained(rule, steps=0)
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.importance().values())
    _, _, memory = trained(rule, steps=1)
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.importance().values())


def a_task_of_zero_steps_keeps_the_importance(rule):
    _, _, memory = trained(rule)
    before = {name: omega.clone() for name, omega in memory.anchor.importance().items()}
    if rule.measures == "data":
        return  # measuring a task's data a second time is a second measurement
    memory.consolidate()
    for name, omega in memory.anchor.importance().items():
        assert torch.allclose(omega, before[name], rtol=1e-12), name


def reordering_parameters_reorders_the_answer(rule):
    class Swapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.last, self.first = inner[2], inner[0]

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    _, _, plain = trained(rule)
    _, _, other = trained(rule, Swapped(mlp()))
    names = {"first.weight": "0.weight", "first.bias": "0.bias", "last.weight": "2.weight", "last.bias": "2.bias"}
    for theirs, ours in names.items():
        assert torch.allclose(other.anchor.importance()[theirs], plain.anchor.importance()[ours], rtol=1e-9, atol=1e-15)


def observing_and_concluding_leave_the_inputs_untouched(rule):
    model, _, memory = trained(rule, tasks=1)
    theta = [p.detach().clone() for p in model.parameters()]
    grad = [torch.randn_like(t) for t in theta]
    kept = copy.deepcopy((theta, grad, memory.anchor.point, memory.anchor.importance()))
    state = rule.observe(memory._memory.state, Step(theta, grad))
    named = dict(zip(memory.anchor.point, theta, strict=True))
    rule.conclude(state, TaskEnd(named, named, memory.anchor, measured(rule, model)))
    same(kept, (theta, grad, memory.anchor.point, memory.anchor.importance()))


def same(a, b):
    if isinstance(a, dict):
        same(list(a.values()), list(b.values()))
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        for x, y in zip(a, b, strict=True):
            same(x, y)


def saving_and_loading_mid_task_changes_nothing(rule):
    model, optimizer, memory = trained(rule)
    train(model, optimizer, batches(5, 13))
    other = copy.deepcopy(model)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share its buffers
    resumed = Consolidator(other, rule, strength=0.0, average="none")
    resumed.load_state_dict(memory.state_dict())
    resumed.attach(other_optimizer)
    for m, o, c in ((model, optimizer, memory), (other, other_optimizer, resumed)):
        train(m, o, batches(6, 9))
        c.consolidate(sample(6))
        train(m, o, batches(7, 2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert_same_state(memory, resumed)


def the_first_task_and_strength_zero_leave_training_bit_identical(rule):
    for tasks, strength in ((1, 5.0), (3, 0.0)):
        plain = mlp(torch.float32)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
        for task in range(tasks):
            train(plain, optimizer, cast(batches(task, 12), torch.float32))
        ours, _, _ = trained(rule, tasks=tasks, strength=strength, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def the_mode_of_the_model_and_grad_mode_stay_as_they_are(rule):
    model = torch.nn.Sequential(mlp(), torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(3).double())
    model[1].eval()
    modes = [m.training for m in model.modules()]
    trained(rule, model)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()


def frozen_tied_and_unused_parameters_are_harmless(rule):
    model = mlp()
    model.add_module("unused", torch.nn.Linear(2, 2).double())
    model.forward = lambda x: model[2](torch.tanh(model[0](x)))
    model[0].bias.requires_grad_(False)
    model.register_parameter("tied", model[2].weight)
    bias = model[0].bias.clone()
    _, _, memory = trained(rule, model)
    assert torch.equal(bias, model[0].bias)
    assert "0.bias" not in memory.anchor.point
    assert len({id(p) for p in memory.state_dict()["shapes"].values()}) == len(memory.state_dict()["shapes"])
    assert (memory.anchor.importance()["unused.weight"] == float(rule.measures == "nothing")).all()


def a_parameter_added_later_is_protected_from_the_end_of_its_first_task(rule):
    model, optimizer, memory = trained(rule, tasks=1)
    last = torch.nn.Linear(3, 3).double()
    model.append(last)
    optimizer.add_param_group({"params": last.parameters()})
    train(model, optimizer, batches(1, 12))
    assert "3.weight" not in memory.anchor.point
    memory.consolidate(sample(1))
    assert memory.anchor.importance()["3.weight"].sum() > 0
    assert torch.equal(memory.anchor.point["3.weight"], last.weight)


def a_grown_tensor_keeps_its_old_block(rule):
    model, optimizer, memory = trained(rule)
    old = model[2]
    before, penalty = memory.anchor.importance()["2.weight"].clone(), float(memory.penalty())
    model[2] = torch.nn.Linear(7, 5).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    assert torch.equal(memory.anchor.importance()["2.weight"][:3], before)
    assert (memory.anchor.importance()["2.weight"][3:] == 0).all()
    assert float(memory.penalty()) == pytest.approx(penalty, rel=1e-12)
    train(model, optimizer, batches(4, 12, classes=5))
    memory.consolidate(sample(4, classes=5))
    assert memory.anchor.importance()["2.weight"].shape == (5, 7)
    assert memory.anchor.importance()["2.weight"][3:].sum() > 0


def an_adapter_added_between_tasks_joins_and_the_rest_keeps_its_importance(rule):
    """Low-rank adapters as LoRA has them: a frozen base, two new matrices, other names."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, torch.nn.Linear(5, 2).double(), torch.nn.Linear(2, 7).double()

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model, _, memory = trained(rule)
    memory.detach()
    anchor = memory.anchor
    model[0] = Adapted(model[0].requires_grad_(False))
    memory = Consolidator(model, rule, average="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rule.accumulates else "ignore")
        match = memory.adopt(anchor, rename={"0.weight": "0.base.weight", "0.bias": "0.base.bias"})
    assert sorted(match.same) == ["0.base.bias", "0.base.weight", "2.bias", "2.weight"]
    assert sorted(match.missing) == ["0.down.bias", "0.down.weight", "0.up.bias", "0.up.weight"]
    assert torch.equal(memory.anchor.importance()["0.base.weight"], anchor.importance()["0.weight"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    memory.attach(optimizer)
    train(model, optimizer, batches(8, 12))
    memory.consolidate(sample(8))
    assert memory.anchor.importance()["0.up.weight"].sum() > 0
    if rule.accumulates and rule.measures == "steps":
        assert torch.allclose(memory.anchor.importance()["0.base.weight"], anchor.importance()["0.weight"])


def a_module_replaced_by_a_smaller_one_is_named_and_starts_anew(rule):
    for average in ("none", "tail"):
        replaced(rule, average)


def replaced(rule, average):
    model = mlp()
    memory = Consolidator(model, rule, average=average).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, memory._memory.optimizer, batches(0, 12))
    memory.consolidate(sample(0))
    model[2] = torch.nn.Linear(7, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match=r"2\.weight"):
        memory.attach(optimizer)
    assert set(memory.anchor.point) == {"0.weight", "0.bias"}
    train(model, optimizer, batches(9, 12, classes=2))
    memory.consolidate(sample(9, classes=2))
    assert memory.anchor.importance()["2.weight"].shape == (2, 7)


def the_proximal_pull_is_stable_and_holds_harder_with_strength(rule):
    drift = []
    for strength in (0.0, 1.0, 1e2, 1e4, 1e6, 1e8):
        model = mlp()
        memory = Consolidator(model, rule, strength, pull="proximal")
        memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        train(model, memory._memory.optimizer, batches(0, 12))
        memory.consolidate(sample(0))
        train(model, memory._memory.optimizer, batches(1, 30))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        drift.append(float(memory.anchor.penalty(dict(model.named_parameters()))))
    assert all(b <= a * 1.001 for a, b in pairwise(drift)), drift
    assert drift[-1] < 1e-6 * drift[0]


def tail_averaging_anchors_where_the_model_is_and_survives_saving(rule):
    model = mlp()
    memory = Consolidator(model, rule, average="tail")
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    weights = []
    for batch in batches(0, 9):
        train(model, memory._memory.optimizer, [batch])
        weights.append([p.detach().clone() for p in model.parameters()])
    saved, theta = memory.state_dict(), copy.deepcopy(model.state_dict())
    memory.consolidate(sample(0))
    if not rule.anchor_kind.by_element:
        weights = [*weights[rule.pull_every - 1 :: rule.pull_every], weights[-1]]
    average = weights[0]
    for n, now in enumerate(weights[1:], start=2):
        average = [a + 4 / (n + 3) * (w - a) for a, w in zip(average, now, strict=True)]
    for parameter, point, expected in zip(model.parameters(), memory.anchor.point.values(), average, strict=True):
        assert torch.allclose(parameter, expected, rtol=1e-12)
        assert torch.equal(parameter, point)
    other = mlp()
    other.load_state_dict(theta)
    resumed = Consolidator(other, rule, average="tail")
    resumed.load_state_dict(saved)
    resumed.consolidate(sample(0))
    assert_same_state(memory, resumed)


def a_branch_unused_in_a_task_keeps_its_importance(rule):
    model = Heads()
    _, optimizer, memory = trained(rule, model, tasks=1)
    before = memory.anchor.importance()["heads.0.weight"].clone()
    model.on = 1
    train(model, optimizer, batches(1, 12))
    memory.consolidate(sample(1))
    after = memory.anchor.importance()["heads.0.weight"]
    assert torch.equal(after > 0, before > 0)
    assert before.sum() > 0
    assert memory.anchor.importance()["heads.1.weight"].sum() > 0


def a_new_head_for_each_task_joins_and_the_old_ones_stay(rule):
    model = Heads(1)
    _, _, memory = trained(rule, model, tasks=1)
    for task in (1, 2):
        model.heads.append(torch.nn.Linear(7, 3).double())
        model.on = task
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory.attach(optimizer)
        train(model, optimizer, batches(task, 12))
        memory.consolidate(sample(task))
        assert all(memory.anchor.importance()[f"heads.{k}.weight"].sum() > 0 for k in range(task + 1))


HELPERS = {"trained", "measured", "replaced"}
LAWS = [
    law
    for name, law in list(globals().items())
    if name not in HELPERS and getattr(law, "__code__", None) and law.__code__.co_varnames[:1] == ("rule",)
]
