"""Moves that the optimiser did not make count for nothing, and going up counts as well as going down.

Truth: the equations in float64 NumPy, summed from the weights before and after each of the optimiser's own steps.
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import batches, mlp, use_backend
from rwalk import EWC, MAS, SI, Consolidator, EWCpp, RWalk

RULES = [RWalk(alpha=0.3, delta_t=4, eps=1e-4), RWalk(alpha=0.9, delta_t=1), SI(xi=1e-3)]


def arrays(model):
    return [p.detach().numpy().copy() for p in model.parameters()]


class Truth:
    """Rule after one task, from what each step of the optimiser did."""

    def __init__(self, rule, theta):
        self.rule, self.n = rule, 0
        self.fisher, self.path, self.score, self.whole, self.window, self.moved = (
            [np.zeros_like(t) for t in theta] for _ in range(6)
        )

    def step(self, grad, before, after):
        if isinstance(self.rule, RWalk) and self.n and self.n % self.rule.delta_t == 0:
            self.end()
        for i, g in enumerate(grad):
            if isinstance(self.rule, RWalk):
                a = self.rule.alpha if self.n else 1.0
                self.fisher[i] = a * g**2 + (1 - a) * self.fisher[i]
            way = after[i] - before[i]
            for total, part in ((self.path, -g * way), (self.whole, -g * way), (self.window, way), (self.moved, way)):
                total[i] += part
        self.n += 1

    def end(self, which=None):
        """End the stretch of some parameters, or of all: it became a score, and the next one begins elsewhere."""
        for i in range(len(self.path)) if which is None else which:
            if isinstance(self.rule, RWalk):
                self.score[i] += self.path[i] / (0.5 * self.fisher[i] * self.window[i] ** 2 + self.rule.eps)
            self.path[i][...], self.window[i][...] = 0, 0

    def omega(self):
        if isinstance(self.rule, SI):
            return [np.maximum(w / (m**2 + self.rule.xi), 0) for w, m in zip(self.whole, self.moved, strict=True)]
        self.end()
        score = [np.maximum(s, 0) for s in self.score]
        f, s = (max(t.max() for t in column) for column in (self.fisher, score))
        return [a / f + b / s for a, b in zip(self.fisher, score, strict=True)]


class Task:
    """A task under a rule, with the truth beside it."""

    def __init__(self, rule, make=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5), sign=1, **options):
        self.model = mlp()
        self.optimizer = make(self.model.parameters())
        self.memory = Consolidator(self.model, rule, 0.0, **options).attach(self.optimizer)
        self.truth, self.sign, self.stream = Truth(rule, arrays(self.model)), sign, iter(batches(0, 500))

    def step(self, count=1, closure=False):
        for _ in range(count):
            x, y = map(torch.as_tensor, next(self.stream))

            def loss():
                self.optimizer.zero_grad()
                value = F.cross_entropy(self.model(x), y) * self.sign  # noqa: B023
                value.backward()
                return value

            before = arrays(self.model)
            if closure:
                self.optimizer.step(loss)
            else:
                loss()
                self.optimizer.step()
            grad = [p.grad.numpy() * self.sign for p in self.model.parameters()]
            self.truth.step(grad, before, arrays(self.model))

    def foreign(self, change):
        """Change the weights in another way, and have the truth end the stretches of those that changed."""
        before = arrays(self.model)
        change(self.model)
        now = arrays(self.model)
        self.truth.end([i for i, (a, b) in enumerate(zip(before, now, strict=True)) if not np.array_equal(a, b)])

    def check(self, rtol=1e-8):
        self.memory.consolidate()
        for (name, omega), truth in zip(self.memory.anchor.omega.items(), self.truth.omega(), strict=True):
            np.testing.assert_allclose(omega.numpy(), truth, rtol=rtol, atol=rtol * abs(truth).max(), err_msg=name)
        for name, p in self.model.named_parameters():
            assert torch.equal(p, self.memory.anchor.point[name])


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def clamped(model):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def clamped_data(model):
    for p in model.parameters():
        p.data.clamp_(-0.2, 0.2)


def one_row(model):
    with torch.no_grad():
        model[0].weight[2] = 0.5


def in_numpy(model):
    model[2].weight.detach().numpy()[:] *= 0.7


def exchanged(model):
    for p in model.parameters():
        p.data = p.data + 0.3


def to_vector_and_back(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


FOREIGN = [shaken, clamped, clamped_data, one_row, in_numpy, exchanged, to_vector_and_back]


@pytest.fixture(params=["reference", "blocked", "numba"])
def backend(request):
    use_backend(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("change", FOREIGN, ids=lambda f: f.__name__)
def test_a_change_after_each_step_counts_for_nothing(rule, change):
    task = Task(rule)
    for _ in range(10):
        task.step()
        task.foreign(change)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("closure", [False, True])
def test_a_change_now_and_then_counts_for_nothing_however_steps_are_made(rule, closure):
    task = Task(rule, lambda ps: torch.optim.Adam(ps, lr=0.02))
    for steps, change in zip((3, 1, 6, 2, 5, 1), (shaken, one_row, clamped, in_numpy, exchanged, shaken), strict=True):
        task.step(steps, closure)
        task.foreign(change)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_change_by_another_hook_of_the_step_counts_for_nothing(rule, first):
    task = Task(rule)
    if first:
        task.memory.detach()
    before = []
    task.optimizer.register_step_post_hook(lambda *_: (before.append(arrays(task.model)), clamped(task.model)))
    if first:
        task.memory.attach(task.optimizer)
    for _ in range(9):
        x, y = map(torch.as_tensor, next(task.stream))
        old = arrays(task.model)
        task.optimizer.zero_grad()
        F.cross_entropy(task.model(x), y).backward()
        task.optimizer.step()
        task.truth.step([p.grad.numpy() for p in task.model.parameters()], old, before[-1])
        changed = [i for i, (a, b) in enumerate(zip(before[-1], arrays(task.model), strict=True)) if not np.array_equal(a, b)]
        task.truth.end(changed)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_weights_loaded_in_the_middle_of_a_task_count_for_nothing(rule):
    task = Task(rule)
    task.step(2)
    saved = copy.deepcopy(task.model.state_dict())
    task.step(5)
    task.foreign(lambda model: model.load_state_dict(saved))
    task.step(6)
    task.check()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_steps_that_are_not_watched_count_for_nothing(rule):
    task = Task(rule)
    for _ in range(2):
        task.step(5)
        task.memory.detach()

        def unwatched(model):
            other = torch.optim.SGD(model.parameters(), lr=0.3)
            for x, y in batches(7, 50):
                other.zero_grad()
                F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
                other.step()

        task.foreign(unwatched)
        task.memory.attach(task.optimizer)
    task.step(3)
    task.memory.detach()
    task.foreign(unwatched)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_pause_without_a_change_changes_nothing(rule):
    task = Task(rule)
    for _ in range(3):
        task.step(3)
        task.memory.detach()
        task.memory.attach(task.optimizer)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_task_that_is_saved_between_a_step_and_a_change_goes_on_as_one(rule):
    task = Task(rule)
    task.step(5)
    state = task.memory.state_dict()
    task.foreign(shaken)
    task.memory.detach()
    task.memory = Consolidator(task.model, rule, 0.0)
    task.memory.load_state_dict(state)
    task.memory.attach(task.optimizer)
    task.step(4)
    task.check()


LATE = 130
"""Steps after which a change is no different from one after few."""


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("change", FOREIGN, ids=lambda f: f.__name__)
def test_a_late_change_counts_for_nothing_either(rule, change):
    task = Task(rule)
    task.step(LATE)
    task.foreign(change)
    task.step(6)
    task.foreign(change)
    task.check()


def left_out(task):
    """A step that `nonfinite="skip"` leaves out."""
    task.optimizer.zero_grad()
    for p in task.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    task.optimizer.step()


def without_gradients(task):
    task.optimizer.zero_grad()
    task.optimizer.step()


def copied(task):
    task.model, task.optimizer, task.memory = copy.deepcopy((task.model, task.optimizer, task.memory))


def loaded(task):
    task.memory.load_state_dict(task.memory.state_dict())


def in_another(task, path):
    task.memory.save(path / "memory")
    task.memory.detach()
    task.memory = Consolidator(task.model, task.memory.rule, 0.0, average=task.memory.average, nonfinite="skip")
    task.memory.load(path / "memory")
    task.memory.attach(task.optimizer)


BETWEEN = [left_out, without_gradients, copied, loaded, in_another]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("event", BETWEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [5, LATE])
@pytest.mark.parametrize("before", [True, False])
def test_what_comes_between_a_change_and_the_next_step_hides_nothing(rule, event, steps, before, tmp_path):
    task = Task(rule, nonfinite="skip")
    task.step(steps)
    arguments = (task, tmp_path)[: event.__code__.co_argcount]
    if before:
        task.foreign(shaken)
    event(*arguments)
    if not before:
        task.foreign(shaken)
    task.step(5)
    task.check()


@pytest.mark.parametrize("rule", RULES[1:], ids=repr)
@pytest.mark.parametrize("moved", [True, False])
def test_a_step_that_fails_after_our_look_counts_for_nothing(rule, moved):
    task = Task(rule)
    task.step(6)
    x, y = map(torch.as_tensor, next(task.stream))
    task.optimizer.zero_grad()
    F.cross_entropy(task.model(x), y).backward()

    def stop(*_):
        raise KeyboardInterrupt

    handle = task.optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        task.optimizer.step()
    handle.remove()
    if moved:
        task.foreign(shaken)
    task.step(6)
    task.check()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_layer_that_grows_in_place_late_goes_on(rule):
    task = Task(rule)
    task.step(LATE)
    head = task.model[2]
    head.weight.data, head.bias.data = (
        torch.cat([head.weight.data, torch.ones(1, 7)]),
        torch.cat([head.bias.data, torch.ones(1)]),
    )
    for call in (task.memory.penalty, task.memory.state_dict, lambda: copy.deepcopy((task.model, task.memory))):
        call()
    task.memory.detach()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    task.memory.attach(optimizer)
    for _ in range(3):
        x, y = map(torch.as_tensor, next(task.stream))
        optimizer.zero_grad()
        F.cross_entropy(task.model(x), y).backward()
        optimizer.step()
    task.memory.consolidate()
    assert task.memory.anchor.omega["2.weight"].shape == (4, 7)
    assert all(torch.isfinite(omega).all() for omega in task.memory.anchor.omega.values())


# Going up

UP = {
    "SGD": {"lr": 0.1, "momentum": 0.5}, "Adam": {"lr": 0.02}, "AdamW": {"lr": 0.02, "amsgrad": True}, "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02}, "Adagrad": {"lr": 0.1}, "Adadelta": {"lr": 1.0}, "Adamax": {"lr": 0.02}, "ASGD": {"lr": 0.1},
    "Rprop": {"lr": 0.01}, "RMSprop": {"lr": 0.01}, "Adafactor": {"lr": 0.02},
}  # fmt: skip


def test_no_optimiser_that_maximises_is_forgotten():
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
    able = {name for name, kind in kinds.items() if "maximize" in kind.__init__.__code__.co_varnames}
    assert able - {"SparseAdam"} == set(UP)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", UP)
def test_the_path_of_an_optimiser_that_maximises(rule, name):
    task = Task(rule, lambda ps: getattr(torch.optim, name)(ps, maximize=True, **UP[name]), sign=-1)
    task.step(9)
    task.check(1e-6)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("rule", [*RULES, EWCpp(), EWC(), MAS()], ids=repr)
def test_the_pull_leads_to_the_anchor_up_and_down(rule, scale):
    """Two groups, one of which maximises the negative loss: weights and importance are those of minimising."""
    runs = []
    for up in (True, False):
        model = mlp()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "maximize": up}]
        optimizer = torch.optim.SGD(groups, lr=0.05, fused=scale is not None)
        memory = Consolidator(model, rule, 0.7).attach(optimizer)
        for task in range(2):
            for x, y in batches(task, 7):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
                for p in model.parameters():
                    p.grad *= scale or 1.0
                for p in list(model[2].parameters()) * up:
                    p.grad *= -1
                if scale:
                    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
                optimizer.step()
            memory.consolidate([tuple(map(torch.as_tensor, batch)) for batch in batches(task, 2)])
        runs.append((list(model.parameters()), list(memory.anchor.omega.values())))
    for one, two in zip(*runs, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(one, two, strict=True))
    assert all(omega.sum() > 0 for omega in runs[0][1])


# Weights that are changed before a task ends


@pytest.mark.parametrize(
    "change", [shaken, one_row, exchanged, clamped_data, None], ids=lambda f: getattr(f, "__name__", "loaded")
)
@pytest.mark.parametrize("event", [None, *BETWEEN], ids=lambda f: getattr(f, "__name__", "nothing"))
@pytest.mark.parametrize("rule", [None, RWalk(), SI(), EWC()], ids=repr)
def test_weights_that_are_changed_after_the_last_step_are_model_and_anchor(rule, event, change, tmp_path):
    task = Task(rule or EWCpp(), average="tail")
    task.memory.detach()
    task.memory = Consolidator(task.model, rule, average="tail", nonfinite="skip").attach(task.optimizer)
    task.step(4)
    best = copy.deepcopy(task.model.state_dict())
    task.step(4)
    change(task.model) if change else task.model.load_state_dict(best)
    if event:
        event(*(task, tmp_path)[: event.__code__.co_argcount])
    now = copy.deepcopy(task.model.state_dict())
    with pytest.warns(UserWarning, match="changed after the last step.* average is left out") as caught:
        task.memory.consolidate([tuple(map(torch.as_tensor, batch)) for batch in batches(3, 2)])
    assert len(caught) == 1
    for name, p in task.model.named_parameters():
        assert torch.equal(p, now[name])
        assert torch.equal(p, task.memory.anchor.point[name])


def test_the_average_is_kept_where_nobody_changed_the_weights_and_a_new_task_starts_anew():
    task = Task(EWCpp(), average="tail")
    task.step(3)
    shaken(task.model)  # in the middle of a task: what counts is where the optimiser led
    task.step(3)
    task.memory.consolidate()
    shaken(task.model)
    task.step(3)
    last = arrays(task.model)
    task.memory.consolidate()
    assert not all(np.array_equal(a, b) for a, b in zip(last, arrays(task.model), strict=True))


@pytest.mark.parametrize("rule", [None, RWalk(), SI(), EWC()], ids=repr)
@pytest.mark.parametrize("how", ["frozen", "without a gradient"])
def test_a_layer_that_rests_and_is_given_other_weights_keeps_them(rule, how):
    task = Task(rule or EWCpp(), average="tail")
    task.step(5)
    layer = task.model[0]
    if how == "frozen":
        layer.requires_grad_(False)
    with torch.no_grad():
        layer.weight.fill_(0.3)
    for x, y in batches(4, 5):
        task.optimizer.zero_grad()
        F.cross_entropy(task.model[2](torch.tanh(layer(torch.as_tensor(x)).detach())), torch.as_tensor(y)).backward()
        task.optimizer.step()
    with pytest.warns(UserWarning, match="changed after the last step.* average is left out"):
        task.memory.consolidate([tuple(map(torch.as_tensor, batch)) for batch in batches(3, 2)])
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 0.3))
    assert torch.equal(task.memory.anchor.point["0.weight"], layer.weight)


def test_a_layer_that_rests_all_the_task_may_be_given_other_weights_and_the_average_is_kept():
    task = Task(EWCpp(), average="tail")
    task.step(3)
    task.memory.consolidate()
    with torch.no_grad():
        task.model[0].requires_grad_(False).weight.fill_(0.3)
    for x, y in batches(4, 5):
        task.optimizer.zero_grad()
        F.cross_entropy(task.model(torch.as_tensor(x)), torch.as_tensor(y)).backward()
        task.optimizer.step()
    last = arrays(task.model)
    task.memory.consolidate()
    now = arrays(task.model)
    assert np.array_equal(last[0], now[0])
    assert not np.array_equal(last[2], now[2])
