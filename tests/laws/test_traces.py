"""Measuring leaves nothing in a model: what its calls store, keep or carry along is as it was."""

import copy
import dataclasses
import io
from collections import UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from cases import pairwise
from dense import ENGINES, close, gradients_of
from rwalk import EWC, MAS, Consolidator, Kronecker, OnlineEWC, TaskFisher
from rwalk.replay import Buffer

RULES = [EWC(), EWC(labels="true"), OnlineEWC(labels="sample"), MAS(), Kronecker()]


class Storing(nn.Module):
    """Stores what it has made wherever a module may."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.calls, self.last, self.seen = 0, None, []
        self.by_name, self.sets, self.queue, self.nested = {"kept": 1}, {1}, deque([1], maxlen=2), {"deep": ([], [])}
        self.hidden = [nn.Linear(4, 4)]
        self.register_buffer("statistics", None)
        self.register_buffer("count", torch.zeros(()))
        self.double()

    def forward(self, x):
        h = torch.tanh(self.a(x))
        self.calls += 1
        self.last = self.activation = self.a.activation = self.hidden[0].activation = h
        self.seen.append(h)
        self.by_name["h"] = h
        self.sets.add(h)
        self.queue.append(h)
        self.nested["deep"][0].append(h)
        self.nested = dict(self.nested)
        self.statistics, self.count = h.mean(), self.count + h.sum()
        self.register_buffer("late", h.sum())
        self.register_buffer("later", h.sum(), persistent=False)
        self.part, self.extra = nn.Identity(), nn.Parameter(torch.ones(1))
        return self.b(h)


def contents(model):
    """All plain attributes and buffers, down to the elements of what holds others, by identity."""

    def inside(value):
        if isinstance(value, dict):
            return id(value), [(key, inside(v)) for key, v in value.items()]
        if isinstance(value, set):
            return id(value), {id(v) for v in value}
        return (id(value), [inside(v) for v in value]) if isinstance(value, list | tuple | deque) else id(value)

    tables = [(vars(m), m._buffers, m.training) for m in (*model.modules(), *getattr(model, "hidden", ()))]
    return [({k: inside(v) for k, v in table.items()}, inside(b), mode) for table, b, mode in tables]


def data(n=6):
    return [(torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))) for _ in range(2)]


@pairwise(["engine"], rule=RULES, used=[False, True], engine=ENGINES)
def test_what_a_model_stores_is_as_it_was(rule, used, engine):
    model = Storing()
    if used:
        with torch.no_grad():
            model(data()[0][0])
        model.register_buffer("late", None)
    before, values = contents(model), copy.deepcopy(model.state_dict())
    Consolidator(model, rule).estimate(data())
    assert contents(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


def test_an_error_leaves_nothing_either(engine):
    model = Storing()
    before = contents(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        gradients_of(model, [torch.full((3, 5), torch.nan).double()])("norm", torch.square)
    assert contents(model) == before


@pytest.mark.parametrize("select", ["entropy", "plane", "herding"])
def test_selections_and_renewed_statistics_leave_nothing(select):
    model = Storing()
    before = contents(model)
    Buffer(4, select=select).add(model, data())
    assert contents(model) == before
    model = nn.Sequential(nn.BatchNorm1d(5), Storing()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, TaskFisher()).attach(optimizer)
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    optimizer.step()
    before, count = contents(model[1]), model[1].count.clone()
    memory.consolidate(data())
    assert contents(model[1]) == before
    assert torch.equal(model[1].count, count)


@dataclasses.dataclass
class Noted:
    h: object = None
    calls: int = 0


class Bag:
    h = None
    calls = 0


KEEPERS = {
    "namespace": lambda: SimpleNamespace(h=None, calls=0),
    "dataclass": Noted,
    "class": Bag,
    "nested": lambda: SimpleNamespace(h=None, calls=0, deep=[Noted()]),
    "dict of a class": lambda: UserDict(h=None, calls=0),
}


class Keeping(nn.Module):
    """Adds to each output what the call before has kept, in an object or in a plain tensor."""

    def __init__(self, keeper):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.double()
        self.keeper = torch.zeros(4).double() if keeper is None else keeper

    def forward(self, x):
        h, kept = torch.tanh(self.a(x)), self.keeper
        if isinstance(kept, torch.Tensor):
            h = h + kept
            kept.copy_(h.detach().mean(0))
            return self.b(h)
        kept = getattr(kept, "deep", [kept])[0]
        table = kept.data if isinstance(kept, UserDict) else kept.__dict__
        if table.get("h") is not None:
            h = h + table["h"].mean(0)
        table["h"], table["calls"] = h.detach(), table.get("calls", 0) + 1
        return self.b(h)


@pairwise(["engine"], rule=[EWC(), MAS(), Kronecker()], name=[*KEEPERS, "tensor"], engine=ENGINES)
def test_what_objects_and_tensors_keep_is_as_it_was(name, rule, engine):
    make = KEEPERS.get(name, lambda: None)
    model, batches = Keeping(make()), data(3)
    before = repr(model.keeper), copy.deepcopy(vars(model.keeper)) if name != "tensor" else None
    torch.manual_seed(0)
    memory = Consolidator(model, rule)
    memory.estimate(batches)
    assert name == "class" or repr(model.keeper) == before[0]
    assert name == "tensor" or repr(vars(model.keeper)) == repr(before[1])
    copy.deepcopy(model)
    if isinstance(rule, EWC):
        total = 0
        for x in torch.cat([x for x, _ in batches]).split(1):
            fresh = Keeping(make())
            fresh.load_state_dict(model.state_dict())
            score = F.log_softmax(fresh(x), 1)[0]
            for s in score:
                grads = torch.autograd.grad(s, list(fresh.parameters()), retain_graph=True)
                total = total + s.exp().item() * torch.cat([g.flatten() for g in grads]) ** 2 / 6
        close(torch.cat([omega.flatten() for omega in memory.anchor.omega.values()]), total)


def test_machinery_that_a_model_refers_to_is_let_alone():
    """A trainer counts what it reads while its model is measured."""

    class Trainer:
        def __init__(self):
            self.read, self.model = 0, None

        def batches(self):
            for batch in data():
                self.read += 1
                yield batch

    model, trainer = Keeping(Bag()), Trainer()
    model.trainer, trainer.model = trainer, model
    Consolidator(model, EWC()).estimate(trainer.batches())
    assert trainer.read == 2


class StoringLoss(nn.Module):
    def forward(self, z, y):
        self.last = F.cross_entropy(z, y)
        return self.last


def test_a_loss_that_stores_is_as_it_was(engine):
    model, loss = nn.Linear(5, 3).double(), StoringLoss()
    for rule in (EWC(labels="true"), Kronecker(labels="true")):
        Consolidator(model, rule).estimate(data(), loss=loss)
        assert not hasattr(loss, "last")


class Tracking(nn.Module):
    """Tracks the mean loss in a buffer, and counts in an attribute."""

    def __init__(self, in_place):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()).double())
        self.in_place, self.calls = in_place, 0

    def forward(self, z, y):
        loss = F.cross_entropy(z, y)
        self.calls += 1
        if self.in_place:
            self.mean.add_(loss.detach())
        else:
            self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss + self.mean  # each example from the buffer as it was

    def method(self, z, y):
        return self(z, y)


@pairwise(["engine"], method=[False, True], in_place=[False, True], engine=ENGINES)
def test_a_losss_buffers_are_as_they_were(in_place, method, engine):
    model, loss = nn.Linear(5, 3).double(), Tracking(in_place)
    for rule in (EWC(labels="true"), Kronecker(labels="true")):
        mean, batches = loss.mean, data()
        memory = Consolidator(model, rule)
        memory.estimate(batches, loss=loss.method if method else loss)
        assert loss.mean is mean
        assert (loss.mean, loss.calls) == (0, 0)
        copy.deepcopy(loss)
        plain = Consolidator(model, rule)
        plain.estimate(batches, loss=lambda z, y: F.cross_entropy(z, y))
        close(list(memory.anchor.omega.values()), list(plain.anchor.omega.values()))


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


@pairwise(["engine"], change=[old_weight_norm, nn.utils.spectral_norm, pruned], rule=RULES, engine=ENGINES)
def test_weights_that_hooks_make_are_those_of_before(change, rule, engine):
    model = nn.Sequential(change(nn.Linear(5, 4).double()), nn.Tanh(), nn.Linear(4, 3).double())
    with torch.no_grad():
        model(data()[0][0])
    before = contents(model)
    Consolidator(model, rule).estimate(data())
    assert contents(model) == before
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model_is_measured_like_a_plain_one():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    batches = data()
    scripted = torch.jit.script(model)
    close(*(gradients_of(m, batches)("true", torch.square) for m in (scripted, model)))


class Carrying(nn.Module):
    """Carries its state from one call to the next, as an attribute or as a buffer."""

    def __init__(self, buffer=False):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)
        if buffer:
            self.register_buffer("h", None)
        else:
            self.h = None
        self.double()

    def forward(self, x):
        out, h = self.rnn(x.unsqueeze(1), self.h)
        self.h = h
        return self.head(out[:, -1])


class Fresh(Carrying):
    """Starts anew with each call."""

    def forward(self, x):
        h = None if self.h is None else self.h.expand(1, len(x), 4).contiguous()
        return self.head(self.rnn(x.unsqueeze(1), h)[0][:, -1])


@pairwise(["engine"], labels=["exact", "true"], buffer=[False, True], engine=ENGINES)
def test_each_call_starts_from_the_state_that_the_user_left(buffer, labels, engine):
    model, fresh, batches = Carrying(buffer), Fresh(), data()
    fresh.load_state_dict(model.state_dict())
    want = gradients_of(fresh, batches)(labels, torch.square)
    close(gradients_of(model, batches)(labels, torch.square), want)
    assert model.h is None
    model.h = fresh.h = torch.randn(1, 1, 4).double()
    ones = [(x[:1], y[:1]) for x, y in batches]
    close(
        gradients_of(model, ones)(labels, torch.square),
        gradients_of(fresh, ones)(labels, torch.square),
    )
    assert model.h is fresh.h


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_state_that_does_not_fit_is_named(rule):
    model = Carrying()
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    left = model.h
    with pytest.raises(ValueError, match=r"attribute `h` is left from an earlier batch.*Set `h` to None"):
        Consolidator(model, rule).estimate(data())
    assert model.h is left


def test_a_kept_tensor_is_not_blamed_for_another_error():
    model = Carrying()
    model.scale = torch.ones(())
    with pytest.raises(RuntimeError):
        Consolidator(model, EWC()).estimate([(torch.randn(4, 3).double(), torch.zeros(4).long())])
