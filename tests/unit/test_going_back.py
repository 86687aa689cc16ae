"""`mark`, `path`, `blend` and `consolidate(blend=)` against the formulas, and that nothing is left changed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwalk import EWC, SI, Consolidator, EWCpp, Kronecker, RWalk, TaskFisher

RULES = [RWalk(), EWCpp(), SI(), TaskFisher(), EWC(), Kronecker(m=1, every=2, share=1.0, rank=None)]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(24) % 3
LOADER = [(X, Y)]


def net(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5) if norm else nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def train(model, memory, steps=5, lr=0.1, shift=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    memory.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X + shift), (Y + shift) % 3).backward()
        optimizer.step()
    memory.detach()
    return optimizer


def end(memory, **more):
    memory.consolidate(LOADER if memory.rule.measures == "data" else None, **more)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(model, memory):
    return {name: t.clone() for name, t in model.state_dict().items()}, copy.deepcopy(memory.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("average", ["none", "tail"])
def test_a_share_of_the_way_is_the_line_from_the_tasks_end_to_the_anchor(rule, average):
    model = net()
    memory = Consolidator(model, rule, average=average)
    train(model, memory)
    end(memory)
    optimizer = train(model, memory, shift=1)
    memory.attach(optimizer)
    twin, other, _ = copy.deepcopy((model, memory, optimizer))
    end(other)
    last, point = values(twin), {n: p.clone() for n, p in memory.anchor.point.items()}
    memory.blend(0.25)
    for name, p in values(model).items():
        torch.testing.assert_close(p, 0.75 * last[name] + 0.25 * point[name])
    before = values(model)
    end(memory)
    assert same(values(model), before)  # a task ends where it went back to
    assert memory.tasks == 2
    if type(rule) is not EWC:  # which merges points
        assert same(memory.anchor.point, before)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_path_restores_every_bit_and_visits_what_blend_goes_to(rule):
    model = net(norm=True)
    memory = Consolidator(model, rule)
    train(model, memory)
    memory.consolidate(LOADER)
    train(model, memory, shift=1)
    before, seen = bits(model, memory), []

    def evaluate(current):
        seen.append(current.state_dict() | values(current))
        seen[-1] = {name: t.clone() for name, t in seen[-1].items()}
        with torch.no_grad():
            for p in current.parameters():
                p.add_(1)  # as one who refits a head would
        return {"new": 1.0, "old": len(seen)}

    curve = memory.path(evaluate, (0, 0.5, 1), data=LOADER)
    assert same(before, bits(model, memory))
    assert curve.shares == (0, 0.5, 1)
    assert curve.metrics == ("new", "old")
    assert [row[1] for row in curve.values] == [1, 2, 3]
    for name, point in memory.anchor.point.items():
        assert torch.equal(seen[2][name], point)
    memory.blend(0.5, data=LOADER)
    assert same(seen[1], {name: t.clone() for name, t in model.state_dict().items()})


@pytest.mark.parametrize("rule", [SI(), Kronecker()], ids=lambda r: type(r).__name__)
def test_no_part_of_the_way_back_is_the_tasks_end_with_its_statistics_of_batch_norm(rule):
    model = net(norm=True)
    memory = Consolidator(model, rule, average="tail")
    train(model, memory)
    memory.consolidate(LOADER)
    optimizer = train(model, memory, shift=1)
    memory.attach(optimizer)
    twin, other, _ = copy.deepcopy((model, memory, optimizer))
    other.consolidate(LOADER)
    seen = []
    memory.path(lambda m: seen.append(copy.deepcopy(m.state_dict())) or 0.0, [0], data=LOADER)
    memory.blend(0, data=LOADER)
    assert same(dict(seen[0]), dict(twin.state_dict()))
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


def test_training_goes_on_after_a_path_as_if_nothing_had_been():
    model = net()
    memory = Consolidator(model)
    train(model, memory)
    end(memory)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    memory.attach(optimizer)
    twin, copied, ours = copy.deepcopy((model, memory, optimizer))

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()

    steps(model, optimizer, 13)
    steps(twin, ours, 13)
    memory.path(lambda m: 0.0)
    steps(model, optimizer, 9)
    steps(twin, ours, 9)
    end(memory)
    end(copied)
    assert same(bits(model, memory), bits(twin, copied))


@pytest.mark.parametrize("rule", [EWCpp(), TaskFisher()], ids=lambda r: type(r).__name__)
def test_by_importance_each_weight_goes_by_its_own(rule):
    model = net()
    memory = Consolidator(model, rule, average="none")
    train(model, memory)
    end(memory)
    train(model, memory, shift=1)
    now, omega, point = values(model), memory.anchor.omega, memory.anchor.point
    mean = sum(o.sum() for o in omega.values()) / sum(o.numel() for o in omega.values())
    memory.blend(0.4, by="importance")
    for name, p in values(model).items():
        factor = 1 / (1 + 0.4 / 0.6 * omega[name] / mean)
        torch.testing.assert_close(p, point[name] + factor * (now[name] - point[name]))


def test_by_importance_layers_go_back_in_their_eigenbases():
    model = net()
    memory = Consolidator(model, Kronecker(m=1, every=1, share=1.0, rank=None), average="none")
    train(model, memory)
    end(memory)
    train(model, memory, shift=1)
    anchor, now = memory.anchor, values(model)
    total = sum(o.sum() for o in anchor.importance().values()) / sum(p.numel() for p in model.parameters())
    held = anchor.layers["0.weight"]
    a, g = held.inputs.matrix()[0], held.outputs.matrix()[0]
    way = {n: now[n] - anchor.point[n] for n in ("0.weight", "0.bias")}
    d = torch.cat([way["0.bias"].unsqueeze(1), way["0.weight"]], 1)
    w = torch.kron(g, a) * (0.3 / 0.7 / total)
    expected = torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) + w, d.flatten()).reshape(d.shape)
    memory.blend(0.3, by="importance")
    after = values(model)
    torch.testing.assert_close(after["0.weight"] - anchor.point["0.weight"], expected[:, 1:])
    torch.testing.assert_close(after["0.bias"] - anchor.point["0.bias"], expected[:, 0])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_marked_model_can_be_gone_back_to_in_its_first_task(rule):
    model = net()
    start = values(model)
    memory = Consolidator(model, rule, exclude="3")
    memory.mark()
    assert not float(memory.penalty())
    twin, plain = copy.deepcopy(model), None
    train(model, memory)
    plain = Consolidator(twin, rule, exclude="3")
    train(twin, plain)
    if rule.defaults.average == "none":
        assert same(values(model), values(twin))  # marking holds nothing
    head = values(model)["3.weight"]
    end(memory, blend=1.0)
    after = values(model)
    assert all(torch.equal(after[name], start[name]) for name in start if not name.startswith("3."))
    assert torch.equal(after["3.weight"], head)
    assert memory.tasks == 1


@pytest.mark.parametrize("rule", [RWalk(), Kronecker()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("how", ["attached", "thawed", "loaded"])
def test_what_is_trained_only_later_in_a_marked_task_begins_where_it_is(rule, how):
    model = net()
    start = values(model)
    model[0].requires_grad_(False)
    memory = Consolidator(model, rule)
    memory.mark()
    optimizer = train(model, memory)
    if how == "loaded":
        state, memory = memory.state_dict(), Consolidator(model, rule)
        memory.load_state_dict(state)
    memory.attach(optimizer)
    model[0].requires_grad_(True)
    if how == "thawed":
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    else:
        memory.detach()
        train(model, memory)
    assert not torch.equal(model[0].weight, start["0.weight"])
    memory.blend(1.0)
    assert same(values(model), start)


def test_what_joins_after_a_first_task_has_no_way_back_until_the_next_one_ends():
    model = net()
    model[0].requires_grad_(False)
    memory = Consolidator(model, RWalk())
    memory.mark()
    train(model, memory)
    end(memory)
    model[0].requires_grad_(True)
    train(model, memory)
    assert "0.weight" not in memory.anchor.point


def test_modes_come_back_and_nothing_is_trained_or_changed_inside_evaluate():
    model = net()
    memory = Consolidator(model, RWalk())
    memory.mark()
    optimizer = train(model, memory)
    memory.attach(optimizer)
    model[2].eval()
    before, seen = bits(model, memory), []

    def evaluate(current):
        seen.append(current.training)
        current.eval()
        for refused in (optimizer.step, memory.consolidate, memory.mark, lambda: memory.path(evaluate)):
            with pytest.raises(RuntimeError, match="in the `evaluate` of `path`"):
                refused()
        return float(memory.penalty())

    memory.path(evaluate, (0.0, 1.0))
    with pytest.raises(ZeroDivisionError):
        memory.path(lambda m: m.eval() and 1 / 0)
    assert seen == [True, True]
    assert [m.training for m in model] == [True, True, False, True]
    assert same(before, bits(model, memory))
    optimizer.step()
    assert memory.steps == 6


def test_values_that_are_no_numbers_are_refused_at_the_first_share():
    model = net()
    memory = Consolidator(model, RWalk())
    memory.mark()
    train(model, memory)
    for wrong in (None, {"a": None}, torch.ones(2), "high"):
        seen = []
        with pytest.raises(TypeError, match="`evaluate` must return a number"):
            memory.path(lambda m, wrong=wrong, seen=seen: seen.append(m) or wrong)
        assert len(seen) == 1


def test_what_is_left_out_of_going_back_stays():
    model = net()
    memory = Consolidator(model, RWalk())
    memory.mark()
    train(model, memory)
    before = values(model)
    memory.blend(1.0, exclude=[model[3]])
    after = values(model)
    assert torch.equal(after["3.weight"], before["3.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_a_marked_memory_is_saved_and_copied(tmp_path):
    model = net()
    memory = Consolidator(model)
    memory.mark()
    memory.save(tmp_path / "memory.safetensors")
    again = Consolidator(net())
    again.load(tmp_path / "memory.safetensors")
    assert same(again.anchor.point, memory.anchor.point)
    assert memory.state_bytes < 2.1 * sum(p.nbytes for p in model.parameters())
    other, copied = copy.deepcopy((model, memory))
    train(other, copied)
    copied.blend(1.0)
    assert same(values(other), values(model))


def test_statistics_of_batch_norm_are_renewed_or_a_warning_says_that_they_are_not():
    model = net(norm=True)
    memory = Consolidator(model, RWalk())
    memory.mark()
    train(model, memory)
    with pytest.warns(UserWarning, match="BatchNorm.*data=loader"):
        memory.path(lambda m: 0.0, (0.5,))
    memory.blend(0.5, data=LOADER)
    inside = model[0](X)
    torch.testing.assert_close(model[1].running_mean, inside.mean(0))


def test_an_end_that_fails_leaves_all_as_it_was():
    model = net()
    memory = Consolidator(model, EWC())
    memory.mark()
    train(model, memory)
    before = bits(model, memory)
    with pytest.raises(TypeError, match="not a tensor"):
        memory.consolidate(LOADER, blend=0.5, logits=str)
    assert same(before, bits(model, memory))


def test_going_nowhere_is_refused():
    model = net()
    memory = Consolidator(model, RWalk())
    train(model, memory)
    with pytest.raises(RuntimeError, match=r"nothing to go back to .* call `mark\(\)`"):
        memory.blend(0.5)
    end(memory)
    with pytest.raises(RuntimeError, match="No step was made since the last task's end"):
        memory.path(lambda m: 0.0)
    train(model, memory)
    for wrong in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="must be a number from 0"):
            memory.blend(wrong)
        with pytest.raises(ValueError, match="must be a number from 0"):
            memory.consolidate(blend=wrong)
    with pytest.raises(ValueError, match='`by` must be "uniform" or "importance"'):
        memory.blend(0.5, by="size")
    with pytest.raises(ValueError, match="fits no parameter"):
        memory.blend(0.5, exclude="heads")
    names = iter("ab")
    with pytest.raises(ValueError, match="different names for different shares"):
        memory.path(lambda m: {next(names): 1.0}, (0.0, 1.0))
    marked = Consolidator(net(), RWalk())
    marked.mark()
    train(marked.model, marked)
    with pytest.raises(ValueError, match="no importance yet"):
        marked.blend(0.5, by="importance")


def test_the_best_share_keeps_most_within_a_margin():
    model = net()
    memory = Consolidator(model, RWalk())
    memory.mark()
    train(model, memory)
    scores = iter([90.0, 91.0, 90.2, 88.0])
    curve = memory.path(lambda m: next(scores), (0, 0.3, 0.6, 0.9))
    assert curve.best(within=1.0) == 0.6
    assert curve.best(within=0.5) == 0.3
    assert curve.best(within=5) == 0.9
    assert str(curve).splitlines()[2].split() == ["0.30", "91"]
    losses = iter([{"bits": 2.0, "old": 5.0}, {"bits": 2.05, "old": 4.0}, {"bits": 2.4, "old": 3.0}])
    curve = memory.path(lambda m: next(losses), (0, 0.5, 1))
    assert curve.best(within=0.1, higher=False) == 0.5
    assert curve.best(within=0.5, metric="old", higher=False) == 1
    with pytest.raises(ValueError, match="values bits, old, and no 'new'"):
        curve.best(metric="new")
    scores = iter([90.0, float("nan"), 89.5, float("nan")])
    curve = memory.path(lambda m: next(scores), (0, 0.3, 0.6, 0.9))
    assert curve.best(within=1.0) == 0.6
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`within` says how much worse"):
            curve.best(within=wrong)
    with pytest.raises(ValueError, match="All values of value are nan"):
        memory.path(lambda m: float("nan"), (0, 1)).best()
    with pytest.raises(ValueError, match="has no shares"):
        memory.path(lambda m: 0.0, ()).best()
    fractions = iter([0.9, 0.4])
    with pytest.raises(ValueError, match=r"within=0\.01"):
        memory.path(lambda m: next(fractions), (0, 1)).best()
