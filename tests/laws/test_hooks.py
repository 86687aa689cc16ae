"""Steps as people make them: closures, wrappers, overridden and compiled steps, two trainings in two threads, many tasks."""

import copy
import gc
import threading

import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, train
from rwalk import EWC, SI, Consolidator, RWalk, kernels

RULES = [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), SI(), EWC(), None]


def loader(task):
    return [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(task, 2)]


def closing(model, optimizer, stream):
    """The loop of libraries that hand the whole step to the optimiser."""
    for x, y in stream:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))
            loss.backward()
            return loss

        optimizer.step(closure=closure)


def run(rule, loop=train, make=torch.optim.SGD, wrap=lambda optimizer: optimizer, **options):
    """Three tasks; return model and memory."""
    model = mlp()
    optimizer = make(model.parameters(), lr=1 / 16)  # a power of two: a product with it is exact, so one step has one rounding
    outer = wrap(optimizer)
    memory = Consolidator(model, rule, **options).attach(outer)
    for task in range(3):
        loop(model, outer, batches(task, 7))
        memory.consolidate(loader(task))
    return model, memory


def assert_same_run(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))
    assert_same_state(a[1], b[1])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_closure_changes_nothing(rule):
    assert_same_run(run(rule, closing), run(rule))


def test_a_closure_that_fails_leaves_no_trace():
    model, memory = run(RWalk())
    before, weights = memory.state_dict(), copy.deepcopy(model.state_dict())

    def closure():
        raise KeyError("a broken batch")

    for _ in range(2):
        with pytest.raises(KeyError, match="a broken batch"):
            memory._memory.optimizer.step(closure)
    other = Consolidator(model, RWalk())
    other.load_state_dict(before)
    assert_same_state(memory, other)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    train(model, memory._memory.optimizer, batches(5, 2))
    assert memory.steps == 2


@pytest.mark.parametrize("pull", ["gradient", "proximal"])
def test_bad_numbers_in_a_closure_raise_or_are_skipped_before_anything_moves(pull):
    for nonfinite in ("raise", "skip"):
        model, memory = run(RWalk(), pull=pull, nonfinite=nonfinite)
        optimizer, before, weights = memory._memory.optimizer, memory.state_dict(), copy.deepcopy(model.state_dict())

        def closure(model=model):
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan"))

        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match=r"0\.weight"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        other = Consolidator(model, RWalk(), pull=pull)
        other.load_state_dict(before)
        assert_same_state(memory, other)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


class Twice(torch.optim.SGD):
    """Calls its closure before and after its step."""

    def step(self, closure=None):
        loss = super().step(closure)
        closure()
        return loss


class Sharpness(torch.optim.SGD):
    """Moves uphill before it calls the closure, as sharpness-aware minimisation does."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(0.1)
        with torch.enable_grad():
            closure()


@pytest.mark.parametrize(("make", "words"), [(Twice, "twice in a step"), (Sharpness, "after it has moved the weights")])
def test_an_optimiser_that_needs_more_than_one_gradient_is_refused_before_we_count(make, words):
    model = mlp()
    optimizer = make(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    calls = []

    def closure():
        calls.append(1)
        train(model, torch.optim.SGD(model.parameters(), lr=0.0), batches(0, 1))

    with pytest.raises(RuntimeError, match=rf"`{make.__name__}` calls its closure {words}.*Use an optimiser"):
        optimizer.step(closure)
    assert len(calls) == (make is Twice)
    assert memory.steps == 0


class Overriding(torch.optim.Adam):
    """What runs all hooks twice: a method `step` that calls another one with hooks of its own."""

    def step(self, closure=None):
        return super().step(closure)


class Evaluating(torch.optim.Adam):
    """The same, with a closure of its own."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("loop", [train, closing])
@pytest.mark.parametrize("rule", [RWalk(delta_t=3), None], ids=repr)
@pytest.mark.parametrize("make", [Overriding, Evaluating])
def test_an_overridden_step_counts_once(make, rule, loop):
    torch.optim.Adam(mlp().parameters())  # from now on Adam's own method calls hooks
    assert_same_run(run(rule, loop, make), run(rule, loop, torch.optim.Adam))


class Failing(Overriding):
    """The same, which fails once, within its inner step."""

    fail = False

    @torch.no_grad()
    def _init_group(self, *args, **kwargs):
        if self.fail:
            raise RuntimeError("out of memory")
        return super()._init_group(*args, **kwargs)


def test_a_step_after_one_that_failed_is_observed_too():
    """As where memory runs out: the step that failed does not count, the one after it does."""
    torch.optim.Adam(mlp().parameters())
    model = mlp()
    optimizer = Failing(model.parameters(), lr=0.05)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    optimizer.fail = True
    try:
        train(model, optimizer, batches(0, 1))
    except RuntimeError:
        optimizer.fail = False
        train(model, optimizer, batches(0, 1))
    assert memory.steps == 4


class Wrapper(torch.optim.Optimizer):
    """The shape of Accelerate's: an optimiser by name only, that passes everything on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("loop", [train, closing])
@pytest.mark.parametrize("wrap", [Wrapper, lambda optimizer: Wrapper(Wrapper(optimizer))], ids=["once", "twice"])
def test_a_wrapped_optimiser_is_watched_once(wrap, loop):
    wrapped = run(None, loop, wrap=wrap)
    assert_same_run(wrapped, run(None))
    optimizer = wrapped[1]._memory.optimizer
    assert type(optimizer) is torch.optim.SGD
    for again in (optimizer, wrap(optimizer)):
        with pytest.raises(RuntimeError, match="attached to this optimiser already"):
            wrapped[1].attach(again)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_a_wrapper_that_hides_its_optimiser_and_calls_no_hooks_is_refused():
    class Hiding(Wrapper):
        optimizer = property(lambda self: None)

        def __init__(self, optimizer):
            self.base = optimizer

        param_groups = property(lambda self: self.base.param_groups)

    model = mlp()
    hiding = Hiding(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"`Hiding` does not call the hooks.*attach to that one"):
        Consolidator(model, RWalk()).attach(hiding)


class OverridingSGD(torch.optim.SGD):
    """What runs all hooks twice, under SGD."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.optim.SGD, OverridingSGD])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rule", RULES[:3] + RULES[4:], ids=repr)
def test_a_compiled_step_runs_our_part_outside_of_its_graph(rule, backend, make):
    """Under SGD, which computes the same bits either way: where a graph multiplies before it adds, that product is exact."""
    torch.optim.SGD(mlp().parameters())  # from now on its own method calls hooks
    torch._dynamo.reset()

    def loop(model, optimizer, stream):
        step = torch.compile(optimizer.step, backend=backend)
        for x, y in stream:
            optimizer.zero_grad()
            F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
            step()

    assert_same_run(run(rule, loop, make), run(rule))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_in_training(backend):
    torch._dynamo.reset()

    def loop(model, optimizer, stream):
        train(torch.compile(model, backend=backend), optimizer, stream)

    (model, memory), (plain, theirs) = run(RWalk(delta_t=3), loop), run(RWalk(delta_t=3))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
    for name, omega in theirs.anchor.omega.items():
        assert torch.allclose(omega, memory.anchor.omega[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ["blocked", "numba"])
@pytest.mark.parametrize("rule", [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), None], ids=repr)
def test_two_trainings_in_two_threads_do_not_meet(backend, rule):
    if backend == "numba":
        pytest.importorskip("numba")

    def train_wide(seed, out, barrier=None):
        torch.set_num_threads(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(5, 300), torch.nn.Tanh(), torch.nn.Linear(300, 300), torch.nn.Linear(300, 3)
        )
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.sin(torch.arange(p.numel()) * (1.3 + i) + seed).view_as(p) / 20)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
        memory = Consolidator(model, rule).attach(optimizer)
        for task in range(2):
            for x, y in batches(10 * seed + task, 12):
                if barrier is not None:
                    barrier.wait()
                optimizer.zero_grad()
                F.cross_entropy(model(torch.as_tensor(x, dtype=torch.float32)), torch.as_tensor(y)).backward()
                optimizer.step()
            memory.consolidate()
        out[seed] = model, memory

    threads_before, one_by_one, side_by_side, barrier = torch.get_num_threads(), {}, {}, threading.Barrier(2, timeout=60)
    kernels.use(backend)
    try:
        for seed in (1, 2):
            train_wide(seed, one_by_one)
        threads = [threading.Thread(target=train_wide, args=(seed, side_by_side, barrier)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        kernels.use("blocked")
        torch.set_num_threads(threads_before)
    for seed in (1, 2):
        assert_same_run(one_by_one[seed], side_by_side[seed])


@pytest.mark.parametrize("rule", [RWalk(delta_t=2, alpha=0.1, fisher="example"), SI(), EWC(), None], ids=repr)
def test_two_hundred_tasks_hold_no_more_than_fifty(rule):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    memory = Consolidator(model, rule, 1e-3).attach(optimizer)
    x, y = loader(0)[0]

    def tasks(n):
        for _ in range(n):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            memory.consolidate([(x, y)])
        gc.collect()
        alive = gc.get_objects()
        found = [o for o in alive if issubclass(type(o), torch.Tensor)]
        entries = sum(len(o) for o in alive if type(o) in (list, dict, set, tuple) and o is not found)
        return len(found), sum(t.nbytes for t in found), memory.state_bytes, len(alive) + entries

    few, many = tasks(50), tasks(150)
    assert all(later <= sooner for later, sooner in zip(many[:3], few[:3], strict=True))  # other tests' waste may go meanwhile
    assert many[3] - few[3] < 100  # one more entry for each task would be 150
