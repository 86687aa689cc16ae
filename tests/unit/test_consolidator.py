"""The consolidator in loops as people write them, and every mistake it answers."""

import copy
import io
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import Heads, assert_same_state, batches, mlp, train
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, Kronecker, OnlineEWC, RWalk, kernels
from rwalk.anchors import ElementwiseAnchor


def attached(model=None, strength=1.0, **fields):
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Consolidator(model, RWalk(**fields), strength=strength).attach(optimizer)


def test_a_branch_unused_in_a_task_keeps_its_history():
    model, optimizer, memory = attached(Heads())
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    index = list(memory.state_dict()["shapes"]).index("heads.0.weight")
    score, fisher = (
        column[index].clone() for column in (memory.state_dict()["state"]["total"], memory.state_dict()["state"]["fisher"])
    )
    model.on = 1
    train(model, optimizer, batches(1, 12))
    memory.consolidate()
    assert torch.equal(memory.state_dict()["state"]["total"][index], score)
    assert torch.equal(memory.state_dict()["state"]["fisher"][index], fisher)
    assert memory.anchor.omega["heads.0.weight"].sum() > 0
    assert memory.anchor.omega["heads.1.weight"].sum() > 0


def test_a_gradient_that_is_none_on_some_steps_gives_the_path_of_the_steps_that_moved():
    """Truth: the path summed step by step from stored parameters; with this eps the score times eps is the path."""
    model, optimizer, memory = attached(Heads(), delta_t=4, eps=1e9)
    head = model.heads[0].weight
    truth = torch.zeros_like(head)
    for i, (x, y) in enumerate(batches(0, 18)):
        model.on = int(i % 3 == 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
        grad, before = (None if head.grad is None else head.grad.clone()), head.detach().clone()
        optimizer.step()
        if grad is not None:
            truth -= grad * (head.detach() - before)
    memory.consolidate()
    index = list(memory.state_dict()["shapes"]).index("heads.0.weight")
    assert torch.allclose(memory.state_dict()["state"]["total"][index] * 1e9, truth.clamp(min=0), rtol=1e-7, atol=1e-16)


def test_another_optimiser_after_a_task_and_in_the_middle_of_one():
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 5))
    memory.consolidate()
    second = torch.optim.Adam(model.parameters())
    memory.attach(second)
    train(model, optimizer, batches(1, 2))
    assert memory.steps == 0
    train(model, second, batches(1, 3))
    with pytest.raises(RuntimeError, match="3 steps into a task"):
        memory.attach(optimizer)
    memory.detach()
    memory.attach(optimizer)
    train(model, optimizer, batches(2, 2))
    assert memory.steps == 5
    memory.consolidate()


def test_an_optimiser_of_part_of_the_model_leaves_the_rest_its_history():
    model, optimizer, memory = attached(Heads())
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    trunk = memory.anchor.omega["trunk.weight"].clone()
    head = torch.optim.SGD(model.heads[0].parameters(), lr=0.1)
    memory.attach(head)
    train(model, head, batches(1, 12))
    memory.consolidate()
    ratio = memory.anchor.omega["trunk.weight"] / trunk
    assert ratio[trunk > 0].min() > 0
    assert len(memory.anchor) == 6


def test_a_frozen_layer_joins_when_it_thaws():
    model, optimizer, memory = attached()
    memory.detach()
    model[0].requires_grad_(False)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    assert set(memory.anchor.point) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    train(model, optimizer, batches(1, 12))
    memory.consolidate()
    assert memory.anchor.omega["0.weight"].sum() > 0


def test_a_module_that_goes_away_is_named():
    model, optimizer, memory = attached(Heads())
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    del model.heads[1]
    with pytest.warns(UserWarning, match=r"heads\.1\.weight"):
        memory.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, memory._memory.optimizer, batches(1, 12))
    memory.consolidate()
    assert len(memory.anchor) == 4


def test_weights_changed_between_tasks_are_no_part_of_the_path():
    model, optimizer, memory = attached(eps=1e9)
    train(model, optimizer, batches(0, 3))
    memory.consolidate()
    plain = copy.deepcopy(memory.state_dict()["state"]["total"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(100.0)
    optimizer.param_groups[0]["lr"] = 0.0
    memory.strength = 0.0
    train(model, optimizer, batches(1, 3))
    memory.consolidate()
    for now, before in zip(memory.state_dict()["state"]["total"], plain, strict=True):
        assert torch.allclose(now, before / 2, rtol=1e-12)


def test_a_compiled_model_keeps_the_names_of_the_plain_one():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(torch.compile(model, backend="eager"), RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    memory.consolidate()
    assert list(memory.anchor.point) == [name for name, _ in model.named_parameters()]


class Wrapper(torch.nn.Module):
    """Keeps a model as Lightning's Fabric does: under two names, the outer of which forwards."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = self._original_module = model

    def forward(self, x):
        return self._forward_module(x)


def test_a_wrapped_model_keeps_the_names_of_the_plain_one():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(Wrapper(model), RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    assert memory.steps == 3
    memory.consolidate()
    assert memory.steps == 0
    assert list(memory.anchor.point) == [name for name, _ in model.named_parameters()]


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
def test_state_survives_a_file_of_plain_tensors_and_numbers():
    model, optimizer, memory = attached(strength=2.0)
    train(model, optimizer, batches(0, 13))
    memory.consolidate()
    train(model, optimizer, batches(1, 7))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = Consolidator(model, RWalk())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(memory, other)
    assert other.strength == 2.0
    assert float(other.penalty()) == float(memory.penalty())


def test_a_state_dict_is_a_snapshot():
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 5))
    saved = memory.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, batches(1, 5))
    memory.consolidate()
    assert all(torch.equal(a, b) for a, b in zip(saved["state"]["fisher"], kept["state"]["fisher"], strict=True))


def test_loading_over_an_attached_consolidator_continues_from_there():
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 5))
    saved, weights = memory.state_dict(), copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(1, 9))
    memory.consolidate()
    first = memory.anchor
    model.load_state_dict(weights)
    memory.load_state_dict(saved)
    train(model, optimizer, batches(1, 9))
    memory.consolidate()
    assert memory.tasks == 1
    assert all(torch.equal(first.omega[n], memory.anchor.omega[n]) for n in first.omega)


@pytest.mark.parametrize("fields", [
    {"alpha": -0.1}, {"alpha": 1.5}, {"alpha": math.nan}, {"alpha": "average"}, {"delta_t": 0}, {"delta_t": 2.5}, {"eps": 0.0},
    {"eps": -1.0}, {"eps": math.inf},
], ids=str)  # fmt: skip
def test_fields_out_of_range(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=rf"`{name}` of RWalk must be "):
        RWalk(**fields)


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_strength_out_of_range(strength):
    with pytest.raises(ValueError, match=r"`strength` must be a number from 0"):
        Consolidator(mlp(), RWalk(), strength=strength)
    memory = Consolidator(mlp(), RWalk(), strength=1.0)
    with pytest.raises(ValueError, match="strength"):
        memory.strength = strength
    assert memory.strength == 1.0


def test_a_rule_that_is_none():
    with pytest.raises(TypeError, match="class `RWalk`"):
        Consolidator(mlp(), RWalk)
    with pytest.raises(TypeError, match="is a `str`"):
        Consolidator(mlp(), "rwalk")


def test_attaching_twice():
    model, optimizer, memory = attached()
    for again in (memory, Consolidator(model, RWalk())):
        with pytest.raises(RuntimeError, match="attached to this optimiser already"):
            again.attach(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    memory.detach()
    memory.attach(optimizer)


def test_an_optimiser_of_another_model():
    memory = Consolidator(mlp(), RWalk())
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's trainable parameters"):
        memory.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(TypeError, match="but is a `list`"):
        memory.attach([1])


def test_sparse_gradients_are_refused_before_anything_changes():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3, sparse=True), torch.nn.Linear(3, 2))
    _, optimizer, memory = attached(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients of `0\.weight` are sparse"):
        optimizer.step()
    assert memory.steps == 0
    assert all((f == 0).all() for f in memory.state_dict()["state"]["fisher"])


def test_consolidating_before_attaching():
    with pytest.raises(RuntimeError, match="before `attach`"):
        Consolidator(mlp(), RWalk()).consolidate()


@pytest.mark.parametrize("change", [
    lambda s: s | {"rule": {**s["rule"], "alpha": 0.5}},
    lambda s: s | {"rule": {"name": "EWC"}},
    lambda s: s | {"format": 99},
    lambda s: {k: v for k, v in s.items() if k != "anchor"},
    lambda s: s | {"shapes": {"other": [1]}},
    lambda s: s | {"shapes": {**s["shapes"], "0.weight": [9, 9]}},
    lambda s: s | {"state": {k: v for k, v in s["state"].items() if k != "mark"}},
    lambda s: s | {"state": {**s["state"], "mark": s["state"]["mark"][:1]}},
    lambda s: s | {"state": {**s["state"], "mark": [torch.zeros(1)] * 4}},
    lambda s: s | {"anchor": {"point": s["anchor"]["point"], "omega": {}}},
    lambda s: s | {"strength": -1.0},
    lambda s: s | {"strength": None},
    lambda s: s | {"tasks": None},
    lambda s: s | {"steps": -1},
    lambda s: s | {"shapes": None},
    lambda s: s | {"state": None},
    lambda s: s | {"state": {**s["state"], "fisher": None}},
    lambda s: s | {"state": {**s["state"], "far": torch.zeros(3, dtype=torch.int64)}},
    lambda s: s | {"anchor": {"point": s["anchor"]["point"]}},
    lambda s: s | {"tail": None},
    lambda s: s | {"average": "tail"},
    lambda _: [],
])  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(change):
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    other = copy.deepcopy(model)
    second = Consolidator(other, RWalk(), strength=3.0).attach(torch.optim.SGD(other.parameters(), lr=0.1))
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=r"The state .*(Pass|Build|Load|train) |must be"):
        second.load_state_dict(change(memory.state_dict()))
    third = Consolidator(other, RWalk())
    third.load_state_dict(before)
    assert_same_state(second, third)


def test_a_tensor_that_grew_in_place_is_taken_up_at_once():
    model = torch.nn.Linear(5, 3).double()
    model, optimizer, memory = attached(model)
    train(model, optimizer, batches(0, 4))
    memory.consolidate()
    omega = memory.anchor.omega["weight"].clone()
    weight, bias = model.weight.data.clone(), model.bias.data.clone()
    model.weight.data, model.bias.data = torch.zeros(5, 5).double(), torch.zeros(5).double()
    model.weight.data[:3], model.bias.data[:3] = weight, bias
    assert float(memory.penalty()) == 0
    assert torch.equal(memory.anchor.omega["weight"][:3], omega)
    memory.consolidate()
    assert memory.anchor.omega["weight"].shape == (5, 5)


def test_an_optimiser_without_learning_rate():
    class Still(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            pass

    model = mlp()
    memory = Consolidator(model, RWalk()).attach(Still(model.parameters()))
    for task in range(2):
        train(model, memory._memory.optimizer, batches(task, 3))
        memory.consolidate()


@pytest.mark.parametrize("make", [
    lambda: Consolidator(torch.optim.SGD(mlp().parameters(), lr=0.1), RWalk()), lambda: Consolidator([1], RWalk()),
    lambda: Consolidator(mlp(), RWalk(), strength="1"), lambda: RWalk(eps=None), lambda: RWalk(eps="x"),
    lambda: RWalk(alpha=None),
])  # fmt: skip
def test_values_of_wrong_types(make):
    with pytest.raises((TypeError, ValueError), match=r" must be .*, but is "):
        make()


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    rule = RWalk(alpha=kind(0.5), delta_t=np.int64(5), eps=kind(0.25))
    assert rule == RWalk(alpha=0.5, delta_t=5, eps=0.25)
    others = SI(xi=kind(0.25)), OnlineEWC(gamma=kind(0.5), samples=np.int32(7)), MAS(decay=kind(0.5), samples=torch.tensor(7))
    assert others == (SI(xi=0.25), OnlineEWC(gamma=0.5, samples=7), MAS(decay=0.5, samples=7))
    assert Kronecker(every=torch.tensor(3)) == Kronecker(every=3)
    values = [rule.alpha, rule.delta_t, rule.eps, *(value for other in others for value in vars(other).values())]
    assert {type(value) for value in values} <= {int, float, str}
    memory = Consolidator(mlp(), EWCpp(alpha=kind(0.5)), strength=kind(0.5))
    assert type(memory.strength) is float
    assert memory.strength == 0.5


NO_SHARES = [None, True, np.bool_(True), "0.9", math.nan, math.inf, -0.1, 1.1, 0.5j, [0.5], np.array([0.1, 0.2])]
NO_SHARES += [torch.tensor([0.1, 0.2]), torch.tensor(True), torch.tensor(math.nan)]
NO_COUNTS = [0, -1, True, 2.5, 2.0, "2", math.nan, math.inf, [2], torch.tensor(2.0), torch.tensor([2, 3])]


@pytest.mark.parametrize(("kind", "field", "values"), [
    (RWalk, "alpha", NO_SHARES), (EWCpp, "alpha", NO_SHARES), (OnlineEWC, "gamma", NO_SHARES), (MAS, "decay", NO_SHARES),
    (RWalk, "eps", [*NO_SHARES[:6], 0.0, 1e31, 1e39, 10**400]), (SI, "xi", [*NO_SHARES[:6], 0.0, 1e31, 1e39, 10**400]),
    (RWalk, "delta_t", [None, *NO_COUNTS]), (Kronecker, "every", [None, *NO_COUNTS]),
    (EWC, "samples", NO_COUNTS), (OnlineEWC, "samples", NO_COUNTS), (MAS, "samples", NO_COUNTS),
    (Kronecker, "samples", NO_COUNTS),
])  # fmt: skip
def test_what_is_no_number_or_outside_its_range_is_refused_by_name(kind, field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"(?s)`{field}` of {kind.__name__} must be "):
            kind(**{field: value})


@pytest.mark.parametrize("options", [
    {"strength": True}, {"strength": "1"}, {"strength": torch.tensor([1.0, 2.0])}, {"strength": math.nan},
    {"strength": 10**400}, {"pull": ""}, {"pull": False}, {"average": ""}, {"state_device": "nowhere"}, {"state_device": 1.5},
    {"state_dtype": "bfloat16"},
], ids=repr)  # fmt: skip
def test_arguments_that_are_no_choice_and_no_number(options):
    with pytest.raises(ValueError, match=rf"(?s)`{next(iter(options))}` must be "):
        Consolidator(mlp(), RWalk(), **options)


@pytest.mark.parametrize("rule", [RWalk(eps=1e30), SI(xi=1e30)], ids=repr)
def test_the_largest_damping_leaves_the_score_in_float32(rule):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = mlp(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory = Consolidator(model, rule).attach(optimizer)
        train(model, optimizer, [(x.astype(np.float32 if dtype is torch.float32 else np.float64), y) for x, y in batches(0, 8)])
        memory.consolidate()
        found.append(memory.anchor.omega["0.weight"].double())
    assert found[1].any()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=float(found[1].max()) * 1e-4)


def grow_in_place(layer, to=5):
    for p in (layer.weight, layer.bias):
        p.data, p.grad = torch.cat([p.data, torch.zeros(to - len(p), *p.shape[1:], dtype=p.dtype)]), None


@pytest.mark.parametrize("backend", ["blocked", "numba"])
def test_a_tensor_that_grew_in_place_beside_the_optimiser_is_taken_up_before_the_next_step(backend):
    """Compiled code works on addresses: with state of the old shape it would write beyond its end."""
    if backend == "numba":
        pytest.importorskip("numba")
    model, optimizer, memory = attached(Heads(), delta_t=1)
    train(model, optimizer, batches(0, 3))
    memory.consolidate()
    model.on = 1
    optimizer = torch.optim.SGD([*model.trunk.parameters(), *model.heads[1].parameters()], lr=0.1)
    memory.attach(optimizer)
    grow_in_place(model.heads[0])
    kernels.use(backend)
    try:
        train(model, optimizer, batches(1, 3))
    finally:
        kernels.use("blocked")
    index = list(memory.state_dict()["shapes"]).index("heads.0.weight")
    assert all(memory.state_dict()["state"][key][index].shape == (5, 7) for key in ("fisher", "path", "score", "mark", "last"))
    memory.consolidate()
    assert memory.anchor.omega["heads.0.weight"].shape == (5, 7)


def test_a_state_of_tensors_that_grew_in_place_loads_into_the_model_as_it_is():
    model, optimizer, memory = attached(torch.nn.Linear(5, 3).double())
    train(model, optimizer, batches(0, 4))
    memory.consolidate()
    grow_in_place(model)
    other = Consolidator(model, RWalk())
    other.load_state_dict(memory.state_dict())
    assert_same_state(memory, other)
    assert other.anchor.omega["weight"].shape == (5, 5)


@pytest.mark.filterwarnings("ignore:The memory was loaded")  # its weights are another model's
@pytest.mark.parametrize("start", ["attach", "estimate", "adopt", "load_state_dict"])
def test_lazy_modules_are_to_be_run_once_before(start):
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = map(torch.as_tensor, batches(0, 1)[0])
    memory = Consolidator(model, EWC())
    ready = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).double()
    other = Consolidator(ready, EWC())
    other.estimate([(x, y)])
    calls = {
        "load_state_dict": lambda: memory.load_state_dict(other.state_dict()),
        "attach": lambda: memory.attach(optimizer),
        "estimate": lambda: memory.estimate([(x, y)]),
        "adopt": lambda: memory.adopt(ElementwiseAnchor({"1.bias": torch.zeros(3)}, {"1.bias": torch.ones(3)})),
    }
    with pytest.raises(ValueError, match=r"`0.weight`, `0.bias` of a lazy module.*Run the model once"):
        calls[start]()
    model(x)
    calls[start]()
    memory.attach(optimizer) if start != "attach" else None
    train(model, optimizer, batches(0, 3))
    memory.consolidate([(x, y)])
    assert memory.anchor.point["0.weight"].shape == (4, 5)


def test_a_lazy_head_of_a_later_task_may_wait():
    model = Heads(1)
    model.later = torch.nn.LazyLinear(3)
    optimizer = torch.optim.SGD([*model.trunk.parameters(), *model.heads.parameters()], lr=0.1)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    train(model, optimizer, batches(0, 3))
    memory.consolidate()
    assert set(memory.anchor.point) == {"trunk.weight", "trunk.bias", "heads.0.weight", "heads.0.bias"}
    memory.summary()


# Copies


class Holder(torch.nn.Module):
    """A model that holds its own memory, in itself or in one of its modules."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), torch.nn.Linear(3, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("place", ["", "head", "body.2"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded], ids=["deepcopy", "pickle", "save"])
def test_a_model_that_holds_its_memory_is_copied_with_it_and_both_go_on_alike(copied, place):
    model, _, memory = attached(Holder(), fisher="example", delta_t=3)
    model.get_submodule(place).memory = memory
    train(model, memory._memory.optimizer, batches(0, 5))
    other = copied(model.get_submodule(place)).memory
    assert other is not memory
    assert other.model.get_submodule(place).memory is other
    for mine in (memory, other):
        train(mine.model, mine._memory.optimizer, batches(1, 4))
        mine.consolidate()
    assert_same_state(memory, other)
    again = copied(other.model.get_submodule(place)).memory
    train(again.model, again._memory.optimizer, batches(2, 4))
    train(model, memory._memory.optimizer, batches(2, 4))
    assert_same_state(memory, again)


def test_a_copy_made_in_inference_mode_is_refused_as_it_could_not_be_trained():
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 5))
    match = r"parameters `0.weight`.*made in `torch.inference_mode\(\)`.*Build the model outside"
    with torch.inference_mode(), pytest.raises(ValueError, match=match):
        copy.deepcopy((model, optimizer, memory))
    train(model, optimizer, batches(1, 5))
    memory.consolidate()


@pytest.mark.parametrize("closure", [False, True])
def test_a_warning_names_the_line_of_the_user(closure):
    model = torch.nn.Linear(3, 2).double()
    memory = Consolidator(model, L2(), strength=1e6, pull="gradient")
    memory.estimate()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    with pytest.warns(UserWarning, match="overshoots the anchor") as caught:
        optimizer.step(lambda: torch.zeros(())) if closure else optimizer.step()
    assert caught[0].filename == __file__
    assert "optimizer.step" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_what_an_anchor_matches_is_a_summary():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(8)))
    memory = Consolidator(model, L2())
    memory.estimate()
    said = str(Consolidator(model, L2()).adopt(memory.anchor))
    assert said == "16 the same shape (0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 11 more)"


def test_a_second_optimizer_beside_the_first_is_told_and_a_new_one_for_each_task_is_not():
    model = mlp()
    parts = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    memory = Consolidator(model, RWalk()).attach(parts[0])
    with pytest.warns(
        UserWarning, match=r"replaces an optimiser that has made no step .* does not hold `0\.weight`, `0\.bias`"
    ):
        memory.attach(parts[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        memory = Consolidator(model, RWalk())
        for task, part in enumerate((model, model[2], model[0])):  # all of it, and then what is trained on
            optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
            memory.attach(optimizer)
            train(model, optimizer, batches(task, 3))
            memory.consolidate()


def test_a_consolidator_for_each_of_two_optimizers_holds_its_part():
    """Truth: at a huge strength the second task ends where the first one did, in both parts."""
    model = mlp()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    memories = [Consolidator(model, strength=1e12, only=str(i)).attach(o) for i, o in zip((0, 2), optimizers, strict=True)]
    ends = []
    for task in range(2):
        for x, y in batches(task, 12):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
            for optimizer in optimizers:
                optimizer.step()
        for memory in memories:
            memory.consolidate()
        ends.append(copy.deepcopy(model.state_dict()))
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[0][name], rtol=1e-3, atol=1e-3)
    assert [sorted(memory.anchor.point) for memory in memories] == [["0.bias", "0.weight"], ["2.bias", "2.weight"]]
