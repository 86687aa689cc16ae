"""What may happen between two steps, and must be noticed: nothing of a step may rest on where things were at the one before."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional as F

from cases import Heads, batches, mlp, use_backend
from rwalk import Consolidator, RWalk, kernels

BACKENDS = ["blocked", "numba"]


class Training:
    """Two tasks in which something happens just before and just after each backward pass of the second one."""

    def __init__(self, backend="reference", make=torch.optim.Adam, model=None, hold=None, **settings):
        use_backend(backend)
        self.model = mlp() if model is None else model
        self.optimizer = make((hold or self.model).parameters(), lr=0.01, **settings)
        self.memory = Consolidator(self.model, RWalk(delta_t=3), 0.3).attach(self.optimizer)

    def run(self, before=lambda training, step: None, then=lambda training: None):
        for task in range(2):
            for step, (x, y) in enumerate(batches(task, 8)):
                if task:
                    before(self, step)
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
                if task:
                    then(self)
                self.optimizer.step()
            self.memory.consolidate()
        return self

    def equals(self, other):
        for one, two in ((self.model, other.model), (self.memory.anchor, other.memory.anchor)):
            ours, theirs = ([*t.tensors()] if one is self.memory.anchor else [*t.parameters()] for t in (one, two))
            assert len(ours) == len(theirs)
            assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


def elsewhere(tensor):
    """Move a tensor's values to other memory, and spoil what is left behind."""
    old = tensor.data
    tensor.data = old.clone()
    old.fill_(math.nan)


def turned(tensor):
    """Store a matrix by columns; leave anything else as it is."""
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def parameters_moved(training, step):
    for p in training.model.parameters():
        elsewhere(p)


def anchor_moved(training, step):
    for t in training.memory.anchor.tensors():
        elsewhere(t)


def moments_moved(training, step):
    for p in training.model.parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            elsewhere(training.optimizer.state[p][moment])


def parameters_turned(training, step):
    if step % 3 == 1:
        for p in training.model.parameters():
            p.data = turned(p.data) if step % 2 else p.data.contiguous()


def memory_reloaded(training, step):
    training.memory.load_state_dict(training.memory.state_dict())


def optimiser_reloaded(training, step):
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def attached_again(training, step):
    training.memory.detach()
    training.memory.attach(training.optimizer)


def kernels_switched(training, step):
    kernels.use("blocked" if kernels.current() != "blocked" else "auto")


def optimiser_copied(training, step):
    copy.deepcopy(training.optimizer.state_dict())
    copy.deepcopy(training.model)


NEUTRAL = [
    parameters_moved,
    anchor_moved,
    moments_moved,
    parameters_turned,
    memory_reloaded,
    optimiser_reloaded,
    attached_again,
    kernels_switched,
    optimiser_copied,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("happening", NEUTRAL, ids=lambda h: h.__name__)
def test_what_changes_nothing_changes_nothing(happening, backend):
    Training(backend).run(happening).equals(Training().run())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [torch.clone, turned])
def test_gradients_may_be_replaced(change, backend):
    def replaced(training):
        for p in training.model.parameters():
            p.grad = change(p.grad)

    Training(backend).run(then=replaced).equals(Training().run())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "settings"), [(torch.optim.Adam, {"betas": (0.8, 0.95)}), (torch.optim.SGD, {"momentum": 0.5})]
)
def test_rates_may_change_with_every_step(make, settings, backend):
    def changed(training, step):
        for group in training.optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
            group |= {"betas": (0.5 + 0.05 * step, 0.9)} if make is torch.optim.Adam else {"momentum": 0.1 * step}

    ways = (Training(way, make=make, **settings).run(changed) for way in (backend, "reference"))
    next(ways).equals(next(ways))


def frozen_in_turn(training, step):
    training.model.on = step % 2
    training.model.trunk.bias.requires_grad_(step % 3 != 0)


def head_added(training, step):
    if step == 4:
        training.optimizer.add_param_group({"params": training.model.heads.parameters(), "lr": 0.03})
    training.model.on = step % 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("happening", [frozen_in_turn, head_added], ids=lambda h: h.__name__)
def test_what_takes_part_may_change_with_every_step(happening, backend):
    def trained(backend):
        torch.manual_seed(0)
        model = Heads()
        hold = model.trunk if happening is head_added else model
        return Training(backend, model=model, hold=hold).run(happening)

    trained(backend).equals(trained("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_a_step_keeps_gradients_alive(backend):
    """A table of a step holds addresses alone, so that what is freed is freed."""
    training = Training(backend).run()
    alive = [weakref.ref(p.grad) for p in training.model.parameters()]
    training.optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
