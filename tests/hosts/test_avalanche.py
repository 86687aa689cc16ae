# ruff: noqa: E402
"""Our plugin in Avalanche: beside Avalanche's own, beside a loop written out, and in every strategy that takes plugins."""

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hosts

hosts.avalanche()

import avalanche.training.plugins as theirs
from avalanche.benchmarks import nc_benchmark, tensors_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as make_tensor_classification_dataset
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.models import (
    PNN,
    IncrementalClassifier,
    MlpVAE,
    MultiHeadClassifier,
    MultiTaskModule,
    SCRModel,
    SimpleMLP,
    VAE_loss,
    as_multitask,
)
from avalanche.models.packnet import PackNetPlugin, packnet_simple_mlp
from avalanche.models.utils import FeatureExtractorModel
from avalanche.training import supervised
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates.base import BaseTemplate

from cases import MeanSquares, mlp
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, OnlineEWC, RWalk
from rwalk.integrations.avalanche import ConsolidationPlugin, MemoryMetrics, RWalkPlugin

pytestmark = [pytest.mark.filterwarnings("ignore:No loggers specified")]

INPUTS, CLASSES, BATCH = 5, 6, 8
EPS = torch.finfo(torch.float64).eps
"""What Avalanche's plugin adds to the squared distance in float64."""


@pytest.fixture(autouse=True)
def _double():
    """Let Avalanche, which makes tensors of its own, compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tasks(count=2, size=40, classes=3, split=False):
    """Random data, in another place for each task; with `split`, each task has three classes of its own."""
    draw = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, INPUTS, generator=draw) + torch.randn(INPUTS, generator=draw),
            torch.randint(classes, (size,), generator=draw) + split * classes * k,
        )
        for k in range(count)
    ]


def stream(data, labels=None):
    """Avalanche's experiences of these tasks."""
    labels = labels or [0] * len(data)
    return tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=labels).train_stream


def naive(model, plugins, kind=Naive, lr=0.1, momentum=0.0, **options):
    """A strategy of Avalanche around a model."""
    options = {"train_mb_size": BATCH, "criterion": nn.CrossEntropyLoss(), "evaluator": None, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return kind(model=model, optimizer=optimizer, plugins=plugins, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(plugins, experiences, model=None, each=lambda: None, kind=Naive, **options):
    """Train on experiences, one call each, and return the weights after each."""
    model = mlp() if model is None else model
    strategy = naive(model, plugins, kind, **options)
    seen = []
    for experience in experiences:
        strategy.train(experience, shuffle=False)
        seen.append(weights(model))
        each()
    return seen


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Spy(SupervisedPlugin):
    """Writes down a figure after each iteration."""

    def __init__(self, figure):
        super().__init__()
        self.figure, self.seen = figure, []

    def after_training_iteration(self, strategy, **_):
        self.seen.append(self.figure(strategy))


class TaskHeads(MultiTaskModule):
    """A trunk with Avalanche's heads, one for each task label."""

    def __init__(self, middle=None):
        super().__init__()
        self.trunk, self.middle = nn.Linear(INPUTS, 7), middle or nn.Tanh()
        self.heads = MultiHeadClassifier(7, initial_out_features=3)

    def forward(self, x, task_labels):
        return self.heads(self.middle(self.trunk(x)), task_labels)


class Growing(nn.Module):
    """A classifier that grows with the classes seen."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = nn.Linear(INPUTS, 7), IncrementalClassifier(7, initial_out_features=2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.features(x)))


# Beside Avalanche's plugin


def test_same_as_avalanches_until_a_score_is_negative():
    """To the rounding: the importance after one task, and all weights of the second, which it holds back."""
    data = stream(tasks(3, size=80))
    peer, ours = theirs.RWalkPlugin(1.0, 0.9, 10), ConsolidationPlugin(RWalk(0.9, 10, eps=EPS), 1.0)
    omega, scores, fishers, mine = [], [], [], []

    def look():
        omega.append({k: v.data.clone() for k, v in peer.exp_penalties.items()})
        scores.append({k: v.data.clone() for k, v in peer.exp_scores.items()})
        fishers.append({k: v.data.clone() for k, v in peer.exp_importance.items()})

    there = run([peer], data, each=look, momentum=0.9)
    here = run([ours], data, each=lambda: mine.append(ours.memory.anchor.importance()), momentum=0.9)
    assert distance(there[0], here[0]) == 0
    assert distance(omega[0], mine[0]) < 1e-14
    assert distance(there[1], here[1]) < 1e-14
    assert distance(there[0], there[1]) > 1e-2

    # From here on: theirs averages the scores of the tasks and then cuts them at 0, the paper and we the other way round.
    second = {k: 2 * s - scores[0][k] for k, s in scores[1].items()}
    total = {k: (scores[0][k].relu() + second[k].relu()) / 2 for k in second}
    largest = [max(float(t.max()) for t in column.values()) for column in (fishers[1], total)]
    expected = {k: fishers[1][k] / largest[0] + total[k] / largest[1] for k in total}
    assert distance(expected, mine[1]) < 1e-9
    assert distance(omega[1], mine[1]) > 1e-7


def test_takes_the_place_of_avalanches():
    peer, ours = (inspect.signature(plugin.__init__).parameters for plugin in (theirs.RWalkPlugin, RWalkPlugin))
    assert [(k, p.default) for k, p in peer.items()] == [(k, p.default) for k, p in ours.items()][: len(peer)]
    plugin = RWalkPlugin(0.3, 0.5, 7)
    run([plugin], stream(tasks(1)))
    assert plugin.memory.strength == 0.3
    assert plugin.memory.rule == RWalk(alpha=0.5, delta_t=7, eps=torch.finfo(torch.float32).eps)
    assert RWalkPlugin.supports_distributed
    assert ConsolidationPlugin.supports_distributed


# The faults of Avalanche's plugin, shown on it, and that ours has none of them


def modes(plugin):
    """Count forward passes in training mode and in evaluation mode, and tell how far BatchNorm's mean moved."""
    model = nn.Sequential(nn.Linear(INPUTS, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    run([plugin], stream(tasks(1)), model)
    return seen.count(True), seen.count(False), float(model[1].running_mean.abs().max())


def test_training_stays_in_training_mode():
    assert modes(RWalkPlugin())[:2] == (5, 0)
    assert modes(RWalkPlugin())[2] > 0
    assert modes(theirs.RWalkPlugin()) == (0, 10, 0)


@pytest.mark.parametrize(("size", "lr"), [(3 * BATCH, 0.1), (80, 0.0)])
def test_tasks_shorter_than_a_window_or_without_a_move_leave_finite_weights(size, lr):
    def finite(plugin):
        return all(p.isfinite().all() for p in run([plugin], stream(tasks(2, size)), lr=lr)[-1].values())

    assert finite(RWalkPlugin(delta_t=10))
    assert not finite(theirs.RWalkPlugin(delta_t=10))


def test_the_remainder_of_a_window_counts():
    """The weights move in the last three of eight steps alone, and windows have five."""

    class Late(SupervisedPlugin):
        def before_update(self, strategy, **_):
            strategy.optimizer.param_groups[0]["lr"] = 0.1 * (strategy.clock.train_iterations >= 5)

    ours, peer = RWalkPlugin(delta_t=5), theirs.RWalkPlugin(delta_t=5)
    run([Late(), ours], stream(tasks(1, 8 * BATCH)))
    run([Late(), peer], stream(tasks(1, 8 * BATCH)))
    assert all(t.max() > 0 for t in ours.state_dict()["state"]["total"])
    assert all(not s.data.any() for s in peer.exp_scores.values())


@pytest.mark.parametrize("first", [False, True])
def test_heads_that_come_later_are_protected(first):
    """Without an evaluation before, and after one on all tasks, which makes all heads."""
    data = stream(tasks(3), labels=[0, 1, 2])

    def protected(plugin):
        strategy = naive(TaskHeads(), [plugin])
        if first:
            strategy.eval(data)
        strategy.train(data)
        held = plugin.memory.anchor.importance() if isinstance(plugin, RWalkPlugin) else plugin.exp_penalties
        return {name.split(".")[2] for name, omega in held.items() if "classifiers" in name}

    assert protected(RWalkPlugin(1.0)) == {"0", "1", "2"}
    if first:
        assert protected(theirs.RWalkPlugin(1.0)) == {"2"}
    else:
        with pytest.raises(KeyError, match="classifiers"):
            protected(theirs.RWalkPlugin(1.0))


def test_a_branch_without_a_task_keeps_what_it_has():
    def heads_after_two_tasks(plugin):
        model = TaskHeads()
        model.heads.classifiers["1"] = copy.deepcopy(model.heads.classifiers["0"])
        model.heads.register_buffer("active_units_T1", torch.zeros(3, dtype=torch.int8))
        run([plugin], stream(tasks(2, 80), labels=[0, 1]), model)
        held = getattr(plugin, "exp_penalties", None) or plugin.memory.anchor.importance()
        return {name.split(".")[2] for name in held if "classifiers" in name}

    assert heads_after_two_tasks(RWalkPlugin()) == {"0", "1"}
    assert heads_after_two_tasks(theirs.RWalkPlugin()) == {"1"}


class Accumulating(Naive):
    """Two batches to a step."""

    def training_epoch(self, **options):
        for i, self.mbatch in enumerate(self.dataloader):  # noqa: B020
            self._unpack_minibatch()
            self._before_training_iteration(**options)
            self.loss = self._make_empty_loss()
            self.mb_output = self.forward()
            self.loss += self.criterion() / 2
            self._before_backward(**options)
            self.backward()
            if i % 2:
                self.optimizer_step()
                self.optimizer.zero_grad()
            self._after_training_iteration(**options)


def test_accumulated_gradients_are_one_step():
    data = stream(tasks(2, 64))
    ours, whole, peer = RWalkPlugin(1.0), RWalkPlugin(1.0), theirs.RWalkPlugin(1.0)
    halves = run([ours], data, kind=Accumulating)
    at_once = run([whole], data, train_mb_size=2 * BATCH)
    assert distance(halves[1], at_once[1]) < 1e-12
    assert distance(ours.memory.anchor.importance(), whole.memory.anchor.importance()) < 1e-9
    assert distance(run([], data, kind=Accumulating)[0], halves[0]) == 0
    assert distance(run([peer], data, kind=Accumulating)[0], halves[0]) > 1e-3


class Autocast(Naive):
    def forward(self):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward()


def test_autocast_and_weights_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    data = [(x.float(), y) for x, y in tasks(2, 80)]

    def kinds(plugin):
        model, seen = mlp(torch.float32), set()
        model.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        run([plugin], stream(data), model, kind=Autocast)
        return seen

    assert kinds(RWalkPlugin()) == {torch.bfloat16}
    assert kinds(theirs.RWalkPlugin()) == {torch.bfloat16, torch.float32}

    half = stream([(x.bfloat16(), y) for x, y in data])
    plugin = RWalkPlugin(1.0)
    after = run([plugin], half, mlp(torch.bfloat16))[-1]
    assert all(p.isfinite().all() for p in after.values())
    assert all(o.dtype == torch.float32 and o.max() > 0 for o in plugin.memory.anchor.importance().values())


def grow(rule):
    return ConsolidationPlugin(rule, 0.5)


@pytest.mark.parametrize("rule", [RWalk(), SI(), None], ids=str)
def test_state_goes_on_with_a_model_that_grows(rule, tmp_path):
    data, model, plugin = stream(tasks(3, split=True)), Growing(), grow(rule)
    strategy = naive(model, [plugin])
    strategy.train(data[:2], shuffle=False)
    torch.save({"model": model, "plugin": plugin.state_dict()}, tmp_path / "saved.pt")
    torch.manual_seed(7)
    strategy.train(data[2], shuffle=False)

    saved, later = torch.load(tmp_path / "saved.pt", weights_only=False), grow(rule)
    later.load_state_dict(saved["plugin"])
    torch.manual_seed(7)
    naive(saved["model"], [later]).train(data[2], shuffle=False)
    assert distance(weights(model), weights(saved["model"])) == 0
    assert distance(plugin.memory.anchor.importance(), later.memory.anchor.importance()) == 0
    assert later.memory.tasks == 3
    assert not hasattr(theirs.RWalkPlugin(), "state_dict")


def test_a_fisher_per_example_does_not_depend_on_the_batch_size():
    def fisher(plugin, size):
        run([plugin], stream(tasks(1, 32)), lr=0.0, train_mb_size=size)
        if isinstance(plugin, theirs.RWalkPlugin):
            return torch.cat([f.data.flatten() for f in plugin.exp_importance.values()])
        return torch.cat([omega.flatten() for omega in plugin.memory.anchor.importance().values()])

    def ratio(plugin):
        few, many = fisher(plugin(), 4), fisher(plugin(), 16)
        return few / many

    example = ratio(lambda: ConsolidationPlugin(MeanSquares(fisher="example"), 1.0))
    assert torch.allclose(example, torch.ones(()), rtol=1e-9)
    assert ratio(lambda: ConsolidationPlugin(MeanSquares(), 1.0)).median() > 2
    assert ratio(theirs.RWalkPlugin).median() > 2


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.rnn(x.unsqueeze(-1))[0][:, -1])


def test_recurrent_networks_stay_in_training_mode():
    """cuDNN has no backward for them in evaluation mode, from which Avalanche's plugin does not take them."""

    def seen(plugin):
        model, modes = Recurrent(), set()
        model.rnn.register_forward_hook(lambda module, *_: modes.add(module.training))
        run([plugin], stream(tasks(2, 80)), model)
        return modes

    plugin = RWalkPlugin(1.0)
    assert seen(plugin) == {True}
    assert all(omega.max() > 0 for omega in plugin.memory.anchor.importance().values())
    assert seen(theirs.RWalkPlugin(1.0)) == {False}


# Beside a loop written out


RULES = [RWalk(), EWCpp(), SI(), L2(), EWC(), OnlineEWC(), MAS(), None]


def batches(data):
    x, y = data
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def loop(model, memory, data, epochs=1, wrap=lambda x: (x,), optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    memory.detach()
    memory.attach(optimizer)
    for _ in range(epochs):
        for x, y in batches(data):
            optimizer.zero_grad()
            F.cross_entropy(model(*wrap(x)), y).backward()
            optimizer.step()
    memory.consolidate([(wrap(x), y) for x, y in batches(data)])
    memory.detach()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_same_as_a_loop(rule):
    data, model = tasks(3), mlp()
    plugin, memory = ConsolidationPlugin(rule, 0.5), Consolidator(model, rule, 0.5)
    for task in data:
        loop(model, memory, task, epochs=2)
    assert distance(run([plugin], stream(data), train_epochs=2)[-1], weights(model)) == 0
    assert distance(plugin.memory.anchor.importance(), memory.anchor.importance()) < 1e-15
    assert max(importance.max() for importance in memory.anchor.importance().values()) > 0


@pytest.mark.parametrize("rule", [RWalk(), EWC(), EWC(labels="true"), MAS(), None], ids=str)
def test_same_as_a_loop_with_several_heads(rule):
    """Heads come with the task; the first one of the loop's model has the same seed."""
    data, labels = tasks(3), [0, 1, 2]
    torch.manual_seed(5)
    here = TaskHeads()
    there, plugin = copy.deepcopy(here), ConsolidationPlugin(rule, 0.5)
    memory, experiences = Consolidator(here, rule, 0.5), stream(data, labels)
    for k, task in enumerate(data):
        torch.manual_seed(k)
        here.train()
        for module in (here, here.heads):
            module.adaptation(experiences[k])
        loop(here, memory, task, wrap=lambda x, k=k: (x, torch.full((len(x),), k)))
    strategy = naive(there, [plugin])
    for k, experience in enumerate(experiences):
        torch.manual_seed(k)
        strategy.train(experience, shuffle=False)
    assert distance(weights(there), weights(here)) == 0
    assert distance(plugin.memory.anchor.importance(), memory.anchor.importance()) < 1e-15


def test_growing_classifiers_keep_what_they_had():
    plugin, data = ConsolidationPlugin(EWC(), 1.0), stream(tasks(3, split=True))
    shapes, model = [], Growing()
    run([plugin], data, model, each=lambda: shapes.append(len(plugin.memory.anchor.importance()["classifier.classifier.bias"])))
    assert shapes == [3, 6, 9]


def test_models_made_multitask():
    model = nn.Module()
    model.features, model.classifier = nn.Linear(INPUTS, 7), nn.Linear(7, 3)
    model.forward = lambda x: model.classifier(torch.tanh(model.features(x)))
    plugin = RWalkPlugin(1.0)
    run([plugin], stream(tasks(2), labels=[0, 1]), as_multitask(model, "classifier"))
    assert {name.split(".")[2] for name in plugin.memory.anchor.importance() if "classifiers" in name} == {"0", "1"}


def test_one_call_for_several_experiences_or_several_calls():
    data = stream(tasks(3))
    one, many = RWalkPlugin(1.0), RWalkPlugin(1.0)
    model = mlp()
    naive(model, [one]).train(data, shuffle=False)
    assert distance(weights(model), run([many], data)[-1]) == 0
    assert one.memory.tasks == many.memory.tasks == 3


def test_the_first_task_is_bit_for_bit_as_without():
    assert distance(run([RWalkPlugin(1.0)], stream(tasks(1)))[0], run([], stream(tasks(1)))[0]) == 0


def test_data_is_read_as_training_reads_it_and_leaves_no_trace():
    """Rules that measure on data see an experience alone, not what is replayed; random numbers go on as without them."""
    data, seen = stream(tasks(2, 80)), []

    def measured(rule, replay):
        plugin = ConsolidationPlugin(rule, 0.0)
        model = mlp()
        strategy = naive(model, [plugin, *([theirs.ReplayPlugin(mem_size=20)] if replay else [])], lr=0.0)
        torch.manual_seed(2)
        strategy.train(data)
        seen.append(torch.rand(1))
        return plugin.memory.anchor.importance()

    alone, replayed = measured(EWC(), False), measured(EWC(), True)
    assert distance(alone, replayed) < 1e-12
    measured(L2(), False)
    assert seen[0] == seen[2]


@pytest.mark.parametrize("size", [40, 36], ids=["even", "odd"])
@pytest.mark.parametrize("rule", [RWalk(delta_t=2), EWC()], ids=str)
def test_online_streams_with_known_boundaries(rule, size):
    """A task is all parts of an experience, though Avalanche leaves the last one unmarked where they divide it evenly."""
    data, model = tasks(2, size), mlp()
    plugin, memory = ConsolidationPlugin(rule, 0.5), Consolidator(model, rule, 0.5)
    for task in data:
        loop(model, memory, task)
    parts = split_online_stream(stream(data), BATCH, shuffle=False, access_task_boundaries=True)
    after = run([plugin], parts)
    assert len(after) == 10
    assert plugin.memory.tasks == 2
    assert distance(after[-1], weights(model)) == 0
    assert distance(plugin.memory.anchor.importance(), memory.anchor.importance()) < 1e-14


def test_online_streams_without_boundaries():
    plugin = RWalkPlugin(1.0)
    run([plugin], split_online_stream(stream(tasks(2)), BATCH))
    assert plugin.memory.tasks == 10


class Leftovers(SupervisedPlugin):
    """Writes down what a strategy holds after the last iteration, and when the experience ends."""

    def after_training_iteration(self, strategy, **_):
        self.last = strategy.mbatch, strategy.dataloader, strategy.adapted_dataset

    def after_training_exp(self, strategy, **_):
        self.end = strategy.mbatch, strategy.dataloader, strategy.adapted_dataset


@pytest.mark.parametrize("samples", [None, 3])
def test_later_plugins_find_the_strategy_as_it_was(samples):
    later = Leftovers()
    run([ConsolidationPlugin(EWC(samples=samples), 1.0), later], stream(tasks(1)))
    assert all(a is b for a, b in zip(later.last, later.end, strict=True))


def test_joint_training_is_one_task_over_all_data():
    data, plugin = tasks(3), ConsolidationPlugin(EWC(), 1.0)
    model = mlp()
    memory = Consolidator(model, EWC())
    naive(model, [plugin], supervised.JointTraining).train(stream(data))
    memory.estimate([batch for task in data for batch in batches(task)])
    assert plugin.memory.tasks == 1
    assert distance(plugin.memory.anchor.importance(), memory.anchor.importance()) < 1e-14


class LateOptimizer(Naive):
    """Has an optimiser of its own, which comes after what plugins do before an experience, as in LearningToPrompt."""

    def _before_training_exp(self, **options):
        super()._before_training_exp(**options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)


def test_an_optimiser_that_comes_late():
    data, model, plugin = tasks(2), mlp(), RWalkPlugin(1.0)
    memory = Consolidator(model, plugin._arguments[0], 1.0)
    for task in data:
        loop(model, memory, task, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    assert distance(run([plugin], stream(data), kind=LateOptimizer)[-1], weights(model)) == 0


class Worded(Naive):
    """Minibatches are dictionaries."""

    mb_x = property(lambda self: self.mbatch["x"])
    mb_y = property(lambda self: self.mbatch["y"])
    mb_task_id = property(lambda self: self.mbatch["t"])

    def _unpack_minibatch(self):
        self.mbatch = dict(zip("xyt", self.mbatch, strict=True))


def test_minibatches_of_a_strategys_own():
    plugins = [ConsolidationPlugin(EWC(), 1.0) for _ in range(2)]
    for plugin, kind in zip(plugins, (Naive, Worded), strict=True):
        run([plugin], stream(tasks(2)), kind=kind)
    assert distance(*(plugin.memory.anchor.importance() for plugin in plugins)) == 0


def test_without_epochs_nothing_is_learned():
    plugin = RWalkPlugin(1.0)
    run([plugin], stream(tasks(2)), train_epochs=0)
    assert plugin.memory.anchor.largest() == 0


# Figures, checkpoints, mistakes


class Notes(BaseLogger):
    """Writes down what it is asked to log."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_single_metric(self, name, value, x_plot):
        self.seen.append((name, x_plot, value))


def test_loggers_get_the_memorys_figures():
    plugin, notes = RWalkPlugin(1.0), Notes()
    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), MemoryMetrics(plugin), loggers=[notes])
    spy = Spy(lambda _: float(plugin.memory.penalty()))
    strategy = naive(mlp(), [plugin, spy], evaluator=evaluator, train_epochs=2)
    results = strategy.train(stream(tasks(2)))
    penalties = [(x, value) for name, x, value in notes.seen if name == "memory/penalty"]
    assert penalties == [(5, 0.0), (10, 0.0), (15, spy.seen[14]), (20, spy.seen[19])]
    assert results["memory/penalty"] == spy.seen[19] > 0
    assert results["memory/share/0"] + results["memory/share/2"] == pytest.approx(1)


def test_avalanches_checkpoints_hold_the_memory(tmp_path, monkeypatch):
    """They cannot hold optimisers, and are read with `weights_only=False`, with this version of torch: with any plugin."""
    data, first = stream(tasks(3)), naive(mlp(), [RWalkPlugin(1.0)])
    first.train(data[:2], shuffle=False)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(naive(mlp(), []), tmp_path / "saved.pt")
    save_checkpoint(first, tmp_path / "saved.pt", exclude=["optimizer"])
    monkeypatch.setattr(torch, "load", partial(torch.load, weights_only=False))
    second, count = maybe_load_checkpoint(naive(mlp(), []), tmp_path / "saved.pt")
    assert count == 2
    second.optimizer, second.optimized_param_id = torch.optim.SGD(second.model.parameters(), lr=0.1), None
    for strategy in (first, second):
        strategy.train(data[2], shuffle=False)
    assert distance(weights(first.model), weights(second.model)) == 0
    assert second.plugins[0].memory.tasks == 3


@pytest.mark.filterwarnings("ignore:.*implements incompatible callbacks")
def test_mistakes_are_named():
    data, plugin = stream(tasks(2)), RWalkPlugin(1.0)
    with pytest.raises(RuntimeError, match="before training has begun"):
        plugin.memory  # noqa: B018
    run([plugin], data[:1])
    with pytest.raises(ValueError, match="another model than that of the tasks before"):
        run([plugin], data[1:])
    with pytest.raises(RuntimeError, match="attached to this optimiser already"):
        run([RWalkPlugin(), RWalkPlugin()], data)
    with pytest.raises(ValueError, match="alpha"):
        RWalkPlugin(ewc_alpha=1.5)
    with pytest.raises(ValueError, match="strength"):
        RWalkPlugin(ewc_lambda=-1.0)
    with pytest.raises(TypeError, match="together with further arguments"):
        ConsolidationPlugin(Consolidator(mlp()), 1.0)
    other = RWalkPlugin()
    other.load_state_dict(plugin.state_dict())
    with pytest.raises(ValueError, match="The state is of another model"):
        run([other], data, Growing())
    other = ConsolidationPlugin(SI())
    other.load_state_dict(plugin.state_dict())
    with pytest.raises(ValueError, match="rule"):
        run([other], data)
    lda = supervised.StreamingLDA(
        slda_model=mlp(), criterion=None, input_size=3, num_classes=3, plugins=[RWalkPlugin()], evaluator=None
    )
    with pytest.raises(TypeError, match="NoneType"):
        lda.train(data)


# Every strategy


WITHOUT = {
    "AR1": "has a pretrained MobileNet of its own, whose weights are downloaded",
    "BiC": "passes an argument to torch's scheduler that it no longer takes",
    "ExpertGateStrategy": "has a pretrained AlexNet of its own, whose weights are downloaded",
    "GEM": "solves a quadratic programme with a package that is not installed",
    "LearningToPrompt": "has a vision transformer of another library",
    "PackNet": "hands on a list of plugins as if it were one plugin; its own plugin is tried in Naive",
    "StreamingLDA": "has no optimiser",
}
"""Strategies that cannot be tried, and why."""


def flat():
    return SimpleMLP(num_classes=CLASSES, input_size=INPUTS, hidden_size=8, drop_rate=0)


def split(end):
    return FeatureExtractorModel(nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU()), nn.Linear(8, end))


def of(kind, model=flat, **options):
    """How to make a strategy around a fresh model, with plugins."""
    return lambda plugins: naive(model(), plugins, getattr(supervised, kind), **options)


def icarl(plugins):
    extractor, head = nn.Linear(INPUTS, 8), nn.Linear(8, CLASSES)
    optimizer = torch.optim.SGD([*extractor.parameters(), *head.parameters()], lr=0.1)
    return supervised.ICaRL(
        feature_extractor=extractor,
        classifier=head,
        optimizer=optimizer,
        memory_size=12,
        buffer_transform=None,
        fixed_memory=True,
        train_mb_size=BATCH,
        plugins=plugins,
        evaluator=None,
    )


def vae():
    return MlpVAE((1, 1, INPUTS), nhid=3)


def generative(plugins):
    return of(
        "GenerativeReplay",
        lr=0.01,
        generator_strategy=of("VAETraining", vae, criterion=VAE_loss, lr=1e-4)([theirs.GenerativeReplayPlugin()]),
    )(plugins)


def autoencoder():
    model = nn.Sequential(nn.Linear(INPUTS, 3), nn.Linear(3, INPUTS))
    model.feature_module = nn.Identity()
    return model


def er_aml(plugins):
    """Its buffer has to hold a batch of each class, or it waits for one for ever."""
    model = flat()
    return naive(
        model, plugins, supervised.ER_AML, feature_extractor=model.features, mem_size=60, batch_size_mem=4, train_mb_size=4
    )


def packnet(plugins):
    model = packnet_simple_mlp(num_classes=CLASSES, input_size=INPUTS, hidden_size=8, drop_rate=0)
    return naive(model, [*plugins, PackNetPlugin(1, 0.5)], train_epochs=2)


STRATEGIES = {
    "AETraining": of("AETraining", autoencoder, criterion=nn.MSELoss(), device="cpu", eval_every=-1),
    "AGEM": of("AGEM", patterns_per_exp=5),
    "CWRStar": of("CWRStar", cwr_layer_name="classifier"),
    "CoPE": of("CoPE", mem_size=10, n_classes=CLASSES, p_size=CLASSES),
    "Cumulative": of("Cumulative"),
    "DER": of("DER", mem_size=10),
    "ER_ACE": of("ER_ACE", mem_size=10),
    "ER_AML": er_aml,
    "EWC": of("EWC", ewc_lambda=0.1),
    "FeatureReplay": of("FeatureReplay", mem_size=10, last_layer_name="classifier"),
    "FromScratchTraining": of("FromScratchTraining"),
    "GDumb": of("GDumb", mem_size=12),
    "GSS_greedy": of("GSS_greedy", mem_size=40, mem_strength=2, input_size=[INPUTS]),
    "GenerativeReplay": generative,
    "ICaRL": icarl,
    "LFL": of("LFL", lambda_e=0.1),
    "LwF": of("LwF", alpha=1, temperature=2),
    "MAS": of("MAS", lambda_reg=1.0),
    "MER": of("MER", mem_size=10, batch_size_mem=4),
    "MIR": of("MIR", mem_size=10, subsample=8, batch_size_mem=4),
    "Naive": of("Naive"),
    "OnlineNaive": of("OnlineNaive"),
    "PNNStrategy": of("PNNStrategy", lambda: PNN(num_layers=1, in_features=INPUTS, hidden_features_per_column=4)),
    "PackNet's plugin": packnet,
    "Replay": of("Replay", mem_size=10),
    "SCR": of("SCR", lambda: SCRModel(nn.Linear(INPUTS, 8), nn.Linear(8, 4)), mem_size=10, batch_size_mem=4),
    "SynapticIntelligence": of("SynapticIntelligence", si_lambda=0.1),
    "VAETraining": of("VAETraining", vae, criterion=VAE_loss, lr=1e-4),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:.*deprecated")
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name):
    torch.set_default_dtype(torch.float32)
    x, y = (torch.cat(column) for column in zip(*tasks(2, split=True), strict=True))
    if name in ("GenerativeReplay", "VAETraining"):
        x = x.sigmoid().view(-1, 1, 1, INPUTS)  # its generator is for images
    data = make_tensor_classification_dataset(x, y)
    experiences = nc_benchmark(data, data, 2, task_labels=name.startswith("PackNet"), shuffle=False).train_stream
    plugin = RWalkPlugin(1.0, delta_t=2)
    spy = Spy(lambda _: plugin.memory.penalty())
    strategy = STRATEGIES[name]([plugin, spy])
    for experience in experiences:
        spy.seen = []
        strategy.train(experience)
    assert max(spy.seen) > 0
    assert all(p.isfinite().all() for p in strategy.model.parameters())
    assert plugin.memory.tasks == 2


def test_all_strategies_are_tried():
    kinds = {name for name, kind in vars(supervised).items() if inspect.isclass(kind) and issubclass(kind, BaseTemplate)}
    assert kinds == {*STRATEGIES, *WITHOUT, "JointTraining"} - {"PackNet's plugin", "OnlineNaive"}


# The example


class StopEarly(theirs.EarlyStoppingPlugin):
    """Avalanche's, with figures that fall after the first epoch, so that its weights come back."""

    def _update_best(self, strategy):
        figures = {f"{self.metric_key}": -float(strategy.clock.train_exp_epochs)}
        strategy.evaluator.get_last_metrics = lambda: figures
        return super()._update_best(strategy)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", [None, RWalk(delta_t=2), SI()], ids=repr)
def test_weights_that_early_stopping_restores_are_model_and_anchor(rule, first):
    ours = ConsolidationPlugin(rule)
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    for experience in stream(tasks()):
        stopping = StopEarly(patience=2, val_stream_name="train_stream")
        plugins = [ours, stopping] if first else [stopping, ours]
        strategy = naive(mlp() if ours._memory is None else ours.memory.model, plugins, evaluator=evaluator, train_epochs=9)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="(The weights .* changed after the last step|Metric .* is not computed yet)"
            )
            strategy.train(experience)
        assert strategy.clock.train_exp_epochs < 9
        for name, p in strategy.model.named_parameters():
            assert torch.equal(p, stopping.best_state[name])
            assert torch.equal(ours.memory.anchor.point[name], p)


class Halving(SupervisedPlugin):
    """Changes the weights when an experience ends."""

    def after_training_exp(self, strategy, **_):
        for p in strategy.model.parameters():
            p.data.mul_(0.5)


@pytest.mark.parametrize("first", [True, False])
def test_plugins_that_change_the_weights_at_the_end_come_first_wherever_they_stand(first):
    ours = ConsolidationPlugin(RWalk(delta_t=2))
    run([ours, Halving()] if first else [Halving(), ours], stream(tasks()))
    assert all(torch.equal(p, ours.memory.anchor.point[name]) for name, p in ours.memory.model.named_parameters())
