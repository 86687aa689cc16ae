"""Mixed precision, low-precision weights and accumulated gradients give the importances of plain training."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp
from oracle import Simulation
from rwalk import EWC, SI, Consolidator, RWalk, TaskFisher

RULES = [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), SI(), EWC(), TaskFisher(), None]
SHARE = {torch.bfloat16: 0.01, torch.float16: 0.00125}
"""How far importances may be from those of float32, as a share of their norm: three times what was measured."""


def tensors(batch, dtype):
    return torch.as_tensor(batch[0], dtype=dtype), torch.as_tensor(batch[1])


def run(rule, context=nullcontext, scaler=None, dtype=torch.float32, fused=False, parts=1, factor=1.0, lr=0.1, record=None):
    """Two tasks of 12 batches, each given in parts whose losses are multiplied by a factor; returns model and memory."""
    model = mlp(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=fused)
    memory = Consolidator(model, rule, 0.1).attach(optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for task in range(2):
        for batch in batches(task, 12, size=8):
            optimizer.zero_grad()
            x, y = tensors(batch, dtype)
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with context():
                    loss = F.cross_entropy(model(a), b) * factor
                scaler.scale(loss).backward()
            before = [p.detach().double().numpy() for p in model.parameters()]
            grad = [p.grad.double().numpy() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if record is not None:
                record.append((grad, before, [p.detach().double().numpy() for p in model.parameters()]))
        memory.consolidate([tensors(batch, dtype) for batch in batches(task, 3, size=8)])
    return model, memory


def distance(memory, theirs):
    """Norm of the difference of two importances over that of the second."""
    a, b = (torch.cat([omega.double().flatten() for omega in m.anchor.importance().values()]) for m in (memory, theirs))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", SHARE, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_autocast_is_as_near_to_float32_as_its_precision(rule, dtype, fused):
    def context():
        return torch.autocast("cpu", dtype)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype is torch.float16 else None
    model, memory = run(rule, context, scaler, fused=fused)
    plain, theirs = run(rule)
    assert 0 < distance(memory, theirs) < SHARE[dtype]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=SHARE[dtype])
        assert p.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_weights_in_bfloat16_have_state_in_float32(rule):
    model, memory = run(rule, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    apart = () if memory._memory.by_element else memory.anchor.point.values()  # which lose nothing in two bytes
    assert {t.dtype for t in apart} <= {torch.bfloat16}
    ids = {id(t) for t in apart}
    assert {t.dtype for t in memory._memory.tensors() if id(t) not in ids} == {torch.float32}
    assert distance(memory, run(rule)[1]) < 0.025


@pytest.mark.parametrize("low", ["weights", "autocast"])
def test_the_walk_of_bfloat16_is_that_of_the_gradients_and_weights_that_came(low):
    """Truth: the walk summed in float64 from recorded numbers, which are what low precision has made of them."""
    moves = []
    if low == "weights":
        _, memory = run(RWalk(delta_t=3, alpha=0.3), dtype=torch.bfloat16, record=moves)
    else:
        _, memory = run(RWalk(delta_t=3, alpha=0.3), lambda: torch.autocast("cpu", torch.bfloat16), record=moves)
    truth = Simulation(moves[0][1], alpha=0.3, delta_t=3)
    for task in range(2):
        truth.replay(moves[12 * task : 12 * task + 12])
    for ours, omega in zip(memory.anchor.omega.values(), truth.omega, strict=True):
        np.testing.assert_allclose(ours.numpy(), omega, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("mean", [True, False], ids=["divided", "summed"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_micro_batches_are_one_step(rule, mean, parts):
    """Losses divided by the number of parts are the mean over the batch; if they are not, all are that many times larger."""
    lr = 0.1 if mean else 0.1 / parts
    model, memory = run(rule, dtype=torch.float64, parts=parts, factor=1 / parts if mean else 1.0, lr=lr)
    plain, theirs = run(rule, dtype=torch.float64, factor=1.0 if mean else float(parts), lr=lr)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
    assert distance(memory, theirs) < 1e-8


@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_under_autocast_and_a_scaler(fused):
    def context():
        return torch.autocast("cpu", torch.float16)

    _, memory = run(
        RWalk(delta_t=3), context, torch.amp.GradScaler("cpu", init_scale=2.0**10), fused=fused, parts=4, factor=0.25
    )
    assert distance(memory, run(RWalk(delta_t=3))[1]) < SHARE[torch.float16]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_that_the_scaler_skips_changes_nothing(rule, fused):
    model, memory = run(rule, fused=fused)
    optimizer, scaler = memory._memory.optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, twin = copy.deepcopy(model.state_dict()), Consolidator(model, rule, 0.1)
    twin.load_state_dict(memory.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        x, y = tensors(batches(5, 1)[0], torch.float32)
        scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same_state(memory, twin)
    assert memory.skipped == (2 if fused else 0)  # the others are not even called
