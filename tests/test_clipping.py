"""Clipping: the walk of the gradients that the optimiser uses, and with `before_clip` of those before clipping."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, train, use_backend
from oracle import Simulation
from rwalk import EWC, SI, Consolidator, EWCpp, RWalk

LIMIT = 0.3


def by_norm(grad):
    norm = np.sqrt(sum((g**2).sum() for g in grad))
    return [g * min(1.0, LIMIT / (norm + 1e-6)) for g in grad]


def by_value(grad):
    return [g.clip(-LIMIT / 10, LIMIT / 10) for g in grad]


def clip_norm(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, LIMIT)


def clip_value(parameters):
    torch.nn.utils.clip_grad_value_(parameters, LIMIT / 10)


WAYS = [(by_norm, clip_norm), (by_value, clip_value)]


def backward(model, optimizer, batch, scale=1.0):
    optimizer.zero_grad()
    x, y = map(torch.as_tensor, batch)
    (F.cross_entropy(model(x), y) * scale).backward()


def clipped_loop(model, optimizer, memory, stream, clip, calls=1):
    for batch in stream:
        backward(model, optimizer, batch)
        for _ in range(calls):
            memory.before_clip()
        clip(model.parameters())
        optimizer.step()


@pytest.fixture(params=["blocked", "numba"])
def backend(request):
    use_backend(request.param)


@pytest.mark.parametrize(("fisher", "calls"), [("batch", 0), ("batch", 1), ("batch", 2), ("example", 1), ("example", 2)])
@pytest.mark.parametrize(("by_hand", "clip"), WAYS, ids=["norm", "value"])
@pytest.mark.usefixtures("backend")
def test_clipped_runs_match_the_equations(by_hand, clip, fisher, calls):
    model = torch.nn.Linear(5, 3).double()
    truth = Simulation([p.detach().numpy().copy() for p in model.parameters()], alpha=0.3, delta_t=4)
    truth.momentum, truth.per_example = 0.5, fisher == "example"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    memory = Consolidator(model, RWalk(alpha=0.3, delta_t=4, fisher=fisher)).attach(optimizer)
    for task in range(3):
        clipped_loop(model, optimizer, memory, batches(task, 10), clip, calls)
        truth.task(batches(task, 10), clip=by_hand, see_clipped=not calls)
        memory.consolidate()
        for i, (name, p) in enumerate(model.named_parameters()):
            np.testing.assert_allclose(p.detach().numpy(), truth.theta[i], rtol=1e-8, atol=1e-11)
            np.testing.assert_allclose(memory.anchor.omega[name].numpy(), truth.omega[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), SI(), EWC(), EWCpp(), None], ids=repr)
def test_before_clip_without_clipping_changes_nothing(rule):
    runs = []
    for calls in (0, 1):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        memory = Consolidator(model, rule).attach(optimizer)
        for task in range(2):
            clipped_loop(model, optimizer, memory, batches(task, 7), lambda parameters: None, calls)
            memory.consolidate([tuple(map(torch.as_tensor, batch)) for batch in batches(task, 2)])
        runs.append((model, memory))
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-15)
    for name, omega in runs[0][1].anchor.omega.items():
        assert torch.allclose(omega, runs[1][1].anchor.omega[name], rtol=1e-10, atol=1e-13)


def ready(**options):
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    memory = Consolidator(model, RWalk(delta_t=3)).attach(optimizer)
    stream = [(x.astype(np.float32), y) for x, y in batches(0, 4)]
    train(model, optimizer, stream)
    memory.consolidate()
    return model, optimizer, memory, stream


def test_copies_last_until_the_step():
    model, optimizer, memory, stream = ready()
    backward(model, optimizer, stream[0])
    memory.before_clip()
    assert memory._unclipped is not None
    optimizer.step()
    assert memory._unclipped is None
    backward(model, optimizer, stream[0])
    memory.before_clip()
    memory.detach()
    assert memory._unclipped is None


def test_calls_at_the_wrong_time_are_refused():
    _, optimizer, memory, _ = ready()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"Got `before_clip` without gradients.*Expected .*after `loss.backward\(\)`"):
        memory.before_clip()
    memory.detach()
    with pytest.raises(RuntimeError, match=r"Got a call before `attach`.*Call `attach"):
        memory.before_clip()


def test_a_step_with_other_gradients_is_refused_before_anything_changes():
    model, optimizer, memory, stream = ready()
    before, weights = memory.state_dict(), copy.deepcopy(model.state_dict())
    backward(model, optimizer, stream[0])
    memory.before_clip()
    model[0].weight.grad = None
    with pytest.raises(RuntimeError, match=r"gradients for other parameters.*Call `before_clip` again"):
        optimizer.step()
    other = Consolidator(model, RWalk(delta_t=3))
    other.load_state_dict(before)
    assert_same_state(memory, other)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_an_infinite_gradient_is_found_where_clipping_hides_it(clip):
    model, optimizer, memory, stream = ready()
    backward(model, optimizer, stream[0])
    model[0].bias.grad[0] = float("inf")
    memory.before_clip()
    clip(model.parameters())
    with pytest.raises(FloatingPointError, match=r"`0\.bias before clipping`"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_gives_what_training_without_it_gives(fused):
    def run(scaled):
        model, optimizer, memory, stream = ready(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for n, batch in enumerate(stream * 2):
            if n in (2, 5):
                if not scaled:
                    continue
                batch = (batch[0] * np.float32("nan"), batch[1])
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(torch.as_tensor(batch[0])), torch.as_tensor(batch[1]))).backward()
            scaler.unscale_(optimizer)
            memory.before_clip(scaler)
            clip_norm(model.parameters())
            scaler.step(optimizer)
            scaler.update()
        memory.consolidate()
        return memory.anchor

    ours, plain = run(True), run(False)
    for name, omega in plain.omega.items():
        assert torch.allclose(ours.omega[name], omega, rtol=1e-4, atol=1e-6)
        assert torch.allclose(ours.point[name], plain.point[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_that_is_still_in_the_gradients_is_refused(fused):
    model, optimizer, memory, stream = ready(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weights = copy.deepcopy(model.state_dict())
    scaler.scale(torch.ones(()))
    backward(model, optimizer, stream[0], scale=2.0**10)
    with pytest.raises(RuntimeError, match=r"a loss scale still in the gradients.*Call `scaler.unscale_"):
        memory.before_clip(scaler)
    memory.before_clip()
    with pytest.raises(RuntimeError, match=r"another `GradScaler`.*Call `scaler.unscale_"):
        scaler.step(optimizer)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
