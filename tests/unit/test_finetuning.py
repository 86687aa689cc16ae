"""What a model still knows, heads that are fitted first, and answers that stay: against formulas written out here."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator, Distillation, RWalk, Snapshot, bench, report, warm_head

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.arange(40) % 3


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs)).double()


def moved(model, by=0.3):
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn_like(p))
    return other


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Output(dict):
    """As Hugging Face's outputs: a dictionary with attributes."""

    __getattr__ = dict.get


class Encoder(nn.Module):
    """Takes tokens with a mask, returns hidden states, and logits and a loss if it has a head."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.mix = nn.Embedding(12, 5), nn.Linear(5, 5)
        self.score = head
        self.double()

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
        hidden = torch.tanh(self.mix(self.embed(input_ids)))
        if self.score is None:
            return Output(last_hidden_state=hidden)
        logits = self.score(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Output(logits=logits, loss=loss)


def tokens(seed=0, examples=8, length=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, (examples, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (examples, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask}


# Snapshot


def figures(before, now):
    """The three figures, by NumPy and SciPy."""

    def cosines(rows):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit @ unit.T

    a, b = cosines(before), cosines(now)
    pairs = np.triu_indices(len(a), 1)
    k = min(10, len(a) - 1)
    near = [[set(np.argsort(-np.where(np.arange(len(s)) == i, -2, s[i]))[:k]) for i in range(len(s))] for s in (a, b)]
    overlap = np.mean([len(p & q) / k for p, q in zip(*near, strict=True)])
    p, q = (rows - np.log(np.exp(rows).sum(1, keepdims=True)) for rows in (before, now))
    return stats.spearmanr(a[pairs], b[pairs])[0], overlap, (np.exp(p) * (p - q)).sum(1).mean()


def test_kept_is_what_numpy_finds():
    model = net(7)
    snapshot = Snapshot(model, [(X[:30], Y[:30]), X[30:]], logits=True)
    later = moved(model)
    with torch.no_grad():
        before, now = (m.eval()(X).numpy() for m in (copy.deepcopy(model), later))
    found = snapshot.kept(later)
    assert len(snapshot) == 40
    np.testing.assert_allclose([*found], figures(before, now), rtol=1e-9)
    assert found.similarity < 0.99
    assert tuple(snapshot.kept()) == (1, 1, 0)
    assert set(found.scalars()) == {"kept/similarity", "kept/neighbours", "kept/divergence"}


def test_a_snapshot_leaves_no_trace_and_asks_for_no_labels():
    model = net()
    before, state = bits(model), torch.get_rng_state()
    snapshot = Snapshot(model, [(X, Y)])
    snapshot.kept()
    assert equal(before, bits(model))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model[0].weight.grad is None
    assert snapshot.kept(moved(model)).divergence is None  # a plain tensor may be an embedding


def test_only_tokens_that_count_are_looked_at():
    model, batch = Encoder(nn.Linear(5, 4)), tokens()
    snapshot = Snapshot(model, [batch, {**tokens(1), "labels": torch.zeros(8, 5)}])
    assert len(snapshot) == int(batch["attention_mask"].sum() + tokens(1)["attention_mask"].sum())
    assert snapshot.logits
    assert snapshot.kept(moved(model)).divergence > 0
    few = Snapshot(model, [batch], rows=7)
    assert len(few) == 7
    assert few.nbytes == 7 * 4 * 8


def test_encoders_are_read_by_the_mean_of_the_tokens_that_count():
    model, batch = Encoder(), tokens()

    def read(output, batch):
        mask = batch["attention_mask"].unsqueeze(2)
        return (output["last_hidden_state"] * mask).sum(1) / mask.sum(1)

    mine, given = Snapshot(model, [batch]), Snapshot(model, [batch], read)
    assert torch.equal(mine._before, given._before)
    assert Snapshot(model, [batch], read=lambda output: output.last_hidden_state[:, 0]).kept(moved(model)).similarity < 1


def test_a_summary_has_what_is_kept():
    model = net()
    memory = Consolidator(model, RWalk()).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    summary = memory.summary(snapshot=Snapshot(model, [X], logits=True))
    assert summary.figures["kept similarity"] == 1
    assert summary.scalars()["memory/kept_divergence"] == 0
    assert "kept neighbours: 1" in str(summary)


def test_outputs_that_cannot_be_compared_are_refused():
    model = net()
    with pytest.raises(ValueError, match="2 rows of output, and comparing needs three"):
        Snapshot(model, [X[:2]])
    with pytest.raises(ValueError, match="There are no inputs"):
        Snapshot(model, [])
    with pytest.raises(TypeError, match="output is a `str`, and not a tensor"):
        Snapshot(nn.Identity(), [X], read=lambda output: "text")
    with pytest.raises(ValueError, match=r"shape \(40, 5\) now, and had \(40, 3\)"):
        Snapshot(model, [X]).kept(net(5))


def test_what_is_no_batch_has_one_column_or_is_not_finite_is_refused():
    model = net()
    for wrong in (X, torch.utils.data.TensorDataset(X)):
        with pytest.raises(TypeError, match="must yield batches"):
            Snapshot(model, wrong)
    snapshot = Snapshot(model, X.split(20))
    with pytest.raises(ValueError, match=r'one number.*`read="features"`'):
        Snapshot(net(1), [X])
    assert len(Snapshot(net(1), [X], read="features")) == 40
    model[4].bias.data[1] = float("inf")
    for attempt in (lambda: Snapshot(model, [X]), snapshot.kept):
        with pytest.raises(FloatingPointError, match=r"not finite in (40|20) of"):
            attempt()


def test_feature_maps_are_averaged_over_their_places():
    class Map(nn.Module):
        def forward(self, x):
            return Output(last_hidden_state=x.reshape(-1, 2, 3, 1))

    assert torch.equal(Snapshot(Map(), [X])._before, X.reshape(-1, 2, 3).mean(2))


def test_rows_are_taken_while_they_come_and_evenly_spread():
    seen, x = [], torch.arange(2000.0).unsqueeze(1) * torch.tensor([1.0, -1.0]) + torch.tensor([1.0, 3.0])

    class Rows(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    one, parts = (Snapshot(Rows(), x.split(size), rows=50) for size in (2000, 7))
    assert torch.equal(one._before, parts._before)
    assert len(parts) == 50
    steps = parts._before[:, 0].diff()
    assert float(steps.min()) >= 32
    assert float(steps.max()) <= 64
    assert parts._before[0, 0] == 1
    assert parts._before[-1, 0] > 1900


# warm_head


def penalised(head, features, y, penalty=1.0):
    return F.cross_entropy(head(features), y) + penalty / 2 / len(y) * head.weight.square().sum()


@pytest.mark.parametrize("name", [None, "4", "module"])
def test_a_warm_head_minimises_the_loss_on_the_features_as_they_are(name):
    model = net()
    before = bits(model)
    left = warm_head(model, [(X[:25], Y[:25]), (X[25:], Y[25:])], model[4] if name == "module" else name)
    after = bits(model)
    assert equal({n: t for n, t in before.items() if n[0] != "4"}, {n: t for n, t in after.items() if n[0] != "4"})
    assert model.training
    assert model[4].weight.grad is None
    with torch.no_grad():
        features = copy.deepcopy(model[:4]).eval()(X)
    gradients = torch.autograd.grad(penalised(model[4], features, Y), list(model[4].parameters()))
    assert all(float(g.abs().max()) < 1e-4 for g in gradients)
    assert left == pytest.approx(float(F.cross_entropy(model[4](features), Y).detach()))


def test_a_head_of_a_regression_of_one_number_is_least_squares():
    model, y = net(1), X[:, 0] * 2 - 1
    warm_head(model, [(X, y)], penalty=0)
    with torch.no_grad():
        features = copy.deepcopy(model[:4]).eval()(X)
        design = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(design, y.unsqueeze(1)).solution
        torch.testing.assert_close(model[4](features), design @ best, atol=1e-3, rtol=1e-3)


def test_heads_over_tokens_leave_out_labels_that_do_not_count():
    model, batch = Encoder(nn.Linear(5, 4)), tokens()
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % 4, -100)
    before = float(model(**batch, labels=labels)["loss"].detach())
    left = warm_head(model, [{**batch, "labels": labels}])
    assert left < before
    assert float(model(**batch, labels=labels)["loss"].detach()) == pytest.approx(left)


def test_a_frozen_head_keeps_its_gradients_and_flags():
    model = net()
    model[4].requires_grad_(False)
    model[4].bias.grad = torch.ones_like(model[4].bias)
    warm_head(model, [(X, Y)])
    assert not model[4].weight.requires_grad
    assert torch.equal(model[4].bias.grad, torch.ones_like(model[4].bias))


def test_heads_that_are_none_and_data_without_labels_are_refused():
    model = net()
    before = bits(model)
    with pytest.raises(ValueError, match="has no module `head`"):
        warm_head(model, [(X, Y)], "head")
    with pytest.raises(ValueError, match="is no part of the model"):
        warm_head(model, [(X, Y)], nn.Linear(8, 3))
    with pytest.raises(ValueError, match="have no batch"):
        warm_head(model, [])
    with pytest.raises(ValueError, match="a batch without labels"):
        warm_head(model, [X])
    with pytest.raises(ValueError, match="calls no such head"):
        warm_head(nn.Sequential(nn.Tanh()), [(X, Y)])
    model[0].weight.data[0, 0] = float("nan")
    before = bits(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        warm_head(model, [(X, Y)])
    assert torch.equal(before["4.weight"], model[4].weight)


class Ends(nn.Module):
    """What comes after a head: a second one, another sign, or a form of the same logits."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux, self.end = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3), end
        self.double()

    def forward(self, x):
        hidden = self.body(x).tanh()
        logits = self.head(hidden)
        if self.end == "aux":
            self.beside = self.aux(hidden.detach())
        return {"aux": logits, "minus": -logits, "log": logits.log_softmax(1), "logits": logits}[self.end]


@pytest.mark.parametrize("end", ["aux", "minus"])
def test_the_layer_called_last_is_refused_where_the_model_returns_something_else(end):
    model = Ends(end)
    before = bits(model)
    with pytest.raises(ValueError, match=f"called last, `{'aux' if end == 'aux' else 'head'}`, does not give .* Pass `head=`"):
        warm_head(model, [(X, Y)])
    assert equal(before, bits(model))
    warm_head(model, [(X, Y)], "head")
    tiny = Ends(end)
    with torch.no_grad():
        for p in (*tiny.head.parameters(), *tiny.aux.parameters()):
            p.mul_(1e-5)  # so that all losses are nearly the same
    with pytest.raises(ValueError, match="does not give what the model returns"):
        warm_head(tiny, [(X, Y)])


def test_a_model_that_returns_logarithms_of_probabilities_is_fitted_as_one_of_logits():
    model, other = Ends("log"), Ends("logits")
    assert warm_head(model, [(X, Y)]) == warm_head(other, [(X, Y)])
    torch.testing.assert_close(bits(model), bits(other))


class Shifted(Encoder):
    """Its loss is that of the labels after each token."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids)
        loss = None if labels is None else F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(logits=output.logits, loss=loss)


@pytest.mark.parametrize("head", [None, "score"])
def test_a_model_whose_own_loss_is_another_one_is_refused_without_a_loss(head):
    model, ids = Shifted(nn.Linear(5, 12)), tokens()["input_ids"]
    before = bits(model)
    with pytest.raises(ValueError, match=r"model's own loss is .*shifts the labels"):
        warm_head(model, [{"input_ids": ids, "labels": ids}], head)
    assert equal(before, bits(model))
    warm_head(model, [{"input_ids": ids, "labels": ids}], head, loss=F.cross_entropy)


def test_a_head_whose_weights_are_the_embeddings_is_refused():
    model, batch = Encoder(nn.Linear(5, 12, bias=False)), tokens()
    model.score.weight = model.embed.weight
    with pytest.raises(ValueError, match="has weights that `embed` has as well"):
        warm_head(model, [batch | {"labels": batch["input_ids"]}])


def test_what_takes_no_part_in_a_head_stays_and_modes_buffers_and_the_random_state_too():
    class Head(nn.Sequential):
        def __init__(self):
            super().__init__(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
            self.original = nn.Linear(8, 3)

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    model = nn.Sequential(nn.Linear(6, 8), Head()).double()
    before, state = bits(model), torch.get_rng_state()
    left = warm_head(model, [(X, Y)], "1")
    after = bits(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {
        f"1.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")
    }
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert left == pytest.approx(float(F.cross_entropy(model.eval()(X), Y).detach()))


def test_several_labels_for_each_example_are_yes_or_no():
    model, other, y = net(), net(), (X[:, :3] > 0).double()
    left = warm_head(model, [(X, y)])
    assert left == warm_head(other, [(X, y)], loss=F.binary_cross_entropy_with_logits)
    assert equal(bits(model), bits(other))
    numbers = net()
    warm_head(numbers, [(X, y), (X, 2 * y)], penalty=0)  # no yes or no
    both = torch.cat([y, 2 * y])
    rows = numbers.eval()(torch.cat([X, X]))
    assert float((rows - both).mean().detach()) == pytest.approx(0, abs=1e-4)  # least squares with a bias


def test_labels_of_any_whole_type_are_classes():
    lefts = [warm_head(net(), [(X, y)]) for y in (Y, Y.int(), Y.to(torch.uint8))]
    assert lefts[0] == lefts[1] == lefts[2]
    model = net(2)
    with torch.inference_mode():
        assert warm_head(model, [(X * 1, X[:, 0] > 0)]) < 0.69


def test_labels_that_fit_no_loss_are_refused_in_words():
    class Everywhere(nn.Linear):
        def forward(self, x):
            return super().forward(x.unsqueeze(1).expand(-1, 4, -1))

    model = nn.Sequential(Everywhere(6, 3), nn.Flatten()).double()
    with pytest.raises(
        ValueError, match=r"gives outputs of shape \(40, 4, 3\) for labels of shape \(40,\).*leave `warm_head` out"
    ):
        warm_head(model, [(X, Y)], "0")
    with pytest.raises(ValueError, match=r"one output cannot tell classes apart.*pass `loss=`"):
        warm_head(net(1), [(X, Y % 2)])
    with pytest.raises(ValueError, match="go from 0 to 3, and the head has 3 outputs"):
        warm_head(net(), [(X[:20], Y[:20]), (X, Y + 1)])
    with pytest.raises(ValueError, match=r"one row of logits for each label.*floats of 0 and 1"):
        warm_head(net(), [(X, torch.ones(40, 3).long())])
    with pytest.raises(ValueError, match="which are numbers"):
        warm_head(net(), [(X, X[:, 0])])
    with pytest.raises(ValueError, match="All labels are -100"):
        warm_head(net(), [(X, Y * 0 - 100)])
    with pytest.raises(TypeError, match="`data` must yield batches"):
        warm_head(net(), (X, Y))
    with pytest.raises(ValueError, match="no parameters that its output depends on"):
        warm_head(net(), [(X, Y)], "3")


# Distillation


def test_the_term_is_the_divergence_from_the_old_answers():
    model = net()
    keep = Distillation(model, weight=0.7, temperature=3.0)
    later = moved(model).eval()
    output = later(X)
    term = keep(X, output)
    with torch.no_grad():
        p = (copy.deepcopy(model).eval()(X) / 3).softmax(1)
    q = (output / 3).log_softmax(1)
    expected = 0.7 * 9 * (p * (p.log() - q)).sum(1).mean()
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(term, later[4].bias, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, later[4].bias)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert float(Distillation(model)(X, copy.deepcopy(model).eval()(X)).detach()) == 0


def test_the_old_model_is_a_copy_that_nothing_moves():
    model = net()
    keep = Distillation(model)
    with torch.no_grad():
        model[4].weight.add_(1)
    assert float(keep(X, model(X)).detach()) > 0
    assert not any(p.requires_grad for p in keep._old.parameters())


def test_adapters_are_switched_off_for_the_old_model_and_nothing_is_copied():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter, self.off = nn.Linear(6, 3).double(), nn.Linear(6, 3).double(), False

        def disable_adapter(self):
            from contextlib import contextmanager

            @contextmanager
            def off():
                self.off = True
                yield
                self.off = False

            return off()

        def forward(self, x):
            return self.base(x) if self.off else self.base(x) + self.adapter(x)

    model = Adapted()
    keep = Distillation(model, temperature=1.0)
    assert keep._old is None
    output = model(X)
    p = model.base(X).softmax(1).detach()
    expected = (p * (p.log() - output.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(keep(X, output).double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert model.training


@pytest.mark.parametrize("items", [None, 100])
def test_a_model_that_computes_its_loss_has_the_term_added_in_training_alone(items):
    model, batch = Encoder(nn.Linear(5, 4)), tokens()
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % 4, -100)
    keep = Distillation(model, temperature=1.0)
    model = moved(model)
    plain = model(**batch, labels=labels)
    with keep.in_loss(model):
        both = model(**batch, labels=labels, num_items_in_batch=items)
        model.eval()
        assert torch.equal(model(**batch, labels=labels)["loss"], plain["loss"])
        model.train()
        with torch.no_grad():
            assert torch.equal(model(**batch, labels=labels)["loss"], plain["loss"])
        with pytest.raises(RuntimeError, match="no loss that the term could be added to"):
            model(**batch)
    term = keep(batch, plain)
    share = 1 if items is None else int(batch["attention_mask"].sum()) / items
    torch.testing.assert_close(both["loss"], plain["loss"] + share * term)
    assert torch.equal(model(**batch, labels=labels)["loss"], plain["loss"])  # the hook is gone


def test_the_term_counts_by_the_micro_batchs_share_of_the_steps_labels():
    model, batch = Encoder(nn.Linear(5, 4)), tokens()
    keep = Distillation(model)
    model = moved(model)
    labels = torch.full((8, 5), -100)
    labels[:, 0], labels[:3, 1] = 1, 2  # 11 of 40
    plain = model(**batch, labels=labels)
    term = keep(batch, plain)
    assert float(term.detach()) > 0
    for first_counts, items, share in ((True, 11, 1), (True, torch.tensor(44), 0.25), (False, 3, 1)):
        with keep.in_loss(model, first_counts=first_counts):
            both = model(**batch, labels=labels, num_items_in_batch=items)
        torch.testing.assert_close(both["loss"], plain["loss"] + share * term)


def test_the_term_is_added_only_while_it_is_wanted():
    model, batch, wanted = Encoder(nn.Linear(5, 4)), tokens(), [True]
    keep, labels = Distillation(model), batch["input_ids"] % 4
    model = moved(model)
    with keep.in_loss(model, active=lambda: wanted[0]):
        with_term = model(**batch, labels=labels)["loss"]
        wanted[0] = False
        assert model(**batch, labels=labels)["loss"] < with_term
        assert model(**batch)["loss"] is None


def test_a_weight_or_temperature_out_of_range_is_refused():
    for wrong in ({"weight": -1}, {"temperature": 0}, {"weight": float("nan")}):
        with pytest.raises(ValueError, match="`weight` must be 0 or more"):
            Distillation(net(), **wrong)


# What comes into the last linear layer


def test_features_are_what_comes_into_the_last_linear_layer():
    model = net()
    snapshot = Snapshot(model, [X], read="features")
    with torch.no_grad():
        expected = copy.deepcopy(model[:4]).eval()(X)
    assert torch.equal(snapshot._before, expected)
    with torch.no_grad():
        model[4].weight.add_(3)  # the head may change
    assert snapshot.kept().neighbours == 1
    with torch.no_grad():
        model[0].weight.mul_(-torch.arange(8, dtype=torch.float64).unsqueeze(1))
    assert snapshot.kept().neighbours < 1
    with pytest.raises(ValueError, match="calls no linear layer"):
        Snapshot(nn.Tanh(), [X], read="features")


def pretrained(task):
    """A factory, as `--model` takes it."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, task.outputs))


def test_records_and_reports_of_models_from_elsewhere_have_what_is_left_of_their_features(tmp_path):
    stream = bench.split("digits", tasks=2)
    training = bench.Training(model=f"{__name__}:pretrained", lr=0.1)
    record = bench.run(stream, "finetune", training=training)
    model, inputs = pretrained(stream[0]), [part for e in stream for part in e.test.read()[0][:250].split(50)]
    before = Snapshot(model, inputs, read="features")
    assert before.kept().neighbours == 1
    assert [set(task) for task in record.preserved] == [{"similarity", "neighbours"}] * 2
    assert 0 < record.neighbours < 1
    path = record.save(tmp_path)
    assert bench.Record.load(path) == record
    assert "Neighbours kept" in report.write(tmp_path).with_suffix(".md").read_text()
    assert bench.run(stream, "finetune").preserved == []


def test_a_run_that_continues_has_the_same_figures(tmp_path):
    stream = bench.split("digits", tasks=3)
    training = bench.Training(model=f"{__name__}:pretrained", lr=0.1)
    whole = bench.run(stream, "finetune", training=training)

    def stop(_, tasks):
        if tasks == 2:
            raise KeyboardInterrupt

    place = tmp_path / "run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        bench.run(stream, "finetune", training=training, checkpoint=place, track=stop)
    again = bench.run(stream, "finetune", training=training, checkpoint=place)
    assert again.preserved == whole.preserved
    assert again.scores == whole.scores
