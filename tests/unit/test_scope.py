"""`only` and `exclude`, and what is easily forgotten between tasks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwalk import EWC, Consolidator, EWCpp, Kronecker, RWalk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


def net():
    torch.manual_seed(0)
    return Net().double()


X, Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(32) % 3
LOADER = [(X[:16], Y[:16]), (X[16:], Y[16:])]
BODY = ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"]


def train(model, memory, steps=4, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    memory.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rule", [RWalk(), EWCpp(), Kronecker(m=1, every=1), EWC()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(
    "chosen",
    [
        lambda m: {"only": "encoder"},
        lambda m: {"exclude": "head"},
        lambda m: {"only": m.encoder},
        lambda m: {"exclude": [m.head]},
        lambda m: {"only": ["encoder.0", "encoder.2.*"]},
        lambda m: {"only": "*", "exclude": ["head.weight", "*.bias", m.head]},
    ],
)
def test_what_is_left_out_learns_as_without_a_memory(rule, chosen):
    """The head's two steps after a task are plain gradient steps at the weights where they begin; the encoder is held."""
    model = net()
    memory = Consolidator(model, rule, 3.0, average="none", **chosen(model))
    train(model, memory)
    memory.consolidate(LOADER if rule.measures == "data" else None)
    expected = [n for n in BODY if not ("exclude" in chosen(model) and n.endswith("bias") and "only" in chosen(model))]
    assert list(memory.anchor.point) == expected
    twin = copy.deepcopy(model)
    train(model, memory, 1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    F.cross_entropy(twin(X), Y).backward()
    optimizer.step()
    assert torch.equal(model.head.weight, twin.head.weight)
    assert torch.equal(model.head.bias, twin.head.bias)


def test_estimate_and_adopt_keep_to_it():
    model = net()
    memory = Consolidator(model, EWC(), only=model.encoder)
    memory.estimate(LOADER)
    assert list(memory.anchor.point) == BODY
    whole = Consolidator(net(), EWC())
    whole.estimate(LOADER)
    match = Consolidator(net(), EWC(), exclude="encoder.2").adopt(whole.anchor)
    assert set(match.names) == {"encoder.0.weight", "encoder.0.bias", "head.weight", "head.bias"}


def test_a_frozen_part_that_thaws_stays_left_out():
    model = net()
    model.head.requires_grad_(False)
    memory = Consolidator(model, RWalk(), exclude="head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        model.head.requires_grad_(True)
    memory.consolidate()
    assert list(memory.anchor.point) == BODY


def test_states_and_copies_keep_to_it(tmp_path):
    model = net()
    memory = Consolidator(model, RWalk(), only="encoder")
    train(model, memory)
    memory.save(tmp_path / "memory.safetensors")
    again = Consolidator(net(), RWalk(), only="encoder")
    again.load(tmp_path / "memory.safetensors")
    wrong = Consolidator(net(), RWalk(), exclude="encoder.0")
    with pytest.raises(ValueError, match=r"protects `encoder\.0\.weight`, .*leave out here.* same `only` and `exclude`"):
        wrong.load(tmp_path / "memory.safetensors")
    other, copied = copy.deepcopy((model, memory.detach() or memory))
    train(other, copied)
    copied.consolidate()
    assert list(copied.anchor.point) == BODY


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        ({"only": "encodr"}, ValueError, r"`only` has 'encodr', which fits no parameter .* Near names: `encoder`"),
        ({"exclude": ["head", "tail*"]}, ValueError, r"`exclude` has 'tail\*', which fits no parameter"),
        ({"exclude": nn.Linear(1, 1)}, ValueError, "a `Linear` that is no part of the model"),
        ({"only": 3}, TypeError, "must be a name or module, or a list of these, but is 3"),
        ({"only": [net().parameters]}, TypeError, "must be a name or module"),
    ],
)
def test_a_part_that_is_none_is_refused(chosen, error, says):
    with pytest.raises(error, match=says):
        Consolidator(net(), RWalk(), **chosen)


def test_leaving_out_all_that_the_optimiser_holds_is_refused():
    model = net()
    memory = Consolidator(model, RWalk(), only="encoder")
    with pytest.raises(ValueError, match="only those that `only` and `exclude` leave out"):
        memory.attach(torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_a_second_memory_of_a_model_that_has_learned_warns():
    model = net()
    memory = Consolidator(model, RWalk())
    train(model, memory)
    memory.consolidate()
    memory.detach()
    fresh = Consolidator(model, RWalk())
    with pytest.warns(UserWarning, match="Another memory has learned tasks of this model"):
        fresh.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    reset = Consolidator(model, RWalk())
    model.load_state_dict(net().state_dict())
    fresh.detach()
    reset.attach(torch.optim.SGD(model.parameters(), lr=0.1))  # another start of the same module: nothing to warn of


def test_a_copy_of_weights_that_were_changed_in_place_is_no_training():
    """How often a tensor was written to does not go into its copy."""
    model = net()
    memory = Consolidator(model, EWCpp())
    train(model, memory)
    memory.consolidate()
    memory.detach()
    other, copied = copy.deepcopy((model, memory))
    copied.consolidate()
    assert {name: p.detach() for name, p in other.named_parameters()}.keys() == copied.anchor.point.keys()


@pytest.mark.parametrize("rule", [RWalk(), Kronecker(m=1, every=1)], ids=["RWalk", "Kronecker"])
@pytest.mark.parametrize("tasks", [0, 1])
def test_training_that_nobody_watched_is_no_task(rule, tasks):
    model = net()
    memory = Consolidator(model, rule)
    memory.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    for _ in range(tasks):
        train(model, memory.detach() or memory)
        memory.consolidate()
    other = torch.optim.SGD(model.parameters(), lr=0.05)
    F.cross_entropy(model(X), Y).backward()
    other.step()
    before = memory.state_dict()
    with pytest.raises(RuntimeError, match=r"No optimiser step was seen .*call `attach\(optimizer\)` on it before training"):
        memory.consolidate()
    assert memory.tasks == before["tasks"] == tasks
