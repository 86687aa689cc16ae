"""Which distribution outputs mean, against brute force: all labelings enumerated, one backward pass for each row and class."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import pairwise
from dense import ENGINES, close, gradients_of
from rwalk import EWC, MAS, Consolidator, Kronecker, OnlineEWC
from rwalk._parameters import named_parameters
from rwalk.gradients import moments, over_data, per_example_over
from rwalk.gradients.batches import examples
from rwalk.gradients.isolation import isolated
from rwalk.gradients.objectives import Scores


class Transformer(nn.Module):
    """Embedding, one block of causal attention, head: logits of shape (examples, places, classes)."""

    def __init__(self, classes=3, places=4, width=4):
        super().__init__()
        self.words, self.places = nn.Embedding(5, width), nn.Embedding(places, width)
        self.first, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        self.double()

    def forward(self, x):
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        q, k, v = self.qkv(self.first(h)).chunk(3, -1)
        shut = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(shut, -math.inf).softmax(-1)
        return self.head(h + self.out(weights @ v))


class LstmRows(nn.Module):
    def __init__(self, classes=3, last=False, batch_first=True):
        super().__init__()
        self.lstm, self.head, self.last = nn.LSTM(2, 3, batch_first=batch_first), nn.Linear(3, classes), last
        self.double()

    def forward(self, x):
        h = self.lstm(x)[0]
        return self.head(h[:, -1] if self.last else h)


class Maps(nn.Module):
    """A convolution whose classes are in the second dimension."""

    def __init__(self, classes=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 2), nn.Conv2d(2, classes, 1)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Head(nn.Module):
    """A small network with a change of its output."""

    def __init__(self, outputs, change=lambda z: z):
        super().__init__()
        self.net, self.change = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, outputs)).double(), change

    def forward(self, x):
        return self.change(self.net(x))


def words(n, places=4):
    return torch.randint(5, (n, places))


def series(n):
    return torch.randn(n, 4, 2, dtype=torch.float64)


def vectors(n):
    return torch.randn(n, 5, dtype=torch.float64)


def images(n):
    return torch.randn(n, 1, 3, 4, dtype=torch.float64)


def as_rows(z):
    """Logits of one example as rows of classes."""
    return z.movedim(1, -1).reshape(-1, 3) if z.dim() == 4 else z.reshape(-1, z.shape[-1])


CASES = {
    "transformer": (Transformer, words, (4,)),
    "lstm": (LstmRows, series, (4,)),
    "last step": (lambda: LstmRows(last=True), series, ()),
    "segmentation": (Maps, images, (2, 3)),
    "rows": (lambda: Head(6, lambda z: z.reshape(-1, 3)), vectors, (2,)),
}
"""Models of three classes, their inputs, and the shape of an example's labels."""


def gradients(model, theta, score):
    found = torch.autograd.grad(score, list(theta.values()), retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, theta.values(), strict=True)])


def table(model, theta, x):
    """Log-probabilities of one example's rows and classes, and the gradient of each: (rows, classes) and (rows, classes, P)."""
    score = as_rows(model.eval()(x)).log_softmax(-1)
    return score.detach(), torch.stack([torch.stack([gradients(model, theta, s) for s in row]) for row in score])


def enumerated(model, theta, x, y):
    """The Fisher information at one example, the mean over all labelings of rows that count, and a draw's fourth moment."""
    score, grads = table(model, theta, x)
    rows = (y.flatten() != -100).nonzero().flatten().tolist()
    second = fourth = torch.zeros(grads.shape[-1], dtype=torch.float64)
    for labels in itertools.product(range(score.shape[1]), repeat=len(rows)):
        chance = math.exp(sum(score[r, c].item() for r, c in zip(rows, labels, strict=True)))
        g = sum(grads[r, c] for r, c in zip(rows, labels, strict=True))
        second, fourth = second + chance * g**2, fourth + chance * g**4
    return second, fourth


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def labelled(make, shape, n, ignore=()):
    model = CASES[make][0]()
    x, y = CASES[make][1](n), torch.randint(3, (n, *shape))
    if shape:
        y.flatten(1)[:, list(ignore)] = -100
    return model, x, y


@pytest.mark.parametrize("name", CASES)
def test_labels_drawn_from_the_model_give_the_fisher_information(name, engine):
    """Two examples, each many times: within five standard errors, which the enumeration knows."""
    count = 1500 if engine == "layers" and name not in ("lstm", "last step") else 100
    model, x, y = labelled(name, CASES[name][2], 2, ignore=[1] * (math.prod(CASES[name][2]) > 2))
    theta = named_parameters(model)
    want = [enumerated(model, theta, x[i : i + 1], y[i]) for i in range(2)]
    mean = sum(second for second, _ in want) / 2
    error = (sum(fourth - second**2 for second, fourth in want) / 4 / count).clamp(min=0).sqrt()
    data = [tuple(t.repeat(50, *[1] * (t.dim() - 1)) for t in (x, y))] * (count // 50)
    got = flat(per_example_over(model, theta, data)("sample", torch.square))
    assert ((got - mean).abs() <= 5 * error + 1e-12).all()
    assert count < 1000 or abs(got.sum() / mean.sum() - 1) < 0.15


@pytest.mark.parametrize("name", CASES)
def test_the_datas_labels_are_summed_over_rows_that_count(name, engine):
    model, x, y = labelled(name, CASES[name][2], 5)
    theta = named_parameters(model)
    if CASES[name][2]:
        y[0], y.flatten(1)[1, 0], y.flatten(1)[2, 1:] = -100, -100, -100  # all of one example, which then does not count
    totals, count = 0, 0
    for i in range(5):
        _, grads = table(model, theta, x[i : i + 1])
        rows = [(r, c) for r, c in enumerate(y[i].flatten().tolist()) if c != -100]
        totals, count = totals + sum((grads[r, c] for r, c in rows), torch.zeros(())) ** 2, count + bool(rows)
    got = per_example_over(model, theta, [(x[:3], y[:3]), (x[3:], y[3:])])("true", torch.square)
    close(flat(got), totals / count)


def test_every_row_of_an_example_counts_however_it_is_read():
    """`reshape(-1, 3)` at the model's end, a function that reads the output, and three dimensions are one model."""
    x, y = vectors(6), torch.randint(3, (6, 2))
    plain, end = Head(6, lambda z: z.reshape(-1, 2, 3)), Head(6, lambda z: z.reshape(-1, 3))
    end.load_state_dict(plain.state_dict())
    want = gradients_of(plain, [(x, y)])("true", torch.square)
    close(gradients_of(plain, [(x, y)], logits=lambda z: z.flatten(0, 1))("true", torch.square), want)
    close(gradients_of(end, [(x, y)])("true", torch.square), want)
    close(gradients_of(end, [(x, y.flatten())])("true", torch.square), want)  # all labels, one after the other


def test_a_model_of_one_row_is_as_before_by_exact_labels(engine):
    model, x, y = labelled("last step", (), 4)
    theta = named_parameters(model)
    want = sum(enumerated(model, theta, x[i : i + 1], y[i])[0] for i in range(4)) / 4
    close(flat(per_example_over(model, theta, [(x, y)])("exact", torch.square)), want)
    close(flat(per_example_over(model, theta, [x])("exact", torch.square)), want)


def test_an_ignored_example_counts_in_no_mean_and_an_ignored_batch_is_passed_over(engine):
    model, x, y = labelled("last step", (), 6)
    theta, rows = named_parameters(model), torch.tensor([False, True, True, False, False, True])
    ignoring = torch.where(rows, y, -100)
    for objective in ("true", "exact"):
        want = per_example_over(model, theta, [(x[rows], y[rows])])(objective, torch.square)
        close(per_example_over(model, theta, [(x, ignoring)])(objective, torch.square), want)
        parts = [(x[i : i + 1], ignoring[i : i + 1]) for i in range(6)]
        close(per_example_over(model, theta, parts)(objective, torch.square), want)
    with pytest.raises(ValueError, match="6 examples whose targets are all ignored"):
        per_example_over(model, theta, [(x, torch.full_like(y, -100))])("exact", torch.square)
    other = F.cross_entropy if engine == "layers" else nn.CrossEntropyLoss(ignore_index=1)
    ignoring = ignoring if engine == "layers" else torch.where(rows, 0, 1)
    got = per_example_over(model, theta, [(x, ignoring)], loss=other)("exact", torch.square)
    close(got, per_example_over(model, theta, [x[rows]])("exact", torch.square))
    got = per_example_over(model, theta, [(x, ignoring)], loss=other)("true", torch.square)
    close(got, per_example_over(model, theta, [(x[rows], ignoring[rows])])("true", torch.square))


@pytest.mark.parametrize("rule", [EWC(), EWC(labels="true"), Kronecker(measure="data", labels="exact")], ids=str)
def test_targets_are_read_from_whatever_holds_numbers(rule):
    model, x, y = Head(3), vectors(6), torch.tensor([0, -100, 2, -100, 1, 1])
    found = []
    for target in (y, y.tolist(), y.numpy(), tuple(y.tolist()), list(y), (y,), {"a": y}, [y.numpy()], {"a": y.tolist()}):
        memory = Consolidator(model, rule)
        memory.estimate([(x, target)])
        found.append(flat(memory.anchor.importance().values()))
    if not isinstance(rule, Kronecker):
        counts = y != -100
        close(
            found[0],
            flat(gradients_of(model, [(x[counts], y[counts])])(rule.labels, torch.square)),
        )
    for other in found[1:]:
        close(other, found[0])
    memory = Consolidator(model, rule)
    for target in ([0] * 7, np.zeros(7, int), (y, torch.zeros(7)), {"a": y, "b": [1.0] * 7}):
        with pytest.raises(ValueError, match=r"a target of shape \(7,\) for 6 examples"):
            memory.estimate([(x, target)])
    memory = Consolidator(model, EWC(labels="true"))
    memory.estimate([(x, (y.clamp(min=0), [2.0] * 6))], loss=lambda z, t: F.cross_entropy(z, t[0]) * t[1].sum())
    score = [2 * F.cross_entropy(model(x[i : i + 1]), y[i : i + 1].clamp(min=0)) for i in range(6)]
    close(flat(memory.anchor.importance().values()), sum(gradients(model, named_parameters(model), s) ** 2 for s in score) / 6)


# --- outputs that each have a distribution of their own -----------------------------------------------------------------------


SINGLE = {
    "column": (lambda: Head(1), ()),
    "column and targets like it": (lambda: Head(1), (1,)),
    "flat": (lambda: Head(1, lambda z: z.squeeze(-1)), ()),
    "squeezed": (lambda: Head(1, lambda z: z.squeeze()), ()),
    "places": (lambda: Head(3, lambda z: z.unsqueeze(-1)), (3,)),
    "maps": (lambda: Head(4, lambda z: z.reshape(-1, 1, 2, 2)), (2, 2)),
    "maps and targets like them": (lambda: Head(4, lambda z: z.reshape(-1, 1, 2, 2)), (1, 2, 2)),
}


def singly(model, theta, x, weight):
    """Mean over examples of the sum over outputs of weight(z) times the square of z's gradient."""
    total = 0
    for one in x.split(1):
        z = model(one).flatten()
        total = total + sum(weight(s.detach()) * gradients(model, theta, s) ** 2 for s in z)
    return total / len(x)


FAMILIES = {
    "bernoulli": (lambda *shape: torch.randint(2, shape), lambda z: z.sigmoid() * (1 - z.sigmoid())),
    "bernoulli, as numbers": (lambda *shape: torch.randint(2, shape).double(), lambda z: z.sigmoid() * (1 - z.sigmoid())),
    "gaussian": (lambda *shape: torch.randn(shape).double(), lambda z: torch.ones_like(z)),
    "gaussian, in whole numbers": (lambda *shape: torch.randint(5, shape), lambda z: torch.ones_like(z)),
}


def loglikelihood(family, z, y):
    z, y = z.flatten(), y.flatten().to(z.dtype)
    return (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum() if "bernoulli" in family else -((z - y) ** 2).sum() / 2


@pairwise(["engine"], name=SINGLE, family=FAMILIES, engine=ENGINES)
def test_one_logit_is_a_chance_or_a_mean(name, family, engine):
    (make, shape), (targets, weight) = SINGLE[name], FAMILIES[family]
    model, x, y = make(), vectors(5), targets(5, *shape)
    theta = named_parameters(model)
    close(flat(per_example_over(model, theta, [(x, y)])("exact", torch.square)), singly(model, theta, x, weight))
    want = sum(gradients(model, theta, loglikelihood(family, model(x[i : i + 1]), y[i])) ** 2 for i in range(5)) / 5
    close(flat(per_example_over(model, theta, [(x[:2], y[:2]), (x[2:], y[2:])])("true", torch.square)), want)


@pytest.mark.parametrize("labels", ["exact", "true"])
def test_a_regression_ignores_no_number(labels, engine):
    model, x, y = Head(1), vectors(6), torch.tensor([-100, 30, -100, 20, 5, -100])
    found = []
    for batches in ([(x, y)], [(x, y.double())], [(x[1:3], y[1:3]), (x[3:], y[3:]), (x[:1], y[:1])]):
        memory = Consolidator(model, EWC(labels=labels))
        memory.estimate(batches)
        found.append(flat(memory.anchor.importance().values()))
    scores = [loglikelihood("gaussian", model(x[i : i + 1]), y[i]) for i in range(6)]
    weights = [1 if labels == "true" else 1 / (model(x[i]) - y[i]).square().item() for i in range(6)]
    want = sum(w * gradients(model, named_parameters(model), s) ** 2 for w, s in zip(weights, scores, strict=True)) / 6
    for got in found:
        close(got, want)
    with pytest.raises(ValueError, match=r"a regression whose first 1 targets are all -100.*floating-point"):
        Consolidator(model, EWC(labels=labels)).estimate([(x[:1], y[:1]), (x[1:], y[1:])])


@pytest.mark.parametrize("squeezed", [False, True])
def test_chances_at_places_that_do_not_count(squeezed, engine):
    """Without a name for one output a place, and named for any."""
    model, x = Head(3, lambda z: z if squeezed else z.unsqueeze(-1)), vectors(5)
    y = torch.tensor([[0, 1, 0], [1, -100, -100], [-100] * 3, [0, 0, -100], [1, 1, 1]])
    theta, want = named_parameters(model), 0
    for i in (0, 1, 3, 4):
        z = model(x[i : i + 1]).flatten()
        want = want + sum(
            FAMILIES["bernoulli"][1](z[j].detach()) * gradients(model, theta, z[j]) ** 2 for j in range(3) if y[i, j] >= 0
        )
    for loss in (
        (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss()) if squeezed else (None, F.binary_cross_entropy_with_logits)
    ):
        memory = Consolidator(model, EWC())
        memory.estimate([(x, y)], loss=loss)
        close(flat(memory.anchor.importance().values()), want / 4)
    with pytest.raises(ValueError, match="targets of -100 under binary_cross_entropy_with_logits"):
        Consolidator(model, EWC(labels="true")).estimate([(x, y)], loss=F.binary_cross_entropy_with_logits)


CHANCES = {
    "column": lambda z: z[:, :1].sigmoid(),
    "flat": lambda z: z[:, 0].sigmoid(),
    "squeezed": lambda z: torch.sigmoid(z[:, :1]).squeeze(-1),
    "one of two": lambda z: z.softmax(-1)[:, 1],
    "single precision": lambda z: z[:, 0].sigmoid().float(),
}


@pytest.mark.parametrize("name", CHANCES)
def test_outputs_of_a_sigmoid_are_refused_as_those_of_a_softmax_are(name):
    model, x, y = Head(2, CHANCES[name]), vectors(5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).double()
    for rule in (EWC(), EWC(labels="true"), Kronecker(measure="data")):
        memory = Consolidator(model, rule)
        with pytest.raises(ValueError, match=r"probabilities, as a sigmoid or a softmax makes them.*output.logit"):
            memory.estimate([(x, y)])
        assert not len(memory.anchor)
    Consolidator(model, MAS()).estimate([(x, y)])
    Consolidator(model, EWC()).estimate([(x, torch.rand(5).double())])  # a regression
    Consolidator(Head(1, lambda z: z * 0), EWC()).estimate([(x, y)])  # logits between 0 and 1
    memory, theta, want = Consolidator(model, EWC()), named_parameters(model), 0
    memory.estimate([(x, y)], logits=torch.logit)
    for one in x.split(1):
        p = model(one).reshape(())
        want = want + sum(q.item() * gradients(model, theta, q.log()) ** 2 for q in (p, 1 - p)) / 5
    torch.testing.assert_close(
        flat(memory.anchor.importance().values()), want, rtol=1e-4 if "single" in name else 1e-9, atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_logits_drawn_targets_come_near_the_exact_ones(family):
    model, x = Head(1), vectors(1).expand(6000, 5)
    y = FAMILIES[family][0](6000)
    exact, drawn = (flat(gradients_of(model, [(x, y)])(how, torch.square)) for how in ("exact", "sample"))
    p = model(x[:1]).sigmoid().item()
    fourth = 1 / (p * (1 - p)) - 3 if "bernoulli" in family else 3  # that of a standardised target
    assert ((drawn - exact).abs() <= 5 * exact * math.sqrt(max(fourth - 1, 0) / 6000) + 1e-9).all()
    assert exact.sum() > 0


@pairwise(
    ["engine"],
    named=[
        (F.binary_cross_entropy_with_logits, "bernoulli"),
        (nn.BCEWithLogitsLoss(), "bernoulli"),
        (F.mse_loss, "gaussian"),
        (nn.MSELoss(reduction="sum"), "gaussian"),
    ],
    outputs=[1, 3],
    engine=ENGINES,
)
def test_a_loss_names_the_distribution_of_several_outputs(named, outputs, engine):
    (loss, family), model, x = named, Head(outputs), vectors(4)
    theta, weight = named_parameters(model), FAMILIES[family][1]
    for data in ([x], [(x, torch.rand(4, outputs).double())], [(x, torch.ones(4, outputs).long())], [(x, ["a"] * 4)]):
        close(flat(per_example_over(model, theta, data, loss=loss)("exact", torch.square)), singly(model, theta, x, weight))
    many = [x.repeat(500 if engine == "layers" else 25, 1)]
    got = flat(per_example_over(model, theta, many, loss=loss)("sample", torch.square)).sum()
    assert abs(got / singly(model, theta, x, weight).sum() - 1) < (0.2 if engine == "layers" else 0.6)


@pytest.mark.parametrize(
    "rule", [EWC(), OnlineEWC(), Kronecker(measure="data", labels="exact"), EWC(labels="sample"), EWC(labels="true")]
)
def test_rules_hold_a_model_with_one_output(rule):
    model = nn.Linear(6, 1).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 1).double()
    memory = Consolidator(model, rule)
    memory.estimate([(x, y)])
    assert all((omega > 0).all() for omega in memory.anchor.importance().values())
    if rule.labels == "exact" and not isinstance(rule, Kronecker):
        close(memory.anchor.importance()["weight"], x.square().mean(0, keepdim=True))
        close(memory.anchor.importance()["bias"], torch.ones(1).double())


@pytest.mark.parametrize("name", ["transformer", "segmentation"])
def test_a_named_softmax_is_over_the_dimension_that_the_targets_leave(name):
    """The second, as for `cross_entropy`, or the last where only that one fits; without targets nobody knows."""
    model, x, y = labelled(name, CASES[name][2], 4, ignore=[1])
    theta, draws = named_parameters(model), []
    for loss in (None, F.cross_entropy, nn.CrossEntropyLoss()):
        torch.manual_seed(0)
        draws.append(flat(per_example_over(model, theta, [(x, y)], loss=loss)("sample", torch.square)))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="in neither the second nor the last"):
        per_example_over(model, theta, [x], loss=F.cross_entropy)("sample", torch.square)


@pytest.mark.parametrize("last", [True, False])
def test_without_targets_rows_are_found_by_tokens_or_named(last):
    """Places that are those of the tokens; other models say with `logits=` where their classes are, first or last."""

    class Turned(Transformer):
        def forward(self, x):
            return super().forward(x) if last else super().forward(x).mT

    x, y = words(4), torch.zeros(4, 4).long()
    model, draws = Turned(), []
    read = (lambda z: z.flatten(0, 1)) if last else (lambda z: z.movedim(1, -1).flatten(0, -2))
    for data, options in (([(x, y)], {}), ([x], {}), ([x], {"logits": read})):
        torch.manual_seed(0)
        memory = Consolidator(model, EWC(labels="sample"))
        memory.estimate(data, **options)
        draws.append(flat(memory.anchor.importance().values()))
    close(draws[1], draws[0])
    close(draws[2], draws[0])
    square = Head(6, lambda z: z.reshape(-1, 2, 3) if last else z.reshape(-1, 3, 2))
    for rule in (EWC(labels="sample"), Kronecker(measure="data")):
        for model, inputs in ((square, vectors(4)), (Transformer(classes=4), words(4))):
            with pytest.raises(
                ValueError, match=r"no targets.*the second dimension as well as in the last.*`lambda o: o.movedim"
            ):
                Consolidator(model, rule).estimate([inputs])


# --- labels that a model shifts itself ---------------------------------------------------------------------------------------


class Language(nn.Module):
    """A model in the manner of Hugging Face, with a loss of its own."""

    def __init__(self, shifts, form="mapping", more=0.0):
        super().__init__()
        self.net, self.shifts, self.form, self.more = Transformer(), shifts, form, more

    def forward(self, x, labels=None):
        z, loss = self.net(x), None
        if labels is not None:
            rows, y = (z[:, :-1], labels[:, 1:]) if self.shifts else (z, labels)
            loss = F.cross_entropy(rows.float().flatten(0, 1), y.flatten()) + self.more
        if self.form == "tuple":
            return (loss, z)
        return {"loss": loss, "logits": z} if self.form == "mapping" else SimpleNamespace(loss=loss, logits=z)


@pairwise(["engine"], form=["mapping", "object", "tuple"], shifts=[True, False], engine=ENGINES)
def test_labels_are_aligned_as_the_model_aligns_them(shifts, form, engine):
    model, x, y = Language(shifts, form), words(5), torch.randint(3, (5, 4))
    theta = named_parameters(model)
    y[0, :3], y[1, 1:], y[2] = -100, -100, -100  # where labels are shifted, the second example has none that counts
    read = (lambda output: output[1]) if form == "tuple" else None
    got = per_example_over(model, theta, [{"x": x, "labels": y}], logits=read)("true", torch.square)
    ahead = torch.cat([y[:, 1:], torch.full((5, 1), -100)], 1) if shifts else y
    close(got, per_example_over(model.net, {n[4:]: p for n, p in theta.items()}, [(x, ahead)])("true", torch.square))


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_aligned_under_a_head_of_zeros(shifts, dtype):
    """Every label costs the same there: the gradient of the model's own loss tells them apart."""
    for classes in (5, 7, 8, 11):
        model, x, y = Language(shifts), words(5), torch.randint(3, (5, 4))
        model.net = Transformer(classes).to(dtype)
        nn.init.zeros_(model.net.head.weight)
        nn.init.zeros_(model.net.head.bias)
        y[0, :2] = -100
        memory = Consolidator(model, EWC(labels="true"))
        memory.estimate([{"x": x, "labels": y}])
        ahead = torch.cat([y[:, 1:], torch.full((5, 1), -100)], 1) if shifts else y
        want = gradients_of(model.net, [(x, ahead)])("true", torch.square)
        torch.testing.assert_close(list(memory.anchor.importance().values()), want)


def test_drawn_labels_leave_out_what_a_shifted_label_ignores():
    model, x = Language(True), words(1)
    theta, y = {n[4:]: p for n, p in named_parameters(model).items()}, torch.tensor([[2, -100, 1, -100]])
    second, fourth = enumerated(model.net, theta, x, torch.tensor([-100, 1, -100, -100]))
    batch = {"x": x.expand(2000, 4), "labels": y.expand(2000, 4)}
    for loss in (None, F.cross_entropy):
        got = flat(gradients_of(model, [batch], loss=loss)("sample", torch.square))
        assert ((got - second).abs() <= 5 * ((fourth - second**2).clamp(min=0) / 2000).sqrt() + 1e-12).all()


def test_a_loss_that_no_alignment_explains_is_refused():
    model, x, y = Language(True, more=0.1), words(4), torch.randint(3, (4, 4))
    with pytest.raises(ValueError, match=r"whose labels cannot be found out.*Pass pairs"):
        gradients_of(model, [{"x": x, "labels": y}])("sample", torch.square)
    gradients_of(model, [({"x": x}, y)])("sample", torch.square)


def test_a_models_own_loss_says_that_zeros_and_ones_are_numbers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Head(1)

        def forward(self, x, labels=None):
            z = self.net(x)
            return {"loss": F.mse_loss(z.squeeze(), labels.squeeze()), "logits": z}

    model, x, y = Own(), vectors(4), torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    got = flat(gradients_of(model, [{"x": x, "labels": y}])("exact", torch.square))
    close(got, singly(model.net, named_parameters(model), x, lambda z: torch.ones_like(z)))


# --- moments -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "lstm", "last step", "rows"])
def test_moments_leave_out_what_is_ignored(name):
    """A over the rows that count; G summed over places, averaged over the examples that have such rows: the head by hand."""
    model, x, y = labelled(name, CASES[name][2], 4, ignore=[1])
    y[2] = -100
    head = model.net[2] if name == "rows" else model.head
    weight = next(n for n, p in named_parameters(model).items() if p is head.weight)
    kept, inputs = torch.tensor([True, True, False, True]), []
    handle = head.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    z = as_rows(model.eval()(x[kept]))
    handle.remove()
    h = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    h = torch.cat([torch.ones(len(h), 1), h], 1)
    d = z.softmax(-1).detach() - F.one_hot(y[kept].flatten().clamp(min=0), 3)
    d = d * (y[kept].flatten() != -100).unsqueeze(1)
    d = d.reshape(len(h), -1)  # for "rows" the head makes both rows of an example at once
    found = moments(model, named_parameters(model), [(x, y)])("true")[weight]
    h = h[d.any(1)]
    close(found.inputs.total[0], h.T @ h / len(h))
    close(found.outputs.total[0], d.T @ d / 3)


@pytest.mark.parametrize(("targets", "weight"), [FAMILIES["bernoulli"], FAMILIES["gaussian"]])
@pytest.mark.parametrize("outputs", [1, 3])
def test_moments_of_single_outputs(targets, weight, outputs):
    model, x, y = Head(outputs), vectors(6), targets(6, outputs)
    loss = None if outputs == 1 else F.mse_loss if y.is_floating_point() else F.binary_cross_entropy_with_logits
    found = moments(model, named_parameters(model), [(x, y)], loss=loss)("exact")["net.2.weight"]
    z = model(x).detach()
    close(found.outputs.total[0], torch.diag(weight(z).mean(0)))


def test_moments_of_drawn_labels_come_near_those_of_every_label_at_every_place():
    model, x = Transformer(), words(2).repeat(1500, 1)
    y = torch.tensor([0, 0, -100, 0]).expand(3000, 4)
    found = moments(model, named_parameters(model), [(x, y)])("sample")["head.weight"].outputs.total[0]
    p = model(x[:2])[:, [0, 1, 3]].softmax(-1).detach()
    want = sum(torch.diag(q) - torch.outer(q, q) for q in p.flatten(0, 1)) / 2
    assert torch.allclose(found, want, atol=0.06 * float(want.max()))


# --- refusals ----------------------------------------------------------------------------------------------------------------


class Coupled(Head):
    """Each example's output depends on those before it."""

    def forward(self, x):
        return super().forward(x).cumsum(0)


class Ahead(Head):
    """Each example's output depends on those after it."""

    def forward(self, x):
        return super().forward(x.flip(0).cumsum(0).flip(0))


REFUSED = {
    "time first": (lambda: LstmRows(batch_first=False), series, (4,), {}, "depends on the other examples.*`batch_first=True`"),
    "time first, last step": (
        lambda: nn.Sequential(LstmRows(batch_first=False), Last()), series, (), {}, "has shape .4, 3. for 3 examples",
    ),
    "examples before": (lambda: Coupled(3), vectors, (), {}, "depends on the other examples"),
    "examples after": (lambda: Ahead(3), vectors, (), {}, "depends on the other examples"),
    "statistics": (lambda: Head(3, lambda z: z / z.norm()), vectors, (), {}, "depends on the other"),
    "mean": (lambda: Head(3, lambda z: z.mean(0, keepdim=True)), vectors, (), {}, "the same number of rows"),
    "places first": (lambda: Head(6, lambda z: z.reshape(-1, 2, 3).transpose(0, 1)), vectors, (2,), {}, "in order"),
    "rows in another order": (
        lambda: Head(6, lambda z: z.reshape(-1, 2, 3).transpose(0, 1).flatten(0, 1)), vectors, (2,), {}, "depends on the other",
    ),
    "complex": (lambda: Head(3, lambda z: z + 0j), vectors, (), {}, "output is complex"),
}  # fmt: skip


class Last(nn.Module):
    def forward(self, x):
        return x[-1]


@pytest.mark.parametrize(
    "rule", [EWC(), EWC(labels="sample"), OnlineEWC(labels="true"), MAS(), Kronecker(measure="data")], ids=str
)
@pytest.mark.parametrize("name", REFUSED)
def test_examples_must_lie_along_the_first_dimension_and_be_independent(name, rule):
    make, inputs, shape, options, match = REFUSED[name]
    model, x = make(), inputs(4)
    memory = Consolidator(model, rule)
    with pytest.raises(ValueError, match=match):
        memory.estimate([(x, torch.randint(3, (4, *shape)))], **options)
    assert not len(memory.anchor)


UNFIT = [
    (F.cross_entropy, torch.zeros(5, 2).long()),
    (F.cross_entropy, torch.zeros(5).double()),
    (F.mse_loss, torch.zeros(5).double()),
    (F.mse_loss, torch.zeros(5, 2).long()),
    (F.binary_cross_entropy_with_logits, torch.zeros(5).double()),
]


@pytest.mark.parametrize("rule", [EWC(), EWC(labels="sample"), Kronecker(measure="data")], ids=str)
@pytest.mark.parametrize(("loss", "y"), UNFIT)
def test_targets_of_another_shape_than_a_named_distribution_has_are_refused(loss, y, rule):
    memory = Consolidator(Head(3), rule)
    with pytest.raises(ValueError, match="Pass inputs alone"):
        memory.estimate([(vectors(5), y)], loss=loss)
    memory.estimate([vectors(5)], loss=loss)


@pytest.mark.parametrize("labels", ["exact", "sample", "true"])
@pytest.mark.parametrize("rule", [EWC, OnlineEWC, Kronecker, MAS])
def test_inputs_and_targets_are_as_many(rule, labels):
    rule = rule() if rule is MAS else rule(labels=labels)
    for x, y in ((vectors(10), torch.randint(3, (7,))), (vectors(3), torch.tensor(1)), (vectors(4), {"a": torch.zeros(3)})):
        with pytest.raises(ValueError, match=r"a target of shape .* for \d+ examples"):
            Consolidator(Head(3), rule).estimate([(x, y)])
    if rule != MAS():
        with pytest.raises(ValueError, match="for 3 examples of one row"):
            Consolidator(Head(3), rule).estimate([(vectors(6), torch.randint(3, (12,)))])
    with pytest.raises(ValueError, match=r"shape \(14,\) for 7 examples"):
        Consolidator(Head(3), MAS()).estimate([(vectors(7), torch.randint(3, (14,)))])


TARGETS = {
    "regression": (lambda: Head(3), lambda n: torch.randn(n, 3).double(), "`mse_loss`"),
    "several labels": (lambda: Head(3), lambda n: torch.randint(2, (n, 3)).double(), "`binary_cross_entropy_with_logits`"),
    "chances": (lambda: Head(3), lambda n: torch.rand(n, 3).double().softmax(1), "`loss="),
    "mean and variance": (lambda: Head(2), lambda n: torch.randn(n).double(), "`loss="),
    "one hot": (lambda: Head(3), lambda n: F.one_hot(torch.randint(3, (n,)), 3), "one class index for each row"),
    "regression of places": (lambda: Head(6, lambda z: z.reshape(-1, 2, 3)), lambda n: torch.randn(n, 2, 3).double(), "`loss="),
    "a negative label": (lambda: Head(3), lambda n: torch.full((n,), -1), "the class index -1"),
    "too few rows": (lambda: Head(6, lambda z: z.reshape(-1, 2, 3)), lambda n: torch.randint(3, (n,)), "row of class logits"),
    "ambiguous": (lambda: Head(9, lambda z: z.reshape(-1, 3, 3)), lambda n: torch.randint(3, (n, 3)), "Pass `logits=`"),
}


@pytest.mark.parametrize("labels", ["exact", "sample", "true"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_do_not_fit_are_refused_with_the_remedy(name, labels):
    make, targets, match = TARGETS[name]
    for rule in (EWC(labels=labels), Kronecker(measure="data", labels=labels)):
        with pytest.raises(ValueError, match=match):
            Consolidator(make(), rule).estimate([(vectors(5), targets(5))])


@pytest.mark.parametrize("labels", ["exact", "sample"])
def test_what_outputs_mean_must_be_known(labels):
    for rule in (EWC(labels=labels), Kronecker(measure="data", labels=labels)):
        memory = Consolidator(Head(1), rule)
        with pytest.raises(ValueError, match=r"one logit for each row.*`mse_loss`"):
            memory.estimate([vectors(4)])
        with pytest.raises(ValueError, match=r"targets that are neither 0 nor 1.*mse_loss"):
            memory.estimate([(vectors(4), torch.ones(4)), (vectors(2), torch.tensor([1.0, 0.5]))])
        with pytest.raises(ValueError, match="two classes or more"):
            memory.estimate([(vectors(4), torch.zeros(4).long())], loss=F.cross_entropy)
        with pytest.raises(ValueError, match=r"names no distribution.*cross_entropy"):
            memory.estimate([(vectors(4), torch.ones(4))], loss=F.l1_loss)
        with pytest.raises(ValueError, match="names no distribution"):
            memory.estimate([vectors(4)], loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)))
        memory.estimate([vectors(4)], loss=F.mse_loss)
    soft = Head(3, lambda z: z.softmax(-1))
    with pytest.raises(ValueError, match="outputs that are probabilities"):
        Consolidator(soft, EWC(labels=labels)).estimate([(vectors(4), torch.zeros(4).long())])
    hard, y = Head(3), torch.zeros(4).long()
    hard.load_state_dict(soft.state_dict())
    if labels == "exact":
        x = vectors(4)
        got = gradients_of(soft, [(x, y)], logits=torch.log)("exact", torch.square)
        close(got, gradients_of(hard, [(x, y)])("exact", torch.square))
    with pytest.raises(ValueError, match=r'"exact".*4 rows of logits.*Use `labels="sample"`'):
        Consolidator(Transformer(), EWC()).estimate([(words(3), torch.randint(3, (3, 4)))])
    with pytest.raises(ValueError, match=r"the class index 3\. .*0 to 2, or are -100"):
        Consolidator(Head(3), EWC(labels="true")).estimate([(vectors(3), torch.tensor([0, 3, 1]))])


def without_graph(z):
    with torch.no_grad():
        return z.square()


CONSTANT = {
    "no_grad": lambda: Head(3, without_graph),
    "detach": lambda: Head(3, lambda z: z.detach()),
    "numpy": lambda: Head(3, lambda z: torch.from_numpy(z.detach().numpy())),
    "of the inputs alone": lambda: Head(3, lambda z: z.detach().requires_grad_()),
}


@pytest.mark.parametrize("rule", [EWC(), EWC(labels="true"), MAS(), Kronecker(measure="data")], ids=str)
@pytest.mark.parametrize("name", CONSTANT)
def test_outputs_without_a_graph_are_refused(name, rule):
    memory, data = Consolidator(CONSTANT[name](), rule), [(vectors(4), torch.zeros(4).long())]
    with pytest.raises(ValueError, match=r"without a graph.*`torch.no_grad`, `detach` and NumPy"):
        memory.estimate(data)
    assert not len(memory.anchor)
    memory = Consolidator(Head(3), rule)
    memory.estimate(data)
    memory.model.requires_grad_(False)
    memory.estimate([(x + 1, y) for x, y in data])  # what is frozen by now is measured all the same
    assert not any(p.requires_grad for p in memory.model.parameters())


@pytest.mark.parametrize("rule", [EWC(labels="true"), Kronecker(measure="data", labels="true")], ids=str)
def test_a_loss_without_a_graph_is_refused(rule):
    data = [(vectors(4), torch.zeros(4).long())]
    with pytest.raises(ValueError, match="a loss without a graph"):
        Consolidator(Head(3), rule).estimate(data, loss=lambda z, y: F.cross_entropy(z, y).detach())


class Checkpointed(Head):
    """Keeps no activations of its first layer."""

    def __init__(self, reentrant, before):
        super().__init__(3)
        self.reentrant = reentrant
        self.before = nn.Linear(5, 5).double() if before else lambda x: x.clone().requires_grad_()

    def forward(self, x):
        h = checkpoint(self.net[0], self.before(x), use_reentrant=self.reentrant)
        return self.net[2](torch.tanh(h))


@pytest.mark.parametrize("rule", [EWC(), EWC(labels="true"), MAS(), Kronecker(measure="data")], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_reentrant_checkpoints_are_refused_and_others_are_not(before, rule):
    data = [(vectors(4), torch.zeros(4).long())]
    with pytest.raises(ValueError, match=r"reentrant checkpoint.*`use_reentrant=False`"):
        Consolidator(Checkpointed(True, before), rule).estimate(data)
    model = Checkpointed(False, before)
    memory = Consolidator(model, rule)
    memory.estimate(data)
    if rule == EWC(labels="true"):
        score = [F.log_softmax(model(x), 1)[0, 0] for x in data[0][0].split(1)]
        want = sum(gradients(model, named_parameters(model), s) ** 2 for s in score) / 4
        close(flat(memory.anchor.importance().values()), want)


@pytest.mark.parametrize("labels", ["exact", "true"])
def test_rare_rows_of_an_embedding_are_measured(labels):
    class Sparse(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4, sparse=sparse), nn.Linear(4, 3)
            self.double()

        def forward(self, x):
            return self.head(torch.tanh(self.words(x)).mean(1))

    model, plain, data = Sparse(True), Sparse(False), [(words(5), torch.randint(3, (5,)))]
    plain.load_state_dict(model.state_dict())
    memory = Consolidator(model, EWC(labels=labels))
    memory.estimate(data)
    close(list(memory.anchor.importance().values()), gradients_of(plain, data)(labels, torch.square))


@pytest.mark.parametrize("rule", [EWC(), MAS(), Kronecker(measure="data")], ids=str)
def test_layers_without_a_shape_are_refused(rule):
    model = nn.Sequential(nn.LazyLinear(3)).double()
    data = [(vectors(4), torch.zeros(4).long())]
    memory = Consolidator(model, rule)
    for call in (memory.estimate, memory.consolidate):
        with pytest.raises(ValueError, match=r"`0.weight`, `0.bias` of a lazy module.*Run the model once"):
            call(data)
    model(data[0][0])
    memory.estimate(data)


@pytest.mark.parametrize("rule", [EWC(labels="true"), Kronecker(measure="data", labels="true")], ids=str)
@pytest.mark.parametrize(
    ("loss", "shape"),
    [(F.cross_entropy, ()), (nn.CrossEntropyLoss(), ()), (F.binary_cross_entropy_with_logits, (3,)), (nn.MSELoss(), (3,))],
)
def test_a_loss_of_logits_is_given_the_logits(loss, shape, rule):
    model, x = Head(3, lambda z: SimpleNamespace(logits=z, hidden=None)), vectors(4)
    y, found = torch.randint(2, (4, *shape)), []
    for options in ({"loss": loss}, {"loss": loss, "logits": lambda o: o.logits}):
        memory = Consolidator(model, rule)
        memory.estimate([(x, y)], **options)
        found.append(flat(memory.anchor.importance().values()))
    close(*found)
    if isinstance(rule, EWC):
        targets = y if y.dim() == 1 else y.double()
        scores = [loss(model(x[i : i + 1]).logits, targets[i : i + 1]) for i in range(4)]
        close(found[0], sum(gradients(model, named_parameters(model), s) ** 2 for s in scores) / 4)


def test_data_that_is_there_once_is_named():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = iter([(x, torch.tensor(0)) for x in vectors(6)])

        def __iter__(self):
            return self.rows

    class Normed(Head):
        def __init__(self):
            super().__init__(3)
            self.norm = nn.LayerNorm(5).double()

        def forward(self, x):
            return super().forward(self.norm(x))

    for rule in (EWC(), MAS()):
        Consolidator(Normed(), rule).estimate(torch.utils.data.DataLoader(Once(), batch_size=2))
    for rule in (Kronecker(measure="data"), Kronecker(measure="data", samples=3)):
        memory = Consolidator(Normed(), rule)
        once = torch.utils.data.DataLoader(Once(), batch_size=2 if rule.samples is None else 6)
        with pytest.raises(ValueError, match=r"`DataLoader`\) is used up after it was read once"):
            memory.estimate(once)
        assert not len(memory.anchor)


def test_ranks_agree_on_what_one_logit_means():
    class Two:
        def sum_(self, figures):
            return figures + torch.tensor([4, 0, 1, 0])  # the other rank had only targets of 0 and 1

    scores, model = Scores("true", None, None), Head(1)
    with isolated(model) as kept:
        for batch in examples([(vectors(4), torch.randn(4))], None, torch.device("cpu")):
            scores.prepare(model, batch, kept)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        over_data.check_totals([], 4, [], Two(), torch.device("cpu"), scores)


def test_examples_that_come_one_by_one_and_random_models_are_measured():
    """What cannot be compared is taken as it is: a single example, a model of one example, and chance in evaluation mode."""

    class OnlyOne(Head):
        def forward(self, x):
            if len(x) > 1:
                raise AssertionError("one at a time")
            return super().forward(x)

    noisy = Head(3, lambda z: z + torch.randn_like(z))
    coupled, lonely = Coupled(3), OnlyOne(3)
    for model in (noisy, lonely):
        assert flat(gradients_of(model, [(vectors(4), torch.zeros(4).long())])("exact", torch.square)).sum() > 0
    ones = [(vectors(1), torch.zeros(1).long()) for _ in range(3)]
    assert flat(gradients_of(coupled, ones)("exact", torch.square)).sum() > 0
    with pytest.raises(ValueError, match="depends on the other"):
        gradients_of(coupled, [*ones, (vectors(2), torch.zeros(2).long())])("exact", torch.square)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_dependence(dtype):
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 5)).to(dtype)
    model.append(nn.Identity())
    model[-1].forward = lambda z: z.float()
    gradients_of(model, [(torch.randn(8, 64, dtype=dtype), torch.randint(5, (8,)))])("true", torch.square)


def test_complex_parameters_are_refused():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).abs()

    data = [(torch.randn(4, 5), torch.randint(3, (4,)))]
    for rule in (EWC(), OnlineEWC(), MAS(), Kronecker(measure="data")):
        with pytest.raises(ValueError, match="parameters `w` are complex"):
            Consolidator(Turned(), rule).estimate(data)
        with pytest.raises(ValueError, match="parameters `w` are complex"):
            Consolidator(Turned(), rule).consolidate(data)
    model = Turned()
    for prepared in (per_example_over, moments):
        with pytest.raises(ValueError, match="parameters `w` are complex"):
            prepared(model, named_parameters(model), data)("true", *[torch.square] * (prepared is per_example_over))


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3).double()

    def forward(self, x, y=None):
        return self.layer(x)


def test_the_target_may_be_the_whole_batch():
    """As for models that compute their own loss from all that they are given."""
    model, x, y = Named(), torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = {"x": x, "y": y}
    found = []
    for data, loss in (([(rows, rows)], lambda z, batch: F.cross_entropy(z, batch["y"])), ([(x, y)], F.cross_entropy)):
        memory = Consolidator(model, EWC(labels="true"))
        memory.estimate(data, loss=loss)
        found.append(memory.anchor.importance())
    for name, omega in found[0].items():
        torch.testing.assert_close(omega, found[1][name], rtol=1e-12, atol=1e-15)
        assert omega.sum() > 0
