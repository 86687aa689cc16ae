"""The optimiser's own step inside the visit: the same weights, importance and optimiser state as without it."""

import copy

import pytest
import torch
from torch.nn import functional as F

from cases import Heads, assert_same_state, batches, mlp, train, use_backend
from rwalk import EWC, L2, SI, Consolidator, EWCpp, RWalk

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd decay": lambda ps: torch.optim.SGD(ps, lr=0.05, weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adam fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "adam decay": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}
RULES = [RWalk(delta_t=4), RWalk(alpha="mean", fisher="example"), EWCpp(alpha=0.1), SI(), L2(), EWC()]


@pytest.fixture(params=["reference", "blocked", "numba"])
def backend(request):
    use_backend(request.param)


def taught(rule, make, inside, steps=11, tasks=2, model=None, **options):
    model = mlp() if model is None else model
    optimizer = make(model.parameters())
    memory = Consolidator(model, rule, 0.3, **options).attach(optimizer, inside=inside)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for task in range(tasks):
        for batch in batches(task, steps):
            train(model, optimizer, [batch])
            scheduler.step()
        memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(task, 2)])
    return model, optimizer, memory


def alike(a, b, rtol=1e-9):
    for x, y in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.allclose(x, y, rtol=rtol, atol=1e-14)
    for name, omega in a[2].anchor.omega.items():
        assert torch.allclose(omega, b[2].anchor.omega[name], rtol=1e-7, atol=1e-12)
    ours, theirs = (m[1].state_dict()["state"] for m in (a, b))
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert {k: v is None for k, v in ours[key].items()} == {k: v is None for k, v in state.items()}
        for name, value in state.items():
            assert value is None or torch.allclose(ours[key][name], value, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_result_is_the_same(rule, make, backend):
    alike(taught(rule, make, True), taught(rule, make, False))


@pytest.mark.parametrize(("average", "pull"), [("none", "gradient"), ("tail", "gradient"), ("tail", "proximal")])
def test_parameters_that_take_no_part_and_what_follows_the_step(average, pull, backend):
    rule = RWalk(delta_t=3) if pull == "gradient" else EWCpp(alpha="mean", accumulate="sum", normalize="task")
    results = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = Heads()
        results.append(taught(rule, OPTIMIZERS["adam"], inside, tasks=1, model=model, average=average, pull=pull))
        model.on = 1
        train(model, results[-1][1], batches(5, 7))
        results[-1][2].consolidate()
    alike(*results)


def test_gradients_are_where_the_user_left_them():
    model, optimizer, _ = taught(RWalk(), OPTIMIZERS["adam"], True)
    optimizer.zero_grad()
    x, y = batches(3, 1)[0]
    F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
    before = [(id(p.grad), p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (place, value) in zip(model.parameters(), before, strict=True):
        assert id(p.grad) == place
        assert torch.equal(p.grad, value)


def test_the_gradient_of_the_step_before_is_not_kept():
    for inside, first, later in ((True, 4, 7), (False, 5, 8)):
        for tasks, parts in ((0, first), (1, later), (2, later)):
            model, optimizer, memory = taught(RWalk(), OPTIMIZERS["sgd"], inside, tasks=tasks)
            train(model, optimizer, batches(9, 2))
            assert memory.state_bytes == parts * sum(p.nbytes for p in model.parameters())


def test_a_task_begun_inside_may_be_saved_and_finished_either_way():
    model, optimizer, memory = taught(RWalk(delta_t=4), OPTIMIZERS["momentum"], True, tasks=1)
    train(model, optimizer, batches(1, 6))
    finished = []
    for inside in (True, False):
        twin = mlp()
        twin.load_state_dict(model.state_dict())
        other = OPTIMIZERS["momentum"](twin.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed = Consolidator(twin, RWalk(delta_t=4))
        resumed.load_state_dict(memory.state_dict())
        resumed.attach(other, inside=inside)
        train(twin, other, batches(2, 5))
        resumed.consolidate()
        finished.append((twin, other, resumed))
    train(model, optimizer, batches(2, 5))
    memory.consolidate()
    assert_same_state(memory, finished[0][2])
    alike(*finished)


def test_the_way_may_change_at_any_step(backend):
    """Also where a parameter misses the step at which it does."""
    results = []
    for ways in ([False] * 4, [False, True, False, True], [True, False, True, True]):
        torch.manual_seed(0)
        model = Heads()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        memory = Consolidator(model, RWalk(delta_t=4), 0.3)
        for task in range(2):
            for k, inside in enumerate(ways):
                model.on = k % 2
                memory.detach()
                memory.attach(optimizer, inside=inside)
                train(model, optimizer, batches(10 * task + k, 3))
            memory.consolidate()
        results.append((model, optimizer, memory))
    alike(results[0], results[1])
    alike(results[0], results[2])


def test_a_loss_scaler_that_speaks_to_the_optimiser_and_a_step_that_it_skips():
    results = []
    for inside in (True, False):
        model, optimizer, memory = taught(RWalk(delta_t=4), OPTIMIZERS["adam fused"], inside, tasks=1, model=mlp())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for k, (x, y) in enumerate(batches(3, 7)):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))).backward()
            if k == 3:
                next(model.parameters()).grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert memory.skipped == 1
        memory.consolidate()
        results.append((model, optimizer, memory))
    alike(*results)


def test_gradients_before_clipping_are_refused():
    model, _, memory = taught(RWalk(), OPTIMIZERS["sgd"], True)
    F.cross_entropy(model(torch.as_tensor(batches(3, 1)[0][0])), torch.as_tensor(batches(3, 1)[0][1])).backward()
    with pytest.raises(RuntimeError, match=r"Got `before_clip` under .*inside=True.* or clip without"):
        memory.before_clip()


@pytest.mark.parametrize(
    ("make", "dtype", "words"),
    [
        (lambda ps: torch.optim.RMSprop(ps), torch.float32, "a `RMSprop`"),
        (lambda ps: torch.optim.Adam(ps, amsgrad=True), torch.float32, "`Adam` with amsgrad"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True), torch.float32, "with nesterov"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), torch.bfloat16, "in less than float32"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), torch.float32, "the proximal pull"),
    ],
)
def test_what_cannot_be_made_inside_is_refused(make, dtype, words):
    model = mlp(dtype)
    memory = Consolidator(model, RWalk(), pull="proximal" if "proximal" in words else "gradient")
    with pytest.raises(ValueError, match=f"Got .*{words}.*Leave out"):
        memory.attach(make(model.parameters()), inside=True)
