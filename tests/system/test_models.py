"""Models: their sizes against their papers', what they may see, and which data they take; through runs where it can be."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch

from rwalk import EWC, MAS, Kronecker, RWalk, bench
from rwalk.bench import Training, models
from rwalk.bench.dataset import DataSet
from rwalk.bench.training import Learner
from rwalk.cli.main import main
from rwalk.consolidation.settings import resolve
from rwalk.rules import rules

MODELS = {"image": ("mlp", "cnn", "resnet"), "text": ("mlp", "gpt", "lstm"), "characters": ("gpt", "lstm"), "table": ("mlp",)}
PAIRS = [(kind, name) for kind, names in MODELS.items() for name in names]


def made(name, x, y, outputs=4, tokens=0):
    """A data set whose test examples are those for training, in two domains."""
    at = torch.arange(len(y)) % 2
    return DataSet(name, x, y, x, y, tuple(map(str, range(outputs))), tokens, at, at, ("a", "b"))


def stream(kind, count=64):
    """Two tasks that are easy: a label is the colour of an image, the sign of a number, the only word, the character before."""
    y = torch.arange(count) // 2 % 4
    if kind == "characters":
        x = (torch.arange(9) + torch.arange(count)[:, None]) % 4
        return bench.domain(made(kind, x[:, :-1], x[:, 1:], 4, 4))
    if kind == "text":
        return bench.domain(made(kind, torch.stack([y + 1, y * 0], 1), y, 4, 5))
    if kind == "image":
        return bench.domain(made(kind, torch.eye(4)[y][:, :3, None, None].expand(-1, 3, 12, 12).contiguous(), y))
    return bench.domain(made(kind, torch.eye(4)[y], y))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_cnn_has_the_parameters_of_the_published_one():
    """Weights and biases of four convolutions and two dense layers; 64 maps of 6 x 6 are left of 32 x 32."""
    convolutions = [(27 + 1) * 32, (288 + 1) * 32, (288 + 1) * 64, (576 + 1) * 64]
    assert parameters(models.cnn((3, 32, 32), 10)) == sum(convolutions) + (64 * 6 * 6 + 1) * 512 + 513 * 10 == 1_250_858


@pytest.mark.parametrize("seed", range(3))
def test_what_passes_through_the_cnn_keeps_its_size(seed):
    """He's weights keep the mean square of what a ReLU lets through; under PyTorch's usual ones a hundredth is left."""
    torch.manual_seed(seed)
    h, sizes = torch.randn(64, 3, 32, 32), []
    for layer in models.cnn((3, 32, 32), 10).eval():
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            sizes.append(float(h.detach().std()))
    assert all(0.5 < size < 5 for size in sizes[:-1])
    assert 0.3 < sizes[-1] < 5


def test_the_resnet_has_the_parameters_of_gems():
    """Two convolutions a block and their norms, three shortcuts; GEM's own code counts 1,109,240 for CIFAR-100."""
    widths = [20, 20, 20, 40, 40, 80, 80, 160, 160]
    blocks = sum(9 * a * b + 9 * b * b + 4 * b for a, b in pairwise(widths))
    shortcuts = sum(a * b + 2 * b for a, b in pairwise(widths) if a != b)
    assert parameters(models.resnet((3, 32, 32), 100)) == 27 * 20 + 40 + blocks + shortcuts + 161 * 100 == 1_109_240


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_no_place_sees_a_later_character(name):
    task = stream("characters")[0]
    model, x = models.build(name, task, ()), task.train.read()[0]
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 4
    before, after = model(x), model(changed)
    assert before.shape == (32, 4, 8)
    assert torch.allclose(before[:, :, :5], after[:, :, :5], atol=1e-6)
    assert not torch.allclose(before[:, :, 5], after[:, :, 5], atol=1e-3)


@pytest.mark.parametrize("name", MODELS["text"])
def test_what_stands_for_no_word_changes_nothing(name):
    x = torch.tensor([[3, 1, 2, 0, 0], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    task = bench.split(made("t", x, torch.tensor([0, 1, 2]), 3, 5), tasks=1)[0]
    model = models.build(name, task, (8,)).double()
    scores = model(x)
    assert torch.isfinite(scores).all()
    assert torch.allclose(model(x[:2, :3]), scores[:2])
    assert not torch.allclose(scores[0], scores[1])


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_model_learns_what_is_easy(kind, name):
    training = Training(epochs=10, model=name, optimizer="adam", lr=0.003, hidden=(32,))
    record = bench.run(stream(kind), training=training)
    assert record.average > 0.9
    assert record.config["training"]["model"] == name


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots", "ignore:The per-example gradients of some modules")
@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize(
    "method", [*(kind() for kind in rules().values()), RWalk(fisher="example"), "recipe", "joint"], ids=str
)
def test_every_method_trains_every_model(kind, name, method):
    if kind == "characters" and getattr(method, "labels", "true") == "exact":
        with pytest.raises(ValueError, match=r'labels="exact" cannot measure streams of characters.*"sample"'):
            bench.run(stream(kind), method)
        method = type(method)(labels="sample")
    record = bench.run(stream(kind, 16), method, training=Training(model=name, batch_size=8, hidden=(4,)))
    assert all(0 <= a <= 1 for row in record.scores for a in row)


def test_the_fisher_information_of_characters_is_that_of_whole_windows():
    """Against autograd: one gradient of the log-likelihood of all of a window's characters."""
    tasks = stream("characters")
    learner = Learner(lambda: models.build("gpt", tasks[0], ()), Training(batch_size=32), memory=resolve(EWC(labels="true")))
    learner.fit(tasks[0])
    x, y = tasks[0].train.read()
    expected = torch.zeros_like(learner.model.head.weight)
    for one, target in zip(x.split(1), y.split(1), strict=True):
        scores = learner.model(one).log_softmax(1)
        (gradient,) = torch.autograd.grad(scores.gather(1, target[:, None]).sum(), learner.model.head.weight)
        expected += gradient.square() / len(y)
    assert torch.allclose(learner.memory.anchor.omega["head.weight"], expected, rtol=1e-4)


@pytest.mark.parametrize("rule", [EWC(), EWC(labels="true"), EWC(labels="sample"), MAS(), Kronecker(labels="exact")], ids=str)
def test_a_task_of_one_class_teaches_a_softmax_nothing(rule):
    """Its only label is certain whatever the weights are; MAS, which needs no labels, measures its only output."""
    y = torch.arange(64) // 2 % 4
    tasks = bench.split(made("t", torch.eye(4)[y], y), tasks=4)
    learner = Learner(lambda: models.build("mlp", tasks[0], (3,)), Training(batch_size=32), memory=resolve(rule))
    for task in tasks:
        learner.fit(task)
        assert any(bool(omega.any()) for omega in learner.memory.anchor.omega.values()) == isinstance(rule, MAS)


def test_accuracy_on_characters_is_the_share_of_those_that_are_right_and_bits_are_of_their_chances(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "always_e.py").write_text(ALWAYS_E)
    text = b"the sea, the sea, and eleven trees. " * 20
    x = torch.tensor(list(text[:640])).view(5, 128)
    y = torch.tensor(list(text[1:641])).view(5, 128)
    data = DataSet("c", x, y, x, y, tuple(map(chr, range(256))), 256, torch.zeros(5), torch.zeros(5), ("all",))
    record = bench.run(bench.domain(data), training=Training(lr=0.0, model="always_e:factory"))
    share, odds = text[1:641].count(b"e") / 640, math.exp(1)  # a score of 1, and 0 for the 255 others
    assert record.scores == [[share]]
    assert record.bits == [[pytest.approx(math.log2(odds + 255) - share * math.log2(odds))]]


ALWAYS_E = """
import torch
from torch import nn

class Always(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(outputs))
        self.scores.data[ord("e")] = 1

    def forward(self, x):
        return self.scores[:, None].expand(len(x), -1, x.shape[1])

def factory(task):
    return Always(task.outputs)
"""

FACTORIES = """
import math
from torch import nn

def linear(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(task.shape), task.outputs))

def narrow(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(task.shape), task.outputs - 1))

def wide(task):
    return nn.Linear(3, task.outputs)

def nothing(task):
    return "a network"
"""


def test_a_model_by_import_path_is_trained_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(FACTORIES)
    assert main(["run", "split-digits", "--seeds", "1", "--model", "own_models:linear", "--out", "out"]) == 0
    records = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")]
    assert {r["method"] for r in records} == {"finetune", "rwalk"}
    for record in records:
        assert record["config"]["training"]["model"] == "own_models:linear"
        assert record["memory"]["model_bytes"] == 4 * (64 * 10 + 10)


@pytest.mark.parametrize(("model", "match"), [
    ("own_models:narrow", r"\(2, 9\).*has to give scores of shape \(2, 10\)"),
    ("own_models:wide", r"RuntimeError.*has to give scores of shape"),
    ("own_models:nothing", "object of type str"),
    ("own_models:absent", "AttributeError"),
    ("no_such_module:x", "ModuleNotFoundError"),
    ("lstm", "`lstm` for inputs of kind image. Pass mlp, cnn, resnet"),
    ("cnn", "10 x 10 pixels or more, not 8 x 8"),
    ("transformer", "model `transformer`"),
])  # fmt: skip
def test_models_that_do_not_fit_are_refused_before_anything_is_written(model, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(FACTORIES)
    with pytest.raises(ValueError, match=rf"(?s){match}"):
        bench.run(bench.split("digits"), training=Training(model=model))
    assert main(["run", "split-digits", "--model", model, "--out", "out"]) == 2
    assert re.search(rf"(?s)^rwalk: .*{match}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "expected"), [("image", "cnn"), ("text", "mlp"), ("characters", "lstm"), ("table", "mlp")])
def test_records_name_the_model_that_auto_stands_for(kind, expected):
    record = bench.run(stream(kind), training=Training(batch_size=32, hidden=(4,)))
    assert record.config["training"]["model"] == expected
    assert bench.run(bench.split("digits", tasks=1)).config["training"]["model"] == "mlp"
