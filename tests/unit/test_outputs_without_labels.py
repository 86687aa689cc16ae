"""Importance of a model's output without labels: its random directions, readers that see the batch, and what MAS misses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import pairwise
from dense import ENGINES, close, gradients_of
from rwalk import EWC, MAS, Consolidator, Kronecker, OnlineEWC
from rwalk.replay import Buffer


class Tokens(nn.Module):
    """Hidden states (batch, places, 3) of words, as an object."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, ids, mask=None):
        return SimpleNamespace(last_hidden_state=self.mix(self.words(ids).sin()))


class Pooled(nn.Module):
    """The mean of the hidden states at places that count."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, ids, mask):
        return mean_of_places(self.tokens(ids), {"mask": mask})


def mean_of_places(output, batch):
    mask = batch["mask"].unsqueeze(-1)
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def x_of(n):
    return torch.randn(n, 5, dtype=torch.float64)


def hidden(output):
    return output.last_hidden_state


MODELS = {
    "vectors": (mlp, lambda: x_of(1), None),
    "images": (lambda: nn.Conv2d(2, 2, 3).double(), lambda: torch.randn(1, 2, 4, 4, dtype=torch.float64), None),
    "tokens": (Tokens, lambda: torch.randint(9, (1, 4)), hidden),
    "time": (lambda: nn.LSTM(5, 2, batch_first=True).double(), lambda: x_of(6).reshape(2, 3, 5)[:1], lambda output: output[0]),
}


def gauss_newton(model, x, read):
    """The diagonal of J^T J, row by row of the Jacobian."""
    z = (read or (lambda output: output))(model(x)).flatten()
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for one in z:
        for total, g in zip(totals, torch.autograd.grad(one, list(model.parameters()), retain_graph=True), strict=True):
            total += g.square()
    return totals


@pairwise(["engine"], name=MODELS, engine=ENGINES)
def test_the_mean_over_directions_is_the_diagonal_of_gauss_newton(name, engine):
    make, inputs, read = MODELS[name]
    model, x = make(), inputs()
    count = 2000 if engine == "layers" and name != "time" else 300
    got = gradients_of(model, [x.repeat(count, *[1] * (x.dim() - 1))], logits=read)("output", torch.square)
    for a, b in zip(got, gauss_newton(model, x, read), strict=True):
        error = (2 / count) ** 0.5 * b  # the variance of one draw is at most twice the square
        assert ((a - b).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("rule", [EWC, OnlineEWC, Kronecker])
def test_a_single_output_is_exact(rule, engine):
    model, x = mlp(1), x_of(6)
    options = {"measure": "data", "share": 1.0, "rank": None} if rule is Kronecker else {}
    found, wanted = Consolidator(model, rule(labels="output", **options)), Consolidator(model, rule(labels="exact", **options))
    found.estimate([x])
    wanted.estimate([(x, x.new_zeros(6, 1))], loss=F.mse_loss)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    close(found.penalty(), wanted.penalty())
    if rule is not Kronecker:
        close(found.anchor.omega, wanted.anchor.omega)


def test_the_gradients_at_the_outputs_of_layers_are_those_of_directions():
    model, x = mlp(), x_of(1)
    options = {"measure": "data", "share": 1.0, "rank": None}
    found, wanted = (Consolidator(model, Kronecker(labels=labels, **options)) for labels in ("output", "exact"))
    found.estimate([x.repeat(4000, 1)])
    wanted.estimate([(x, x.new_zeros(1, 3))], loss=F.mse_loss)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    torch.testing.assert_close(found.penalty(), wanted.penalty(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    "rule", [EWC(labels="output"), Kronecker(measure="data", labels="output")], ids=lambda r: type(r).__name__
)
def test_directions_follow_the_seed_and_leave_the_users_stream_alone(rule):
    model, x, penalties, streams = mlp(), x_of(8), [], []
    moved = copy.deepcopy(model)
    for seed in (3, 3, 4):
        memory = Consolidator(copy.deepcopy(moved), rule)
        torch.manual_seed(seed)
        memory.estimate([x])
        streams.append(torch.rand(1) if seed == 3 else None)
        with torch.no_grad():
            memory.model[0].weight.add_(0.1)
        penalties.append(memory.penalty())
    torch.manual_seed(3)
    assert streams[:2] == [torch.rand(1)] * 2
    assert penalties[0] == penalties[1] != penalties[2]


def test_labels_do_not_matter(engine):
    model, x = mlp(1), x_of(4)
    want = gradients_of(model, [x])("output", torch.square)
    for y in (torch.tensor([0, -100, 7, -100]), torch.randn(4), ["a", "b", "c", "d"]):
        close(gradients_of(model, [(x, y)])("output", torch.square), want)


@pytest.mark.parametrize("rule", [EWC, OnlineEWC, Kronecker])
def test_a_loss_is_refused(rule):
    memory = Consolidator(mlp(), rule(labels="output", **({"measure": "data"} if rule is Kronecker else {})))
    with pytest.raises(
        ValueError, match=r'"output" measure the output itself and take no `loss`\. Leave it out, and let `logits='
    ):
        memory.estimate([x_of(3)], loss=F.mse_loss)
    assert not memory.anchor.point


# --- readers that see the batch ----------------------------------------------------------------------------------------------


def padded():
    ids = torch.randint(9, (5, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    return ids, mask


@pairwise(["engine"], objective=["norm", "exact", "true"], engine=ENGINES)
def test_a_reader_of_two_arguments_gets_the_batch(objective, engine):
    tokens, (ids, mask), y = Tokens(), padded(), torch.tensor([0, 1, 2, 1, 0])
    want = gradients_of(Pooled(tokens), [((ids, mask), y)])(objective, torch.square)
    by_name = [{"ids": ids, "mask": mask, "labels": y}]

    class Labelled(Tokens):
        def forward(self, ids, mask, labels):
            return super().forward(ids)

    labelled = Labelled()
    labelled.load_state_dict(tokens.state_dict())
    close(gradients_of(labelled, by_name, logits=mean_of_places)(objective, torch.square), want)
    by_place = gradients_of(tokens, [((ids, mask), y)], logits=lambda output, batch: mean_of_places(output, {"mask": batch[1]}))
    close(by_place(objective, torch.square), want)


@pytest.mark.parametrize(
    "rule", [EWC(labels="exact"), MAS(), Kronecker(measure="data", labels="exact")], ids=lambda r: type(r).__name__
)
def test_every_rule_takes_such_a_reader(rule):
    tokens, (ids, mask) = Tokens(), padded()
    model = Pooled(copy.deepcopy(tokens))
    read, inside = Consolidator(tokens, rule), Consolidator(model, rule)
    read.estimate(
        [((ids, mask), torch.tensor([0, 1, 2, 1, 0]))], logits=lambda output, args: mean_of_places(output, {"mask": args[1]})
    )
    inside.estimate([((ids, mask), torch.tensor([0, 1, 2, 1, 0]))])
    with torch.no_grad():
        for p, q in zip(tokens.parameters(), model.parameters(), strict=True):
            p.add_(0.3)
            q.add_(0.3)
    close(read.penalty(), inside.penalty())
    assert read.penalty() > 0


class Placed(nn.Module):
    """Logits for each token of a sequence, with padding that nothing but `attention_mask` tells."""

    def __init__(self):
        super().__init__()
        self.places, self.words, self.mix = nn.Embedding(6, 4), nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).expand_as(input_ids))
        return SimpleNamespace(logits=self.mix(hidden.sin()))


@pytest.mark.parametrize(
    "rule",
    [EWC(labels="sample"), EWC(labels="output"), MAS(), Kronecker(measure="data"), Kronecker(labels="output")],
    ids=lambda r: f"{type(r).__name__} {getattr(r, 'labels', '')}",
)
def test_without_labels_padding_has_no_importance(rule):
    torch.manual_seed(0)
    model, ids = Placed(), torch.randint(9, (8, 6))
    memory = Consolidator(model, rule)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).repeat(8, 1)
    memory.estimate([{"input_ids": ids, "attention_mask": mask}])
    places = memory.anchor.importance()["places.weight"].sum(1)
    assert (places[:4] > 0).all()
    assert (places[4:] == 0).all()


def test_layers_that_only_the_reader_calls_are_measured_as_layers():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.head(self.body(x))

    torch.manual_seed(0)
    model, x = Headed(), x_of(6)
    rule = Kronecker(measure="data", labels="exact", rank=None, share=1.0)
    alone, read = Consolidator(copy.deepcopy(model.body), rule), Consolidator(model, rule, exclude="head")
    alone.estimate([x])
    read.estimate([x], logits=lambda _, batch: model.body(batch))
    assert {*read.anchor.layers} == {"body.0.weight", "body.2.weight"}
    for name, layer in alone.anchor.layers.items():
        found = read.anchor.layers[f"body.{name}"]
        close(found.inputs.matrix(), layer.inputs.matrix())
        close(found.outputs.matrix(), layer.outputs.matrix())


def test_layers_that_are_not_seen_at_work_are_named_and_held_one_by_one():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.second(F.linear(x, self.first.weight).tanh())

    memory = Consolidator(Functional(), Kronecker(measure="data"))
    with pytest.warns(UserWarning, match=r"layers of `first\.weight` were not seen at work"):
        memory.estimate([x_of(6)])
    assert {*memory.anchor.layers} == {"second.weight"}
    assert (memory.anchor.omega["first.weight"] > 0).all()


def test_a_single_input_comes_as_it_is():
    model, x = mlp(), x_of(4)
    want = gradients_of(nn.Sequential(model), [x])("norm", torch.abs)
    seen = []
    gradients_of(model, [x], logits=lambda output, batch: seen.append(batch.shape[1:]) or output)("norm", torch.abs)
    assert {*seen} == {(5,)}
    scaled = gradients_of(model, [x], logits=lambda output, batch: output * batch[:, :1] / batch[:, :1])("norm", torch.abs)
    close(scaled, want)


def test_a_reader_of_one_argument_gets_the_output_alone():
    model, x = mlp(), x_of(4)
    want = gradients_of(model, [x])("norm", torch.abs)
    for read in (lambda output, scale=1.0: output * scale, nn.Identity(), torch.clone, lambda output, *more, **named: output):
        close(gradients_of(model, [x], logits=read)("norm", torch.abs), want)


def test_replay_uses_the_same_readers():
    model, x = mlp(), x_of(12)
    y = torch.arange(12) % 3
    kept = []
    for read in (lambda output: output, lambda output, batch: output + 0 * batch[:, :1]):
        buffer = Buffer(6, select="entropy")
        buffer.add(model, [(x, y)], logits=read)
        kept.append(buffer.state_dict())
    assert str(kept[0]) == str(kept[1])


# --- outputs of one norm -----------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Outputs of norm 1."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return F.normalize(self.net(x), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [(), (3,)])
def test_mas_refuses_outputs_of_constant_norm(dtype, places):
    model = Unit(mlp()).to(dtype)
    memory = Consolidator(model, MAS())
    with pytest.raises(ValueError, match=r'the same norm for every example.*would hold nothing\. Use `EWC\(labels="output"\)`'):
        memory.estimate([torch.randn(4, *places, 5, dtype=dtype)])
    assert not memory.anchor.point
    memory.estimate([torch.randn(4, 5, dtype=dtype)], logits=lambda output: output * torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    assert any(o.any() for o in memory.anchor.omega.values())


def normed(scale=1.0, shift=0.0):
    """A LayerNorm at the end, with a scale and a shift."""
    model = nn.Sequential(mlp(), nn.LayerNorm(3).double())
    nn.init.constant_(model[1].weight, scale)
    nn.init.constant_(model[1].bias, shift)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_mas_sees_a_constant_norm_behind_a_scale_and_a_shift(scale):
    memory = Consolidator(normed(scale), MAS())
    with pytest.raises(ValueError, match="the same norm for every example"):
        memory.estimate([x_of(6)])
    assert not memory.anchor.point


def zero_head():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def uneven(module):
    if isinstance(module, nn.LayerNorm):
        module.weight.data = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


ORDINARY = {
    "a single output": (lambda: Unit(mlp(1)), x_of),
    "a head of zeros": (zero_head, x_of),
    "one example": (mlp, lambda n: x_of(1)),
    "the same example again": (mlp, lambda n: x_of(1).repeat(n, 1)),
    "both signs": (lambda: nn.Linear(5, 3, bias=False).double(), lambda n: torch.cat([(x := x_of(n // 2)), -x])),
    "a softmax": (lambda: nn.Sequential(mlp(), nn.Softmax(1)), x_of),
    "a layer after it": (lambda: nn.Sequential(Unit(mlp()), nn.Linear(3, 3).double()), x_of),
    "a trained norm at the end": (lambda: normed().apply(uneven), x_of),
    "a class masked": (lambda: nn.Sequential(mlp(), nn.Threshold(0.1, -torch.inf)), x_of),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_mas_takes_ordinary_outputs(name):
    make, inputs = ORDINARY[name]
    memory = Consolidator(make(), MAS())
    memory.estimate([inputs(6)])
    assert memory.anchor.point


# Labels that the model is sure of


def sure(scale):
    """A classifier whose own labels have a loss that falls with the scale, and examples with these labels."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(scale)
    x = torch.randn(64, 4, dtype=torch.float64)
    margins = model(x).detach().topk(2, 1).values
    x = x[(margins[:, 0] - margins[:, 1]).argsort(descending=True)[:12]]
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("rule", [EWC(labels="true"), Kronecker(measure="data", labels="true")], ids=lambda r: type(r).__name__)
def test_labels_that_the_model_is_sure_of_are_no_measure_and_a_warning_says_so(rule):
    model, x, y = sure(30)
    with pytest.warns(
        UserWarning, match=r'sure of the data\'s labels: the first \d examples have a mean loss of .* labels="sample"'
    ):
        Consolidator(model, rule).estimate([(x, y)])
    model, x, y = sure(1)
    Consolidator(model, rule).estimate([(x, y)])


def test_the_empirical_fisher_of_a_sure_model_is_nearly_nothing_and_drawn_labels_keep_it():
    """In the mean over many draws the true Fisher information stays what it is by its formula, p (1 - p) x^2."""
    model, x, y = sure(30)
    p = model(x).softmax(1).detach()
    truth = torch.einsum("nc,ni->ci", p * (1 - p), x.square()) / len(x)
    empirical = Consolidator(model, EWC(labels="true"))
    with pytest.warns(UserWarning, match="empirical Fisher"):
        empirical.estimate([(x, y)])
    exact = Consolidator(model, EWC(labels="exact"))
    exact.estimate([(x, y)])
    torch.testing.assert_close(exact.anchor.omega["weight"], truth)
    assert float(empirical.anchor.omega["weight"].sum()) < 0.1 * float(truth.sum())
