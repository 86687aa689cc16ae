"""Steps that must leave no trace: gradients that are not finite, and steps that a loss scaler leaves out."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, train
from rwalk import EWC, SI, Consolidator, EWCpp, Kronecker, RWalk, TaskFisher, kernels
from rwalk.consolidation import validity

RULES = [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), TaskFisher(), SI(), EWC()]


def ready(rule=None, **options):
    """A model in its second task, so that there is something to lose."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    memory = Consolidator(model, rule, **options).attach(optimizer)
    train(model, optimizer, batches(0, 7))
    memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 2)])
    train(model, optimizer, batches(1, 4))
    return model, optimizer, memory


def spoil(model, optimizer, value, name="2.bias"):
    optimizer.zero_grad()
    x, y = batches(2, 1)[0]
    F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
    if name is not None:
        dict(model.named_parameters())[name].grad.view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e200], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bad_numbers_raise_name_parameter_and_step_and_change_nothing(rule, value):
    model, optimizer, memory = ready(rule)
    before, weights = memory.state_dict(), copy.deepcopy(model.state_dict())
    spoil(model, optimizer, value)
    with pytest.raises(FloatingPointError, match=r"The gradients of `2\.bias` .* at step 5 of this task"):
        optimizer.step()
    other = Consolidator(model, rule)
    other.load_state_dict(before)
    assert_same_state(memory, other)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    train(model, optimizer, batches(1, 5))
    memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 2)])
    assert all(torch.isfinite(omega).all() for omega in memory.anchor.omega.values())


def skips_a_step_without_a_trace(make):
    """Demand that a bad step changes nothing in one of two equal trainings; return the memory of that one."""
    (model, optimizer, memory), (twin, their_optimizer, theirs) = make(), make()
    spoil(model, optimizer, math.nan)
    optimizer.step()
    for m, o in ((model, optimizer), (twin, their_optimizer)):
        train(m, o, batches(1, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert_same_state(memory, theirs)
    assert memory.skipped == 1
    return memory


@pytest.mark.parametrize("rule", [*RULES, None], ids=repr)
def test_skipping_leaves_out_the_step_as_if_it_had_not_been(rule):
    memory = skips_a_step_without_a_trace(lambda: ready(rule, nonfinite="skip"))
    assert memory.summary().figures["steps left out"] == 1


@pytest.mark.parametrize("rule", [*RULES, None], ids=repr)
def test_gradients_that_are_not_protected_are_looked_at_too(rule):
    """The optimiser moves them all the same, and one bad weight spoils all gradients of the next step."""
    other = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def begun(**options):
        model, optimizer, memory = ready(rule, only="0", **options)
        optimizer.add_param_group({"params": [other]})
        return model, optimizer, memory

    for name, said in (("2.bias", r"`2\.bias`"), (None, "`parameter 4 of the optimiser`")):
        other.grad = None
        model, optimizer, memory = begun()
        before, weights = memory.state_dict(), copy.deepcopy(model.state_dict())
        spoil(model, optimizer, math.nan, name)
        if name is None:
            other.grad = torch.full_like(other, math.inf)
        with pytest.raises(FloatingPointError, match=rf"The gradients of {said} are not finite.* at step 5 of this task"):
            optimizer.step()
        fresh = Consolidator(model, rule, only="0")
        fresh.load_state_dict(before)
        assert_same_state(memory, fresh)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    other.grad = None
    skips_a_step_without_a_trace(lambda: begun(nonfinite="skip"))


def test_sparse_gradients_that_are_not_protected_are_looked_at_too():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2))
    memory = Consolidator(model, RWalk(), exclude="0", nonfinite="skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    for bad in (False, True):
        optimizer.zero_grad()
        model(torch.tensor([0, 3])).sum().backward()
        if bad:
            model[0].weight.grad._values()[0, 0] = math.nan
        optimizer.step()
        assert memory.skipped == bad
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_ten_steps_in_a_row_that_are_skipped_are_not_passed_over_in_silence():
    model, optimizer, memory = ready(RWalk(), nonfinite="skip")
    for n in range(1, 25):
        spoil(model, optimizer, 1.0 if n == 5 else math.nan)
        if n == 15:
            with pytest.warns(UserWarning, match="10 steps in a row were left out"):
                optimizer.step()
        else:
            optimizer.step()
    assert memory.skipped == 23


def test_a_gradient_of_large_but_finite_numbers_is_taken():
    model, optimizer, memory = ready(RWalk())
    spoil(model, optimizer, 1e100)
    optimizer.step()
    assert memory.skipped == 0


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match=r"`nonfinite` must be one of raise, skip, but is 'ignore'"):
        Consolidator(mlp(), RWalk(), nonfinite="ignore")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_are_told_apart_by_whether_all_squares_are_finite(dtype):
    fine = [torch.full((100, 100), 900.0, dtype=dtype), None, torch.ones((), dtype=torch.float32)]
    assert kernels.nonfinite(kernels.StepGradients(fine)).eq(0).all()
    fine[0][3, 3] = float("nan")
    assert kernels.nonfinite(kernels.StepGradients(fine)).eq(0).tolist() == [False, True, True]


def amp_loop(scaled, fused, rule, poison=(), pull="gradient", average="none", steps=11):
    """Train in float32, with or without a GradScaler; on the steps in `poison` the loss overflows."""
    torch.manual_seed(0)
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    memory = Consolidator(model, rule, 0.3, pull=pull, average=average).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    for task in (0, 1):
        for n, (x, y) in enumerate(batches(task, steps)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.as_tensor(x, dtype=torch.float32)), torch.as_tensor(y))
            if n in poison:
                if not scaled:
                    continue
                loss = loss * torch.tensor(3e38)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        memory.consolidate([(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)) for x, y in batches(task, 2)])
    return model, memory


@pytest.mark.parametrize("backend", ["blocked", "numba"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (RWalk(delta_t=3), {}),
        (RWalk(delta_t=3, fisher="example"), {}),
        (SI(), {}),
        (None, {"pull": "proximal", "average": "tail"}),
    ],
    ids=["rwalk", "rwalk example", "si", "recipe"],
)
def test_loss_scaling_gives_what_training_without_it_gives(rule, options, fused, backend):
    """A GradScaler hands fused optimisers scaled gradients and calls their hooks on skipped steps; others it does not."""
    if backend == "numba":
        pytest.importorskip("numba")
    kernels.use(backend)
    try:
        poison = (0, 3, 4, 10)
        model, memory = amp_loop(True, fused, rule, poison, **options)
        plain, theirs = amp_loop(False, fused, rule, poison, **options)
    finally:
        kernels.use("blocked")
    for name, omega in memory.anchor.omega.items():
        assert torch.allclose(omega, theirs.anchor.omega[name], rtol=2e-4, atol=1e-5 * float(omega.max()))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert memory.skipped == (8 if fused else 0)


@pytest.fixture
def late(monkeypatch):
    """Have flags waited for no more than on a GPU: what the host has counted is taken back before the next use."""
    monkeypatch.setattr(validity.PendingCheck, "on_device", True)


def skipped_step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("rule", [RWalk(delta_t=1), SI(), EWCpp()], ids=repr)
def test_a_skipped_step_is_taken_back_before_parameters_grow_or_join(rule, late):
    model = torch.nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    memory = Consolidator(model, rule).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    skipped_step(model, optimizer)
    for p in model.parameters():
        p.data, p.grad = torch.cat([p.data, torch.zeros(2, *p.shape[1:], dtype=p.dtype)]), None
    memory.penalty()
    train(model, optimizer, batches(1, 3))
    memory.consolidate()
    assert memory.skipped == 1
    assert memory.anchor.omega["weight"].shape == (5, 5)


@pytest.mark.parametrize("rule", [RWalk(delta_t=1), None, Kronecker()], ids=repr)
def test_a_bad_step_that_is_found_late_is_taken_back_from_rule_and_average(rule, late):
    """The optimiser has made it by then, so that the weights are lost; what the memory holds is not."""
    model, optimizer, memory = ready(rule, average="tail")
    before, weights = memory.state_dict(), copy.deepcopy(model.state_dict())
    spoil(model, optimizer, float("nan"))
    optimizer.step()
    with pytest.raises(FloatingPointError, match="one step later"):
        memory.summary()
    model.load_state_dict(weights)
    other = Consolidator(model, rule, average="tail")
    other.load_state_dict(before)
    assert_same_state(memory, other)


def test_a_skipped_first_step_is_no_reason_to_refuse_another_optimiser(late):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    skipped_step(model, optimizer)
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    assert memory.skipped == 1


def test_the_default_device_is_no_matter():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 1))
    x, y = (torch.as_tensor(part) for part in batches(1, 1)[0])
    F.cross_entropy(model(x), y).backward()
    with torch.device("meta"):
        optimizer.step()
    assert memory.steps == 2
