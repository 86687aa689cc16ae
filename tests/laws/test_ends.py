"""The end of a task: it counts once, whole or not at all, and for the parameters that the model has then."""

import copy
import gc
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import assert_same_state, batches, mlp, tensors, train
from rwalk import EWC, L2, MAS, SI, Anchor, Consolidator, Kronecker, OnlineEWC, RWalk, kernels
from rwalk.anchors import ElementwiseAnchor
from rwalk.gradients.layer_rules import Sum
from rwalk.rules import rules

ALL = [kind() for kind in rules().values()]
RECIPE = [*ALL, RWalk(alpha=0.01), None]


def loader(seed, count=3):
    return [tuple(map(torch.as_tensor, batch)) for batch in batches(seed + 50, count)]


def trained(rule, tasks=1, then=6, average=None):
    """Train some tasks, and then a few steps of the next one."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    memory = Consolidator(model, rule, 1e-2, average=average).attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, batches(task, 8))
        memory.consolidate(loader(task))
    train(model, optimizer, batches(tasks, then))
    return model, optimizer, memory


def kept(model, memory):
    return tensors(memory) | {f"model.{name}": value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


class Interrupted(BaseException):
    """As Ctrl-C is, no `Exception`."""


PLACES = [
    "rwalk.rules.base.TaskEnd.renew",
    "rwalk.consolidation.offload.Offload.keep_anchor",
    "rwalk.anchors.elementwise.copies",
]


@pytest.mark.parametrize("error", [MemoryError("no memory"), Interrupted()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("average", ["none", "tail"])
@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_an_end_that_fails_leaves_no_trace_and_may_be_repeated(rule, average, error):
    model, _, memory = trained(rule, average=average)
    other, _, whole = trained(rule, average=average)
    before = kept(model, memory)
    for place in (
        *PLACES,
        "rwalk.anchors.elementwise.ElementwiseAnchor.merge",
        "rwalk.anchors.factors.KroneckerFactor.of",
        "rwalk.rules.base.check_finite",
    ):
        with mock.patch(place, side_effect=error) as reached:
            try:
                memory.consolidate(loader(1))
            except type(error):
                equal(kept(model, memory), before)
            else:
                assert not reached.called
                pytest.fail("nothing failed") if place == PLACES[1] else None
                model, _, memory = trained(rule, average=average)
    torch.manual_seed(5)
    memory.consolidate(loader(1))
    torch.manual_seed(5)
    whole.consolidate(loader(1))
    equal(kept(model, memory), kept(other, whole))


@pytest.mark.parametrize("rule", [RWalk(), SI(), EWC(), Kronecker(), None], ids=repr)
def test_an_end_whose_data_fails_in_the_middle_leaves_no_trace(rule):
    model, _, memory = trained(rule, average="tail")
    model.append(torch.nn.BatchNorm1d(3).double())  # whose statistics are renewed
    before = kept(model, memory)

    def data():
        yield from loader(1, 2)
        raise OSError("the disk is gone")

    class Data:
        def __iter__(self):
            return data()

    with pytest.raises(OSError, match="the disk is gone"):
        memory.consolidate(Data())
    equal(kept(model, memory), before)


class Stopping(TorchDispatchMode):
    """Raises an error in place of one operation, the n-th; counts them all."""

    def __init__(self, n=-1):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise Interrupted
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, 3, 5])
@pytest.mark.parametrize("rule", [RWalk(), SI(), EWC(), None], ids=repr)
def test_an_end_that_is_stopped_anywhere_may_be_repeated(rule, rows):
    """Also where it has to take up a new head, or a larger one."""

    def ready():
        model, _, memory = trained(rule, average="tail")
        if rows:
            fresh(model, rows)
        return model, memory

    warnings.simplefilter("ignore")
    model, memory = ready()
    with Stopping() as all_of_it:
        memory.consolidate(loader(1))
    whole = kept(model, memory)
    for n in range(1, all_of_it.count, max(all_of_it.count // 25, 1)):
        model, memory = ready()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(Interrupted), Stopping(n):
            memory.consolidate(loader(1))
        if memory.tasks == 1:
            equal(model.state_dict(), before)
        memory.consolidate(loader(1))
        equal(kept(model, memory), whole)


@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_a_module_that_went_away_is_let_go_with_a_word(rule, tmp_path):
    model, _, memory = trained(rule)
    model.add_module("extra", torch.nn.Linear(3, 3).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.detach()
    memory.attach(optimizer)
    train(model, optimizer, batches(1, 3))
    memory.consolidate(loader(1))
    train(model, optimizer, batches(2, 3))
    del model.extra
    with pytest.warns(UserWarning, match=r"`extra\.weight`, `extra\.bias` went away"):
        memory.consolidate(loader(2))
    assert memory.anchor.point.keys() == dict(model.named_parameters()).keys()
    memory.save(tmp_path / "memory")
    Consolidator(model, memory.rule, average=memory.average).load(tmp_path / "memory")


@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_an_interruption_after_the_end_was_kept_does_not_count_it_twice(rule):
    model, optimizer, memory = trained(rule)
    other, step, whole = trained(rule)
    kind = type(memory.rule)
    torch.manual_seed(5)
    with mock.patch.object(kind, "renew", side_effect=Interrupted()), pytest.raises(Interrupted):
        memory.consolidate(loader(1))
    torch.manual_seed(5)
    whole.consolidate(loader(1))
    assert (memory.tasks, memory.steps) == (whole.tasks, whole.steps) == (2, 0)
    for m, o in ((model, optimizer), (other, step)):
        train(m, o, batches(2, 5))
    torch.manual_seed(6)
    memory.consolidate(loader(2))
    torch.manual_seed(6)
    whole.consolidate(loader(2))
    equal(kept(model, memory), kept(other, whole))


@pytest.mark.parametrize("again", ["same", "equal", "shuffled", "loaded"])
@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_a_second_end_without_a_step_does_not_count_the_task_twice(rule, again):
    _, _, memory = trained(rule)
    data = loader(1)
    memory.consolidate(data)
    omega = {name: value.clone() for name, value in memory.anchor.omega.items()}
    if again == "loaded":
        state, memory = memory.state_dict(), Consolidator(memory.model, rule)
        memory.load_state_dict(state)
    data = {"equal": loader(1), "shuffled": loader(1)[::-1]}.get(again, data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memory.consolidate(data)
    for name, value in memory.anchor.omega.items():
        assert torch.allclose(value, omega[name], rtol=1e-12, atol=0), name
    if memory.rule.measures == "data":
        assert [str(w.message) for w in said] == [mock.ANY]
        assert "without any training since the last time" in str(said[0].message)
        assert memory.tasks == 2


@pytest.mark.parametrize("rule", [EWC(), OnlineEWC(), MAS(), Kronecker(measure="data")], ids=repr)
def test_without_an_optimiser_too_and_other_data_or_other_weights_count(rule):
    model = mlp()
    memory = Consolidator(model, rule)
    memory.consolidate(loader(0))
    with pytest.warns(UserWarning, match="so that no task counts"):
        memory.consolidate(loader(0))
    assert memory.tasks == 1
    memory.consolidate(loader(1))
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    memory.consolidate(loader(1))
    assert memory.tasks == 3
    before = tensors(memory)
    with pytest.warns(UserWarning, match="so that no task counts"):
        memory.estimate(loader(1))
    equal(tensors(memory), before)
    memory.estimate(loader(2))
    assert memory.tasks == 4


# Parameters that are not the ones they were


def fresh(model, rows=3):
    torch.manual_seed(9)
    model[2] = torch.nn.Linear(7, rows).double()


REPLACED = r"`2\.weight`, `2\.bias` were replaced by others with other values"


@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("average", ["none", "tail"])
@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_a_head_that_is_replaced_before_the_end_is_new_and_the_anchor_is_the_model(rule, average, rows):
    model, _, memory = trained(rule, average=average)
    old = copy.deepcopy(model[2])
    fresh(model, rows)
    now = copy.deepcopy(model[2])
    data = [(x, y) for x, y in loader(1)]
    with pytest.warns(UserWarning, match=REPLACED):
        memory.consolidate(data)
    for name, p in model.named_parameters():
        if rule is None or rule.measures != "data" or not isinstance(rule, EWC) or name.startswith("2."):
            assert torch.equal(p, memory.anchor.point[name]), name
    assert torch.equal(model[2].weight, now.weight)
    assert not torch.equal(model[2].weight[:3], old.weight)
    if memory.rule.measures == "steps":
        assert not memory.anchor.importance()["2.weight"].any()
        assert memory.anchor.importance()["0.weight"].any()


@pytest.mark.parametrize("rule", [r for r in RECIPE if not isinstance(r, L2)], ids=repr)
def test_a_new_head_of_the_old_name_and_shape_is_not_pulled_to_the_old_head(rule):
    model, _, memory = trained(rule, tasks=2, then=0)
    fresh(model)
    with pytest.warns(UserWarning, match=REPLACED):
        memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert "2.weight" not in memory.anchor.point
    assert "0.weight" in memory.anchor.point
    start = model[2].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    memory.strength = 0.5
    memory._memory.optimizer.step()
    assert torch.equal(model[2].weight, start)


@pytest.mark.parametrize("how", ["copied", "deepcopied", "half"])
@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_a_parameter_that_is_exchanged_for_an_equal_one_keeps_what_it_has(rule, how):
    model, _, memory = trained(rule, tasks=2, then=0)
    omega = {name: value.clone() for name, value in memory.anchor.omega.items()}
    if how == "copied":
        model[2].weight = torch.nn.Parameter(model[2].weight.detach().clone())
    elif how == "deepcopied":
        model[2] = copy.deepcopy(model[2])
    else:
        model[2].weight = torch.nn.Parameter(model[2].weight.detach().float())
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for name, value in memory.anchor.omega.items():
        assert torch.allclose(value.double(), omega[name], rtol=1e-6), name


def test_an_average_outlives_a_parameter_that_is_exchanged_for_an_equal_one():
    model, _, memory = trained(None)
    last = model[2].weight.detach().clone()
    model[2].weight = torch.nn.Parameter(last.clone())
    memory.consolidate()
    assert not torch.equal(model[2].weight, last)
    assert torch.equal(model[2].weight, memory.anchor.point["2.weight"])


# What is asked for out of range


@pytest.mark.parametrize("value", [1e-46, 1e-39, 0.0, -1.0, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize(("kind", "name"), [(RWalk, "eps"), (SI, "xi")])
def test_a_damping_that_float32_does_not_know_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` of {kind.__name__} must be a number from 1e-30 to 1e\+30"):
        kind(**{name: value})


@pytest.mark.parametrize("rule", [RWalk(eps=1e-30), SI(xi=1e-30)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_damping_gives_finite_importance_or_a_plain_error(rule, dtype):
    model = mlp(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    memory = Consolidator(model, rule, 0.0).attach(optimizer)
    for size in (1.0, 1e15):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
        optimizer.step()
        try:
            memory.consolidate()
        except FloatingPointError as error:
            assert "importance that is not finite, of `0.weight`" in str(error)  # noqa: PT017
            assert memory.tasks == 1
        else:
            assert all(torch.isfinite(omega).all() for omega in memory.anchor.omega.values())


@pytest.mark.parametrize("value", [2e38, 1e39, 1e300])
def test_a_strength_that_overflows_is_refused(value):
    with pytest.raises(ValueError, match=r"from 0 to 1e\+30"):
        Consolidator(mlp(), RWalk(), strength=value)
    with pytest.raises(ValueError, match=r"from 0 to 1e\+30"):
        trained(RWalk())[2].strength = value


@pytest.mark.parametrize("call", ["attach", "estimate", "consolidate", "adopt"])
def test_complex_parameters_are_refused_everywhere(call):
    model = torch.nn.Linear(3, 2, dtype=torch.complex64)
    memory = Consolidator(model, EWC() if call != "adopt" else L2())
    x = torch.randn(4, 3, dtype=torch.complex64)
    point = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = {
        "attach": lambda: memory.attach(torch.optim.SGD(model.parameters(), lr=0.1)),
        "estimate": lambda: memory.estimate([(x, torch.zeros(4).long())]),
        "consolidate": lambda: memory.consolidate([(x, torch.zeros(4).long())]),
        "adopt": lambda: memory.adopt(ElementwiseAnchor(point, {name: torch.ones(t.shape) for name, t in point.items()})),
    }
    with pytest.raises(ValueError, match="`weight`, `bias` are complex"):
        calls[call]()


# Gradients that share memory


@pytest.mark.parametrize("backend", ["reference", "blocked", "numba"])
@pytest.mark.parametrize("how", ["shared", "view", "expanded", "expanded rows"])
def test_each_parameter_is_pulled_once_whatever_memory_its_gradient_lies_in(how, backend):
    kernels.use(backend) if backend != "numba" else pytest.importorskip("numba") and kernels.use(backend)
    runs = []
    for apart in (False, True):
        torch.manual_seed(3)
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(4, 3).double()) for _ in range(2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory = Consolidator(model, L2(), 0.3).attach(optimizer)
        memory.consolidate()
        for _ in range(3):
            g = torch.full((4, 3), 0.7).double()
            made = {
                "shared": lambda g=g: [g, g],
                "view": lambda g=g: [g, g.view(4, 3)],
                "expanded": lambda: [torch.tensor(0.7).double().expand(4, 3)] * 2,
                "expanded rows": lambda g=g: [g[:1].expand(4, 3), g],
            }[how]()
            for p, one in zip(model, made, strict=True):
                p.grad = one.clone().contiguous() if apart else one
            optimizer.step()
        runs.append(list(model))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*runs, strict=True))


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])  # noqa: S301
@pytest.mark.parametrize("rule", [*ALL, RWalk(fisher="example"), None], ids=repr)
def test_a_copy_of_model_optimiser_and_memory_goes_on_alike_and_apart(rule, how):
    model, optimizer, memory = trained(rule)
    twin, step, other = how((model, optimizer, memory))
    assert other.model is twin
    assert_same_state(memory, other)
    for m, o in ((twin, step), (model, optimizer)):
        train(m, o, batches(5, 4))
    assert memory.steps == other.steps == 10
    assert_same_state(memory, other)
    torch.manual_seed(4)
    memory.consolidate(loader(1))
    torch.manual_seed(4)
    other.consolidate(loader(1))
    equal(kept(model, memory), kept(twin, other))
    other.detach()
    train(model, optimizer, batches(6, 2))
    assert (memory.steps, other.steps) == (2, 0)


def test_a_copy_of_the_model_alone_is_left_alone():
    model, _, memory = trained(RWalk(fisher="example"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        gc.collect()
        before, gathered = tensors(memory), [s for s in gc.get_objects() if type(s) is Sum]
        F.cross_entropy(twin(torch.randn(4, 5).double()), torch.zeros(4).long()).backward()
        equal(tensors(memory), before)
        gc.collect()
        assert {id(s) for s in gc.get_objects() if type(s) is Sum} == {id(s) for s in gathered}
        assert not any(s.parameter is p for s in gathered for p in twin.parameters())


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match=r"copied.*deepcopy\(\(model, optimizer, memory\)\)"):
        copy.copy(trained(RWalk())[2])


# Inference mode


@pytest.mark.parametrize("rule", RECIPE, ids=repr)
def test_nothing_made_in_inference_mode_stays_in_the_state(rule, tmp_path):
    model, optimizer, memory = trained(rule)
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in loader(1)]
        memory.consolidate(data)
        memory.save(tmp_path / "memory.safetensors")
        memory.anchor.save(tmp_path / "anchor.safetensors")
        anchor = Anchor.load(tmp_path / "anchor.safetensors")
        memory.detach()
        memory = Consolidator(model, rule)
        memory.load(tmp_path / "memory.safetensors")
        memory.attach(optimizer)
        memory.penalty(), memory.summary()
    assert not any(t.is_inference() for t in anchor.tensors())
    assert not any(t.is_inference() for t in tensors(memory).values() if isinstance(t, torch.Tensor))
    train(model, optimizer, batches(3, 3))
    memory.consolidate(loader(2))


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"inference_mode.*Build the model outside of it"):
        Consolidator(model, EWC()).estimate(loader(0))
