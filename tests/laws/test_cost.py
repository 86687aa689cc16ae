"""What a step costs, counted: forward and backward calls, hooks, tensors held, large tensors made."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import mlp
from rwalk import EWC, L2, SI, Consolidator, EWCpp, RWalk, TaskFisher

SIZE = 600


def attached(rule=RWalk(delta_t=4)):  # noqa: B008
    model = torch.nn.Linear(SIZE, SIZE, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, Consolidator(model, rule, 0.001).attach(optimizer)


def step(model, optimizer):
    optimizer.zero_grad()
    F.mse_loss(model(torch.randn(2, SIZE)), torch.randn(2, SIZE)).backward()
    optimizer.step()
    optimizer.zero_grad()


def large():
    """Count the live plain tensors of the model's size: no parameter or view of one, no gradient."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() == SIZE * SIZE]
    plain, own = (
        {t.untyped_storage().data_ptr() for t in found if (type(t) is torch.Tensor) == kind} for kind in (True, False)
    )
    return len(plain - own)


def test_one_forward_one_backward_and_a_hook_before_and_after_each_step():
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
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


def test_per_example_squares_cost_a_small_forward_pass_at_the_first_step_of_a_task():
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, RWalk(fisher="example")).attach(optimizer)
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    for _ in range(2):
        counts = []
        for _ in range(4):
            optimizer.zero_grad()
            with Operations() as operations:
                model(torch.randn(6, 5)).square().mean().backward()
                optimizer.step()
            counts.append(operations.count)
        memory.consolidate()
        assert counts[0] > counts[1] >= counts[2] == counts[3]  # at the first comparison something is laid out
    assert sizes == 2 * [2, 6, 6, 6, 6]


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_walk_holds_six_tensors_and_nine_once_there_is_an_anchor():
    """Six in the first task, a step's gradient among them. Later point, omega and S join, which a step does not visit."""
    before = large()
    model, optimizer, memory = attached()
    size = model.weight.numel() * model.weight.element_size()
    for _ in range(9):
        step(model, optimizer)
    assert memory.state_bytes == 6 * size
    assert large() - before == 6
    for _ in range(3):
        memory.consolidate()
        for _ in range(9):
            step(model, optimizer)
        assert memory.state_bytes == 9 * size
        assert large() - before == 9


class LargeTensors(TorchDispatchMode):
    """Counts large tensors that operations make, and large storages that they touch."""

    def __init__(self):
        super().__init__()
        self.made, self.touched = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view touches nothing
            came, went = (self.large(side) for side in ([*args, *(kwargs or {}).values()], [out]))
            self.made += len(went - came)
            self.touched |= came | went
        return out

    def large(self, values):
        flat = [t for v in values for t in (v if isinstance(v, list | tuple) else [v]) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in flat]
        return {s.data_ptr() for s in storages if s.nbytes() >= 4 * SIZE * SIZE}


def hooks(model, optimizer, memory):
    """Run what we do at a step, and only that, under watch."""
    optimizer.zero_grad()
    F.mse_loss(model(torch.randn(2, SIZE)), torch.randn(2, SIZE)).backward()
    with LargeTensors() as watch, torch.no_grad():
        memory._observer.before(optimizer)
        if memory._observer.works_after:
            memory._observer.after(optimizer)
    optimizer.step()
    return watch


@pytest.mark.parametrize("rule", [RWalk(delta_t=4), EWCpp(), SI(), L2(), EWC(), TaskFisher()], ids=repr)
def test_a_step_makes_no_tensor_of_the_size_of_the_model(rule):
    model, optimizer, memory = attached(rule)
    data = [(torch.randn(2, SIZE), torch.randint(SIZE, (2,)))]
    for _ in range(3):
        step(model, optimizer)
    memory.consolidate(data)
    step(model, optimizer)  # at the first one room is made for its gradient
    for _ in range(9):
        assert hooks(model, optimizer, memory).made == 0


@pytest.mark.parametrize(
    ("rule", "first", "later"),
    [(RWalk(delta_t=100), 6, 8), (EWCpp(), 2, 5), (SI(), 5, 7), (L2(), 1, 4), (TaskFisher(), 4, 6)],
    ids=["RWalk", "EWCpp", "SI", "L2", "recipe"],
)
def test_a_step_touches_each_of_its_tensors_and_no_others(rule, first, later):
    """Gradient and parameters included. RWalk: F, path, mark, previous gradient; later point and omega; not the scores."""
    model, optimizer, memory = attached(rule)
    for expected in (first, later, later):
        for _ in range(3):
            hooks(model, optimizer, memory)
        assert len(hooks(model, optimizer, memory).touched) == expected
        memory.consolidate()


@pytest.mark.parametrize("layers", [2, 60])  # few tensors, and many, which are laid side by side
def test_under_the_default_no_gradient_is_kept_after_a_step(layers):
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model).attach(optimizer)
    for task in range(2):
        for _ in range(12):
            model(torch.randn(6, 5)).square().mean().backward()
            grads = [weakref.ref(p.grad) for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            assert not any(grad() is not None for grad in grads), task
        memory.consolidate()


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("large", [5, 300])  # small tensors are laid side by side, large ones looked at alone
def test_one_bad_number_among_many_gradients_is_named(large):
    model = torch.nn.Sequential(torch.nn.Linear(5, large), torch.nn.Linear(large, large), torch.nn.Linear(large, 5))
    model.extend([torch.nn.Linear(5, 5) for _ in range(60)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model).attach(optimizer)
    for bad in (False, False, True):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        if bad:
            model[33].bias.grad[2] = torch.nan
            with pytest.raises(FloatingPointError, match=r"The gradients of `33\.bias` are not finite"):
                optimizer.step()
        else:
            optimizer.step()
    assert memory.steps == 2
