"""What any rule must satisfy; `test_laws` applies every law to every rule that the package finds."""

import copy

import torch

from cases import assert_same_state, batches, mlp, train
from rwalk import Consolidator
from rwalk.importance.base import Finish, Step


def trained(rule, model=None, tasks=2, lr=0.1, strength=1.0, steps=12, dtype=torch.float64):
    """Train a model on a few tasks under a rule, with momentum, and return model, optimiser and consolidator."""
    model = mlp(dtype) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    memory = Consolidator(model, rule, strength=strength).attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, cast(batches(task, steps), dtype))
        memory.consolidate()
    return model, optimizer, memory


def cast(stream, dtype):
    return [(torch.as_tensor(x).to(dtype), y) for x, y in stream]


def importance_is_finite_nonnegative_and_weight_shaped(rule):
    model, _, memory = trained(rule)
    for name, parameter in model.named_parameters():
        omega = memory.anchor.omega[name]
        assert omega.shape == parameter.shape
        assert torch.isfinite(omega).all()
        assert (omega >= 0).all()
    assert sum(omega.sum() for omega in memory.anchor.omega.values()) > 0


def the_penalty_is_zero_at_the_anchor(rule):
    _, _, memory = trained(rule)
    assert float(memory.penalty()) == 0


def the_pull_is_the_gradient_of_the_penalty(rule):
    model, optimizer, memory = trained(rule, strength=2.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    theta = dict(model.named_parameters())
    penalty = 2.5 * sum((memory.anchor.omega[n] * (p - memory.anchor.point[n]) ** 2).sum() for n, p in theta.items())
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
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.omega.values())


def tasks_of_zero_or_few_steps_are_harmless(rule):
    _, _, memory = trained(rule, steps=0)
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.omega.values())
    _, _, memory = trained(rule, steps=1)
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.omega.values())


def a_task_of_zero_steps_keeps_the_importance(rule):
    _, _, memory = trained(rule)
    before = {name: omega.clone() for name, omega in memory.anchor.omega.items()}
    memory.consolidate()
    for name, omega in memory.anchor.omega.items():
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
        assert torch.allclose(other.anchor.omega[theirs], plain.anchor.omega[ours], rtol=1e-9, atol=1e-15)


def observing_and_concluding_leave_the_inputs_untouched(rule):
    model, _, memory = trained(rule, tasks=1)
    theta = [p.detach().clone() for p in model.parameters()]
    grad = [torch.randn_like(t) for t in theta]
    kept = copy.deepcopy((theta, grad, memory.anchor.point, memory.anchor.omega))
    state = rule.observe(memory._state, Step(theta, grad))
    named = dict(zip(memory.anchor.point, theta, strict=True))
    rule.conclude(state, Finish(named, memory.anchor))
    same(kept, (theta, grad, memory.anchor.point, memory.anchor.omega))


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
    resumed = Consolidator(other, rule, strength=0.0)
    resumed.load_state_dict(memory.state_dict())
    resumed.attach(other_optimizer)
    for m, o, c in ((model, optimizer, memory), (other, other_optimizer, resumed)):
        train(m, o, batches(6, 9))
        c.consolidate()
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
    assert len({id(p) for p in memory._watch.theta.values()}) == len(memory._watch.theta)
    assert (memory.anchor.omega["unused.weight"] == 0).all()


def a_parameter_added_later_is_protected_from_the_end_of_its_first_task(rule):
    model, optimizer, memory = trained(rule, tasks=1)
    last = torch.nn.Linear(3, 3).double()
    model.append(last)
    optimizer.add_param_group({"params": last.parameters()})
    train(model, optimizer, batches(1, 12))
    assert "3.weight" not in memory.anchor.point
    memory.consolidate()
    assert memory.anchor.omega["3.weight"].sum() > 0
    assert torch.equal(memory.anchor.point["3.weight"], last.weight)


def a_grown_tensor_keeps_its_old_block(rule):
    model, optimizer, memory = trained(rule)
    old = model[2]
    before = memory.anchor.omega["2.weight"].clone()
    model[2] = torch.nn.Linear(7, 5).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    assert torch.equal(memory.anchor.omega["2.weight"][:3], before)
    assert (memory.anchor.omega["2.weight"][3:] == 0).all()
    assert float(memory.penalty()) == 0
    train(model, optimizer, batches(4, 12, classes=5))
    memory.consolidate()
    assert memory.anchor.omega["2.weight"].shape == (5, 7)
    assert memory.anchor.omega["2.weight"][3:].sum() > 0


LAWS = [
    value
    for value in list(globals().values())
    if getattr(value, "__code__", None) and value.__code__.co_varnames[:1] == ("rule",) and value.__name__ != "trained"
]
