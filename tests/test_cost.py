"""What a step costs, counted: forward and backward calls, hooks, tensors held, large tensors made."""

import gc

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import mlp
from rwalk import Consolidator, RWalk

SIZE = 300


def setup():
    model = torch.nn.Linear(SIZE, SIZE, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, Consolidator(model, RWalk(delta_t=4)).attach(optimizer)


def step(model, optimizer):
    optimizer.zero_grad()
    F.mse_loss(model(torch.randn(2, SIZE)), torch.randn(2, SIZE)).backward()
    optimizer.step()
    optimizer.zero_grad()


def large():
    """Count the live plain tensors of the model's size: no parameter, no gradient."""
    gc.collect()
    pool = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == SIZE * SIZE}
    return len(pool)


def test_one_forward_one_backward_and_one_hook_per_step():
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    calls = {"forward": 0, "backward": 0}
    model.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    model[2].register_full_backward_hook(lambda *_: calls.__setitem__("backward", calls["backward"] + 1))
    for task in range(2):
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).sum().backward()
            optimizer.step()
        memory.consolidate()
        assert calls == {"forward": 7 * (task + 1), "backward": 7 * (task + 1)}
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks


def test_the_walk_holds_five_tensors_and_eight_once_there_is_an_anchor():
    """Five in the first task. Later point, omega and S join; S is read at a task's end only, so a step visits seven."""
    before = large()
    model, optimizer, memory = setup()
    size = model.weight.numel() * model.weight.element_size()
    for _ in range(9):
        step(model, optimizer)
    assert memory.state_bytes == 5 * size
    assert large() - before == 5
    for _ in range(3):
        memory.consolidate()
        for _ in range(9):
            step(model, optimizer)
        assert memory.state_bytes == 8 * size
        assert large() - before == 8


def test_a_step_makes_no_tensor_of_the_size_of_the_model():
    class Watch(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = isinstance(out, torch.Tensor) and out.numel() == SIZE * SIZE
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            self.made += fresh and out.untyped_storage().data_ptr() not in known
            return out

    model, optimizer, memory = setup()
    for _ in range(3):
        step(model, optimizer)
    memory.consolidate()
    for _ in range(9):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(2, SIZE)), torch.randn(2, SIZE)).backward()
        with Watch() as watch, torch.no_grad():
            memory._before_step(optimizer)
        assert watch.made == 0
        optimizer.step()
