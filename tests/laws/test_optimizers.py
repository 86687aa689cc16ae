"""Every optimiser of PyTorch: the walk against one summed from recorded steps, the pulls and the average by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import optim
from torch.nn import functional as F

from cases import batches, mlp
from oracle import Simulation
from rwalk import Consolidator, RWalk

RATES = {
    "Adadelta": 1.0, "Adafactor": 0.02, "Adagrad": 0.05, "Adam": 0.01, "AdamW": 0.01, "Adamax": 0.02, "ASGD": 0.1, "Muon": 0.02,
    "NAdam": 0.01, "RAdam": 0.02, "RMSprop": 0.005, "Rprop": 0.01, "SGD": 0.1,
}  # fmt: skip
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
FORMS = [
    *((name, {}) for name in RATES),
    *((name, {"foreach": True}) for name in RATES if name != "Muon"),
    *((name, {"fused": True}) for name in FUSED),
    ("SGD", {"momentum": 0.8, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "fused": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.01}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
]
STRENGTH = 0.05


def test_no_optimiser_is_forgotten():
    classes = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert classes - set(RATES) == {"Optimizer", "LBFGS", "SparseAdam"}
    assert set(RATES) - classes <= {"Muon"}


def array(tensors):
    return [t.detach().numpy().copy() for t in tensors]


def built(name, options):
    """A model without biases, as Muon wants it, and an optimiser with two groups, each with its own learning rate."""
    if not hasattr(optim, name):
        pytest.skip(f"this PyTorch has no {name}")
    model = mlp()
    for layer in (model[0], model[2]):
        layer.bias = None
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], "lr": RATES[name] / 2}]
    optimizer = getattr(optim, name)(groups, lr=RATES[name], **options)
    return model, optimizer, optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


def metric(optimizer, group, parameter):
    """What the optimiser multiplies a gradient by, as the proximal pull takes it."""
    state = optimizer.state[parameter]
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if second is not None:
        corrected = second.numpy() / (1 - group["betas"][1] ** float(state["step"]))
        return group["lr"] / (np.sqrt(corrected) + group["eps"])
    return group["lr"] / (1 - group["momentum"]) if isinstance(optimizer, optim.SGD) else group["lr"]


def one_step(model, optimizer, batch, with_closure):
    """Make a step as users do; return the gradients of the loss."""
    x, y = map(torch.as_tensor, batch)
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen.extend(array(p.grad for p in model.parameters()))
        return loss

    if with_closure:
        assert optimizer.step(closure).item() > 0
    else:
        closure()
        optimizer.step()
    return seen


def twin_step(twin, grad, memory, pull):
    """Make the same step by hand with a copy of parameters and optimiser; return where it leads."""
    parameters, optimizer = twin
    names = list(memory.anchor.point)
    anchor = [(memory.anchor.point[n].numpy(), memory.anchor.omega[n].numpy()) for n in names]
    for i, (p, g) in enumerate(zip(parameters, grad, strict=True)):
        extra = 2 * STRENGTH * anchor[i][1] * (p.detach().numpy() - anchor[i][0]) if anchor and pull == "gradient" else 0.0
        p.grad = torch.as_tensor(g + extra)
    optimizer.step()
    free = array(parameters)
    if anchor and pull == "proximal":
        for i, (p, group) in enumerate(zip(parameters, optimizer.param_groups, strict=True)):
            w = 2 * STRENGTH * metric(optimizer, group, p) * anchor[i][1]
            free[i] = (free[i] + w * anchor[i][0]) / (1 + w)
    return free


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize(("pull", "average"), [("gradient", "none"), ("proximal", "tail")])
@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_walk_pull_and_average_are_what_recorded_steps_say(name, options, pull, average, with_closure):
    model, optimizer, scheduler = built(name, options)
    rule = RWalk(alpha=0.3, delta_t=4)
    memory = Consolidator(model, rule, STRENGTH, pull=pull, average=average).attach(optimizer)
    truth = Simulation(array(model.parameters()), alpha=0.3, delta_t=4)
    for task in range(3):
        moves, mean = [], array(model.parameters())
        for n, batch in enumerate(batches(task, 10), start=1):
            before, twin = array(model.parameters()), copy.deepcopy((list(model.parameters()), optimizer))
            grad = one_step(model, optimizer, batch, with_closure)
            after = array(model.parameters())
            for ours, theirs in zip(after, twin_step(twin, grad, memory, pull), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
            moves.append((grad, before, after))
            mean = [m + 4 / (n + 3) * (t - m) for m, t in zip(mean, after, strict=True)]
            scheduler.step()
        truth.replay(moves)
        memory.consolidate()
        for i, key in enumerate(memory.anchor.omega):
            np.testing.assert_allclose(memory.anchor.omega[key].numpy(), truth.omega[i], rtol=1e-7, atol=1e-9)
            kept = mean[i] if average == "tail" else truth.theta[i]
            np.testing.assert_allclose(memory.anchor.point[key].numpy(), kept, rtol=1e-12, atol=1e-15)


def test_sparse_adam_is_refused_with_its_sparse_gradients():
    model = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = optim.SparseAdam(model.parameters())
    Consolidator(model, RWalk()).attach(optimizer)
    weight = model.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients of `weight` are sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(weight, model.weight)


def test_lbfgs_is_refused_when_attached_to():
    model = mlp()
    optimizer = optim.LBFGS(model.parameters())
    memory = Consolidator(model, RWalk())
    with pytest.raises(TypeError, match=r"LBFGS moves several times.*an optimiser that moves once.*Adam"):
        memory.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_averages_of_swa_utils_beside_ours_leave_both_as_they_were():
    def run(watched):
        model = mlp()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        schedule = optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
        mean = optim.swa_utils.AveragedModel(model)
        memory = Consolidator(model, RWalk(delta_t=3))
        if watched:
            memory.attach(optimizer)
        for batch in batches(0, 8):
            one_step(model, optimizer, batch, False)
            mean.update_parameters(model)
            schedule.step()
        return [*model.parameters(), *mean.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
