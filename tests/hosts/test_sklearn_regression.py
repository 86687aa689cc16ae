"""The scikit-learn regressor: the weights of a loop by hand, importance against NumPy, and less forgetting on real data."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state

pytest.importorskip("sklearn", reason="needs scikit-learn: make test-integrations")

from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_digits
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from rwalk import EWC, MAS, SI, Consolidator, Kronecker, OnlineEWC, RWalk
from rwalk.integrations.sklearn import RWalkRegressor


def net(features, outputs):
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(features, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs))


def regression(seed, size=12, outputs=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4))
    return x, np.tanh(x @ rng.normal(size=(4, outputs))) + 0.1 * rng.normal(size=(size, outputs))


def make(rule=None, strength=None, **options):
    """A regressor whose steps see all examples at once."""
    settings = {"module": net, "optimizer": torch.optim.SGD, "lr": 0.1, "dtype": "float64", "batch_size": 999}
    return RWalkRegressor(rule, strength, **settings | {"random_state": 0} | options)


SAMPLED = RWalk(alpha=0.01, delta_t=3, fisher="example")


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("rule", [None, RWalk(delta_t=3), SAMPLED, SI(xi=1.0), EWC()], ids=repr)
def test_tasks_are_learned_as_in_a_loop_by_hand(rule, outputs):
    tasks = [regression(seed, outputs=outputs) for seed in range(3)]
    ours = make(rule, 0.05)
    model = net(4, outputs).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule, 0.05).attach(optimizer)
    for label, (x, y) in enumerate(tasks):
        for _ in range(7):
            ours.partial_fit(x, y if outputs > 1 else y[:, 0], task=label)
            optimizer.zero_grad()
            F.mse_loss(model(torch.tensor(x)), torch.tensor(y)).backward()
            optimizer.step()
        ours.consolidate(x, y)
        memory.consolidate([(torch.tensor(x), torch.tensor(y))], loss=F.mse_loss)
    assert ours.memory_.tasks == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.network_.state_dict()[name], value, rtol=0, atol=1e-12)
    for name, value in memory.anchor.importance().items():
        torch.testing.assert_close(ours.memory_.anchor.importance()[name], value, rtol=1e-9, atol=1e-12)


def second_moments(of, x):
    """The mean over examples of `of`, (examples, outputs), times the squared inputs: a linear model's (outputs, inputs)."""
    return np.einsum("no,ni->oi", of, x**2) / len(x)


TARGETS = {
    "numbers": lambda y: y,
    "one": lambda y: y[:, 0],
    "yes or no": lambda y: (y > 0) * 1.0,
    "whole": lambda y: np.round(3 * y),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("labels", ["exact", "true", "sample", "output"])
@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_the_fisher_information_is_that_of_a_normal_distribution_of_variance_one(kind, labels, targets):
    """Of a linear model, z = W x + b: the mean of x_j^2 for each output, and of (z - y)^2 x_j^2 with the data's targets."""
    size = 3000 if labels in ("sample", "output") else 40  # where random numbers are drawn
    x, y = regression(0, size)
    y = TARGETS[targets](y)
    ours = make(kind(labels=labels), module=torch.nn.Linear, lr=0.0, epochs=1).fit(x, y)
    with torch.no_grad():
        errors = ours.network_(torch.tensor(x)).numpy() - y.reshape(size, -1)
    scores = errors**2 if labels == "true" else np.ones_like(errors)
    found = ours.memory_.anchor.importance()
    rtol = 1e-9 if size == 40 else 0.2
    np.testing.assert_allclose(found["weight"], second_moments(scores, x), rtol=rtol)
    np.testing.assert_allclose(found["bias"], scores.mean(0), rtol=rtol)


def test_memory_aware_synapses_need_no_distribution():
    """The mean of |2 z_o x_j|."""
    x, y = regression(0)
    ours = make(MAS(), module=torch.nn.Linear, lr=0.0, epochs=1).fit(x, y)
    with torch.no_grad():
        z = ours.network_(torch.tensor(x)).numpy()
    found = ours.memory_.anchor.importance()
    np.testing.assert_allclose(found["weight"], np.einsum("no,ni->oi", abs(2 * z), abs(x)) / len(x))
    np.testing.assert_allclose(found["bias"], abs(2 * z).mean(0))


@pytest.mark.parametrize("labels", ["exact", "true"])
def test_kronecker_factors_on_data_are_those_of_a_normal_distribution(labels):
    """In the task's own unit: the diagonal is that of G x A up to one factor, G the identity or the mean of e e^T."""
    x, y = regression(0, 40)
    rule = Kronecker(measure="data", labels=labels, share=1.0, rank=None)
    ours = make(rule, module=torch.nn.Linear, lr=0.0, epochs=1).fit(x, y)
    with torch.no_grad():
        errors = ours.network_(torch.tensor(x)).numpy() - y
    outputs = (errors**2).mean(0) if labels == "true" else np.ones(2)
    truth = np.outer(outputs, np.append((x**2).mean(0), 1.0))
    found = ours.memory_.anchor.importance()
    found = np.column_stack([found["weight"], found["bias"]])
    np.testing.assert_allclose(found / found.mean(), truth / truth.mean(), rtol=1e-9)


def test_targets_keep_their_shape_and_the_score_is_the_coefficient_of_determination():
    x, y = regression(0, 50)
    both = make(lr=0.05, epochs=200).fit(x, y)
    assert both.predict(x).shape == (50, 2)
    assert both.score(x, y) == pytest.approx(r2_score(y, both.predict(x)))
    assert both.score(x, y) > 0.8
    one = make(lr=0.05, epochs=200).fit(x, y[:, 0])
    column = make(lr=0.05, epochs=200).fit(x, y[:, :1])
    assert (one.predict(x).shape, column.predict(x).shape) == ((50,), (50, 1))
    np.testing.assert_array_equal(one.predict(x), column.predict(x)[:, 0])
    narrow = make(dtype="float32").fit(x, y[:, 0].astype(int))
    assert next(narrow.network_.parameters()).dtype == torch.float32
    assert np.isfinite(narrow.predict(x)).all()


def test_targets_that_do_not_fit_the_first_ones_are_refused_before_anything_changes():
    x, y = regression(0)
    ours = make().partial_fit(x, y, task="a")
    before = deepcopy(ours)
    for call in (lambda y: ours.partial_fit(x, y, task="b"), lambda y: ours.consolidate(x, y)):
        with pytest.raises(ValueError, match="`y` has 1 targets for each example, and had 2 in the first call"):
            call(y[:, 0])
        with pytest.raises(ValueError, match="NaN"):
            call(y * np.nan)
    assert_same_state(ours.memory_, before.memory_)
    assert torch.equal(ours.network_[0].weight, before.network_[0].weight)


def flat(features, outputs):
    """Return one number for each example, without a dimension for outputs."""
    assert outputs
    return torch.nn.Sequential(torch.nn.Linear(features, 1), torch.nn.Flatten(0))


@pytest.mark.parametrize("rule", [None, EWC(), EWC(labels="true"), MAS()], ids=repr)
def test_a_network_of_numbers_without_a_dimension_for_outputs_is_the_same(rule):
    x, y = regression(0, outputs=1)
    one, other = (make(rule, module=kind, epochs=9, random_state=4).fit(x, y[:, 0]) for kind in (flat, torch.nn.Linear))
    np.testing.assert_allclose(one.predict(x), other.predict(x), rtol=1e-12)
    for mine, plain in zip(one.memory_.anchor.importance().values(), other.memory_.anchor.importance().values(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


def test_a_network_of_other_outputs_is_refused():
    x, y = regression(0)
    with pytest.raises(ValueError, match=r"returned shape \(12, 3\) for targets of shape \(12, 2\)\. Let `module` return 2"):
        make(module=lambda features, outputs: net(features, outputs + 1)).fit(x, y)
    with pytest.raises(ValueError, match=r"returned shape \(12,\) for targets of shape \(12, 2\)"):
        make(module=flat).fit(x, y)


@pytest.mark.parametrize("seed", range(2))
def test_less_is_forgotten_of_digits_read_as_numbers_with_shuffled_pixels(seed):
    """The default against the same training at strength 0, targets standardised by scikit-learn."""
    X, y = load_digits(return_X_y=True)
    X, unseen, y, truth = X[:600] / 16, X[600:] / 16, y[:600], y[600:]
    shuffled = [np.random.default_rng([seed, task]).permutation(64) for task in range(3)]
    mixed, task = np.concatenate([X[:, pixels] for pixels in shuffled]), np.repeat(range(3), len(X))
    score = {}
    for strength in (0.0, 0.1):
        one = RWalkRegressor(strength=strength, optimizer=torch.optim.SGD, lr=0.05, batch_size=10, epochs=5, random_state=seed)
        ours = TransformedTargetRegressor(one, transformer=StandardScaler()).fit(mixed, np.tile(y, 3), task=task)
        score[strength] = [ours.score(unseen[:, pixels], truth) for pixels in shuffled]
    assert score[0.1][0] > score[0.0][0] + 0.1, score
    assert np.mean(score[0.1]) > np.mean(score[0.0]), score
