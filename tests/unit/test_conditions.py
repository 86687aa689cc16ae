"""Models that ask their inputs for yes or no, and warnings before what will take long."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import pairwise
from dense import close, exact, gradients_of, norm, truth
from rwalk import EWC, MAS, Consolidator, Kronecker
from rwalk._parameters import named_parameters
from rwalk.gradients import costs, over_data


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()


def one_example(x):
    """The first vector of each of one example; with more, conditions would depend on others."""
    if len(x) > 1:
        raise ValueError("one example at a time")
    return x[:, 0]


class MaskIfNeeded(TwoLayers):
    """As masks of transformers: left out where they would do nothing."""

    def forward(self, x):
        mask = x[..., 0] > 0
        h = torch.tanh(self.a(x))
        return self.b(h if mask.all() else h * mask.unsqueeze(-1)).sum(1)


class Several(TwoLayers):
    """Divides the examples more than once."""

    def forward(self, x):
        x = one_example(x)
        if (x[:, 0] > 0).all():
            x = self.a(x).sin()
            if x.sum() > 0:
                x = x + 1
        elif not (x[:, 1] > 0).any():
            x = x * 3
        return self.b(x)


class TwiceForSome(TwoLayers):
    """Calls a layer twice for some examples, so that it cannot be summed by its calls."""

    def forward(self, x):
        x = self.a(one_example(x))
        return self.b(torch.tanh(x if x.sum() > 0 else self.a(x)))


class ByNumber(TwoLayers):
    """Asks for a number, which `vmap` refuses."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x[:, 0]))) if x.sum().item() < 1e9 else self.b(x[:, 0])


class InAList(TwoLayers):
    """Holds its parameters in a list, too."""

    def __init__(self):
        super().__init__()
        self.kept = [self.a.weight, self.b.weight]

    def forward(self, x):
        return F.linear(F.linear(x[:, 0], self.kept[0]), self.kept[1])


def pairs(sizes=(7, 4)):
    return [(torch.randn(n, 2, 5, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]


@pytest.fixture
def alone(monkeypatch):
    """The examples that were taken one at a time."""
    taken, add = [], over_data._Engine._add_one
    monkeypatch.setattr(over_data._Engine, "_add_one", lambda *args: taken.append(1) or add(*args))
    return taken


@pairwise(["engine"], make=[MaskIfNeeded, Several, TwiceForSome], engine=["layers", "mapped"], scores=[norm, exact])
def test_conditions_divide_the_examples(make, scores, engine, alone):
    model, data = make(), pairs()
    got = gradients_of(model, data)(scores.__name__, torch.square)
    close(got, truth(model, named_parameters(model), data, scores, torch.square))
    assert not alone


@pytest.mark.parametrize("make", [ByNumber, InAList])
def test_examples_one_at_a_time_are_announced_once(make, alone):
    model, data = make(), pairs()
    reason = "something else than the model's modules holds" if make is InAList else r"\.item\(\)"
    with pytest.warns(
        UserWarning, match=rf"measured one at a time, which is slow: .*{reason}.*`Kronecker\(measure=\"data\"\)`"
    ) as found:
        got = gradients_of(model, data)("exact", torch.square)
    close(got, truth(model, named_parameters(model), data, exact, torch.square))
    assert len(alone) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients_of(model, data)("exact", torch.square)
        gradients_of(MaskIfNeeded(), data)("exact", torch.square)
    assert len(found) == 1


def test_a_loss_of_one_example_is_announced_by_kronecker():
    memory = Consolidator(Several(), Kronecker(measure="data", labels="true"))
    with pytest.warns(
        UserWarning, match=r"one at a time, which is slow: a `loss` that names no distribution.*Leave `loss` out"
    ):
        memory.estimate(pairs(), loss=lambda output, target: F.cross_entropy(output, target))


# --- a backward pass for each class ------------------------------------------------------------------------------------------


@pytest.fixture
def seconds(monkeypatch):
    """Let the first examples take as many seconds as the list holds."""
    taken, calls = [16.0], []
    monkeypatch.setattr(costs, "clock", lambda: calls.append(1) or (0.0 if len(calls) % 2 else taken[0]))
    return taken


def wide(classes=150):
    return nn.Linear(4, classes).double(), [
        (torch.randn(16, 4, dtype=torch.float64), torch.randint(classes, (16,))) for _ in "abc"
    ]


@pytest.mark.parametrize("rule", [EWC(), Kronecker(measure="data", labels="exact")], ids=lambda r: type(r).__name__)
def test_many_classes_are_announced_once(rule, seconds):
    model, data = wide()
    memory = Consolidator(model, rule)
    with pytest.warns(
        UserWarning, match="backward pass for each of 150 classes or outputs: 2 seconds an example, about 2 minutes for 48"
    ) as found:
        memory.estimate(data)
    assert 'Use `labels="sample"`, which takes one backward pass' in str(found[0].message)
    assert len(found) == 1


def test_data_without_a_length_have_no_total(seconds):
    model, data = wide()
    with pytest.warns(UserWarning, match=r"of 150 classes or outputs: 2 seconds an example\. Use"):
        gradients_of(model, (pair for pair in data))("exact", torch.square)


@pytest.mark.parametrize("case", ["quick", "few", "sample", "samples"])
def test_what_is_quick_is_not_announced(case, seconds):
    model, data = wide(80 if case == "few" else 150)
    seconds[0] = 0.1 if case == "quick" else 16.0
    memory = Consolidator(
        model, EWC(labels="sample" if case == "sample" else "exact", samples=20 if case == "samples" else None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.estimate(data)


def test_timing_changes_nothing(seconds):
    model, data = wide(101)
    want = truth(model, named_parameters(model), data, exact, torch.square)
    with pytest.warns(UserWarning, match="of 101 classes"):
        close(gradients_of(model, data)("exact", torch.square), want)


def test_copies_are_announced_on_their_own(alone):
    model, data = ByNumber(), pairs()
    for net in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="one at a time"):
            Consolidator(net, MAS()).estimate(data)
