"""`with memory.averaged():` shows the weights that `consolidate()` would leave, and leaves everything as it was."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, pairwise, same, tensors, train
from rwalk import EWC, L2, SI, Consolidator, EWCpp, Kronecker, RWalk, TaskFisher
from rwalk.rules import rules

ALL = [kind() for kind in rules().values()]
SOME = [RWalk(delta_t=4), SI(), EWC(), L2(), Kronecker(every=4)]


def loader(seed, count=3):
    return [tuple(map(torch.as_tensor, batch)) for batch in batches(seed + 50, count)]


def trained(rule, average="tail", pull=None, tasks=1, steps=13, norm=False, make=torch.optim.SGD, **options):
    """Train some tasks, and then a few steps of the next one."""
    model = mlp()
    if norm:
        model.insert(1, torch.nn.BatchNorm1d(7).double())
    optimizer = make(model.parameters(), **{"lr": 0.05, **options})
    memory = Consolidator(model, rule, 0.5, average=average, pull=pull).attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, batches(task, 8))
        memory.consolidate(loader(task))
    train(model, optimizer, batches(tasks, steps))
    return model, optimizer, memory


def bits(model, memory, optimizer=None):
    held = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    return copy.deepcopy((held, tensors(memory), optimizer and optimizer.state_dict()))


def ended(model, optimizer, memory, data=None):
    """The model's state after the task's end, in a copy."""
    model, _, memory = copy.deepcopy((model, optimizer, memory))
    memory.consolidate(data)
    return model.state_dict()


@pairwise(rule=ALL, average=["none", "tail"], pull=["gradient", "proximal"], tasks=[0, 2], steps=[0, 3, 20])
def test_it_is_what_the_task_would_end_with_to_the_bit_and_nothing_is_left(rule, average, pull, tasks, steps):
    pull = pull if rule.anchor_kind.by_element else None
    three = model, optimizer, memory = trained(rule, average, pull, tasks, steps, momentum=0.5)
    before = bits(model, memory, optimizer)
    expected = ended(*three, loader(5))
    with memory.averaged() as lent:
        assert lent is model
        inside = copy.deepcopy(model.state_dict())
    assert same(dict(inside), dict(expected))
    assert same(before, bits(model, memory, optimizer))
    if average == "tail":
        assert same(dict(inside), dict(model.state_dict())) is (steps == 0)


@pytest.mark.parametrize("average", ["none", "tail"])
@pytest.mark.parametrize("rule", SOME, ids=repr)
def test_training_continues_as_if_nobody_had_looked(rule, average):
    runs = []
    for looks in (True, False):
        model, optimizer, memory = trained(rule, average, make=torch.optim.Adam, lr=0.01)
        for batch in batches(7, 9):
            train(model, optimizer, [batch])
            if looks:
                with memory.averaged(), torch.no_grad():
                    model(torch.as_tensor(batch[0]))
        memory.consolidate(loader(1))
        runs.append(bits(model, memory, optimizer))
    assert same(*runs)


@pytest.mark.parametrize("rule", SOME, ids=repr)
def test_an_error_inside_and_one_in_the_data_leave_no_trace(rule):
    model, optimizer, memory = trained(rule, norm=True)
    before = bits(model, memory, optimizer)

    def data():
        yield from loader(1, 2)
        raise OSError("the disk is gone")

    def interrupted():
        with memory.averaged(loader(1)):
            model(torch.randn(4, 5).double())  # in training mode, which moves the statistics of BatchNorm
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(OSError, match="the disk is gone"), memory.averaged(data()):
        pass
    assert same(before, bits(model, memory, optimizer))
    with memory.averaged(loader(1)):
        pass
    train(model, optimizer, batches(8, 2))


@pytest.mark.parametrize("rule", [RWalk(), Kronecker()], ids=repr)
def test_the_statistics_of_batch_norm_are_renewed_on_data_as_at_the_end(rule):
    three = model, _, memory = trained(rule, norm=True)
    before, expected = bits(model, memory), ended(*three, loader(1))
    model.eval()
    with memory.averaged(loader(1)):
        assert same(dict(model.state_dict()), dict(expected))
    assert same(before, bits(model, memory))
    with pytest.warns(UserWarning, match=r"running statistics do not fit .* `averaged\(loader\)`"), memory.averaged():
        assert not model.training
    with pytest.raises(TypeError, match="tuple of tensors"), memory.averaged(loader(1)[0]):
        pytest.fail("was entered")


STATE = object()
REFUSED = {
    "step": lambda model, optimizer, memory, saved: train(model, optimizer, batches(1, 1)),
    "consolidate": lambda model, optimizer, memory, saved: memory.consolidate(),
    "estimate": lambda model, optimizer, memory, saved: memory.estimate([]),
    "attach": lambda model, optimizer, memory, saved: memory.attach(torch.optim.SGD(model.parameters(), lr=1.0)),
    "adopt": lambda model, optimizer, memory, saved: memory.adopt(memory.anchor),
    "blend": lambda model, optimizer, memory, saved: memory.blend(0.5),
    "path": lambda model, optimizer, memory, saved: memory.path(lambda _: 0.0),
    "mark": lambda model, optimizer, memory, saved: memory.mark(),
    "again": lambda model, optimizer, memory, saved: memory.averaged().__enter__(),
    "save": lambda model, optimizer, memory, saved: memory.save("memory"),
    "load": lambda model, optimizer, memory, saved: memory.load_state_dict(saved),
    "model": lambda model, optimizer, memory, saved: setattr(memory, "model", mlp()),
    "copy": lambda model, optimizer, memory, saved: copy.deepcopy((model, optimizer, memory)),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("average", ["none", "tail"])
def test_what_changes_saves_or_copies_is_refused_inside(what, average, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    three = model, optimizer, memory = trained(Kronecker(), average)
    saved, before = memory.state_dict(), bits(model, memory, optimizer)
    with memory.averaged():
        inside = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"Inside `with memory.averaged\(\):` .* Leave the block first"):
            REFUSED[what](*three, saved)
        assert same(dict(model.state_dict()), dict(inside))
    assert same(before, bits(model, memory, optimizer))
    assert not list(tmp_path.iterdir())
    train(model, optimizer, batches(1, 1))
    assert memory.steps == 14


def test_looking_is_allowed_inside_and_the_penalty_is_that_of_these_weights():
    model, _, memory = trained(EWCpp(), "tail")
    outside = float(memory.penalty())
    with memory.averaged():
        omega, point = memory.anchor.importance(), memory.anchor.point
        truth = 0.5 * sum(float((omega[n] * (p.detach() - point[n]) ** 2).sum()) for n, p in model.named_parameters())
        assert float(memory.penalty()) == pytest.approx(truth, rel=1e-12)
        assert memory.summary().scalars()["memory/penalty"] == pytest.approx(truth, rel=1e-12)
        assert (memory.steps, memory.tasks) == (13, 1)
    assert float(memory.penalty()) == outside != truth


@pytest.mark.parametrize("rule", [RWalk(delta_t=4), EWC(), Kronecker(every=4)], ids=repr)
def test_weights_that_somebody_has_changed_are_shown_and_the_average_lives_on(rule):
    runs = []
    for looks in (True, False):
        model, optimizer, memory = trained(rule)
        with torch.no_grad():
            model[0].weight.clamp_(-0.1, 0.1)
        raw = copy.deepcopy(model.state_dict())
        if looks:
            with pytest.warns(UserWarning, match="changed after the last step.* average is left out"), memory.averaged():
                assert same(dict(model.state_dict()), dict(raw))
        train(model, optimizer, batches(3, 5))
        memory.consolidate(loader(1))
        runs.append(bits(model, memory, optimizer))
    assert same(*runs)


@pytest.mark.parametrize("rule", SOME, ids=repr)
def test_before_any_step_it_writes_nothing(rule):
    model, optimizer, memory = trained(rule, steps=0)
    for _ in range(2):
        versions = [p._version for p in model.parameters()]
        with memory.averaged():
            pass
        assert [p._version for p in model.parameters()] == versions
        memory.detach()  # and a consolidator that watches nothing shows the model as it is
    memory.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a second end without training
        memory.consolidate(loader(0))


def test_the_modes_of_autograd_inside_are_the_users_own():
    model, _, memory = trained(Kronecker())
    with memory.averaged():
        assert torch.is_grad_enabled()
        F.cross_entropy(model(torch.randn(4, 5).double()), torch.arange(4) % 3).backward()
    with torch.inference_mode(), memory.averaged():
        assert torch.is_inference_mode_enabled()
        assert model(torch.randn(4, 5).double()).is_inference()
    assert not any(p.is_inference() for p in model.parameters())


def test_parameters_that_joined_or_grew_since_the_last_step_are_followed():
    model, optimizer, memory = trained(Kronecker(every=4))
    last = model[2]
    model[2] = torch.nn.Linear(7, 5).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = last.weight, last.bias
    expected = ended(model, optimizer, memory)
    with memory.averaged():
        assert same(dict(model.state_dict()), dict(expected))


@pytest.mark.parametrize("whole", [False, True])
def test_norms_that_rested_in_training_keep_their_statistics_whatever_the_mode_at_the_end(whole):
    model = mlp()
    model.insert(1, torch.nn.BatchNorm1d(7).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model).attach(optimizer)
    model.train(not whole)[1].eval()
    train(model, optimizer, batches(4, 0))
    before = [buffer.clone() for buffer in model[1].buffers()]
    model.eval()
    with memory.averaged():  # warnings are errors
        pass
    memory.consolidate()
    assert all(map(torch.equal, before, model[1].buffers()))
    model.train()
    train(model, optimizer, batches(4, 1))  # this time the norm learns
    model.eval()
    with pytest.warns(UserWarning, match="running statistics do not fit"):
        memory.consolidate()


@pytest.mark.parametrize("memory_first", [False, True])
@pytest.mark.parametrize("change", [None, "data", "in place", "loaded"])
@pytest.mark.parametrize("rule", [None, TaskFisher(), RWalk()], ids=repr)
def test_a_change_after_loading_is_kept_and_loading_itself_is_none(rule, change, memory_first):
    """A checkpoint after a task's last step, then the best weights or an EMA: as where nothing was interrupted."""
    model, memory = begun(rule)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(memory.state_dict())
    fresh = other()
    twin = Consolidator(fresh, rule, average="tail").attach(torch.optim.SGD(fresh.parameters(), lr=0.1))
    for load, saved in [(twin.load_state_dict, state), (fresh.load_state_dict, weights)][:: 1 if memory_first else -1]:
        load(saved)
    if change is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twin.consolidate()
            memory.consolidate()
        assert_same_state(memory, twin)
        return
    best = {name: 0.9 * value for name, value in weights.items()}
    for p in fresh.parameters():
        if change == "data":
            p.data.mul_(0.9)
        elif change == "in place":
            with torch.no_grad():
                p.mul_(0.9)
    if change == "loaded":
        fresh.load_state_dict(best)
    with pytest.warns(UserWarning, match="were changed after the last step of the task. They are kept as they are"):
        twin.consolidate()
    for name, p in fresh.named_parameters():
        torch.testing.assert_close(p.detach(), best[name])
        assert torch.equal(twin.anchor.point[name], p)


@pytest.mark.parametrize("rule", [None, TaskFisher()], ids=repr)
def test_a_memory_loaded_in_a_task_without_the_models_weights_is_told(rule):
    _, memory = begun(rule)
    fresh = other()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    Consolidator(fresh, rule, average="tail").attach(optimizer).load_state_dict(memory.state_dict())
    x, y = map(torch.as_tensor, batches(0, 1)[0])
    F.cross_entropy(fresh(x), y).backward()
    with pytest.warns(UserWarning, match="The memory was loaded, and the model's weights lie .* Load the weights"):
        optimizer.step()


def other():
    """A model with other weights than those that `mlp` makes."""
    model = mlp()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=2)
    return model


def begun(rule):
    """A model in the middle of its first task."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule, average="tail").attach(optimizer)
    train(model, optimizer, batches(0, 12))
    return model, memory


@pytest.mark.parametrize(("factor", "times"), [(255.0, r"6\.\de\+04"), (0.1, r"0\.01")])
def test_batches_that_are_not_normalised_as_in_training_are_told(factor, times):
    """Truth: the variance of what a linear layer gives grows with the square of its inputs' size."""
    model = mlp()
    model.insert(1, torch.nn.BatchNorm1d(7).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    memory = Consolidator(model).attach(optimizer)
    train(model, optimizer, batches(0, 120))
    right = [tuple(map(torch.as_tensor, batch)) for batch in batches(0, 30)]
    wrong = [(x * factor, y) for x, y in right]
    said = f"what a BatchNorm gets has {times}.* times the variance that it had in training"
    with pytest.warns(UserWarning, match=said), memory.averaged(wrong):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with memory.averaged(right):
            pass
        memory.consolidate(right)


def test_statistics_that_have_not_settled_tell_nothing():
    model = mlp()
    model.insert(1, torch.nn.BatchNorm1d(7).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    memory = Consolidator(model).attach(optimizer)
    train(model, optimizer, [(x * 50, y) for x, y in batches(0, 20)])
    memory.consolidate([(torch.as_tensor(x * 50), torch.as_tensor(y)) for x, y in batches(0, 20)])
