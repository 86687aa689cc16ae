"""Several tasks in one `fit`, weights of examples, and the parameters of a rule, as scikit-learn's own tools use them."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from cases import assert_same_state, batches, mlp

pytest.importorskip("sklearn", reason="needs scikit-learn: make test-integrations")

import sklearn
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from rwalk import EWC, MAS, SI, Consolidator, Kronecker, RWalk
from rwalk.integrations.sklearn import RWalkClassifier, RWalkRegressor


def small(features, outputs):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(features, 7), torch.nn.Tanh(), torch.nn.Linear(7, outputs))


def make(kind=RWalkClassifier, rule=None, strength=None, **options):
    """An estimator whose steps see all examples at once."""
    settings = {"module": small, "optimizer": torch.optim.SGD, "lr": 0.1, "dtype": "float64", "batch_size": 999, "epochs": 12}
    return kind(rule, strength, **settings | {"random_state": 0} | options)


def three_tasks(size=20):
    """Examples of three tasks, in no order."""
    x, y = (np.concatenate(column) for column in zip(*(batches(seed, 1, size)[0] for seed in range(3)), strict=True))
    task = np.repeat([2, 0, 1], size)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], y[order], task[order]


def assert_close(ours, theirs, rtol=1e-9):
    """Demand the same weights and importance, but for the order in which a batch's examples are summed."""
    for name, value in theirs.memory_.model.state_dict().items():
        torch.testing.assert_close(ours.memory_.model.state_dict()[name], value, rtol=rtol, atol=1e-11)
    for name, value in theirs.memory_.anchor.importance().items():
        torch.testing.assert_close(ours.memory_.anchor.importance()[name], value, rtol=rtol, atol=1e-11)


def shuffled_digits(tasks=3, rows=450):
    """Digits whose pixels are in another order in each task, the tasks' rows mixed."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    X = np.concatenate([X[:rows, rng.permutation(64)] / 16 for _ in range(tasks)])
    order = rng.permutation(len(X))
    return X[order], np.tile(y[:rows], tasks)[order], np.repeat(np.arange(tasks), rows)[order]


@pytest.mark.parametrize("kind", [RWalkClassifier, RWalkRegressor])
@pytest.mark.parametrize("rule", [None, RWalk(delta_t=3), SI(), EWC(), MAS()], ids=repr)
def test_tasks_in_one_fit_are_learned_in_ascending_order_as_in_a_loop_by_hand(kind, rule):
    x, y, task = three_tasks()
    ours = make(kind, rule, 0.5).fit(x, y, task)
    model = small(5, 3 if kind is RWalkClassifier else 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule, 0.5).attach(optimizer)
    for label in range(3):
        inputs, targets = torch.tensor(x[task == label]), torch.tensor(y[task == label])
        targets = targets if kind is RWalkClassifier else targets.double().unsqueeze(1)
        loss = F.cross_entropy if kind is RWalkClassifier else F.mse_loss
        for _ in range(12):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
        memory.consolidate([(inputs, targets)], loss=None if kind is RWalkClassifier else F.mse_loss)
    assert ours.memory_.tasks == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.network_.state_dict()[name], value, rtol=0, atol=1e-12)
    for name, value in memory.anchor.importance().items():
        torch.testing.assert_close(ours.memory_.anchor.importance()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels", [["c", "a", "b"], [7.5, -1.0, 3.0], "pandas", "dates"])
def test_labels_of_tasks_may_be_anything_that_can_be_put_in_order(labels):
    x, y, task = three_tasks()
    if isinstance(labels, str):
        pandas = pytest.importorskip("pandas")
        days = pandas.to_datetime(["2024-03-01", "2024-01-01", "2024-02-01"])
        named = pandas.Series(["c", "a", "b"] if labels == "pandas" else days)[[1, 2, 0]].reset_index(drop=True)[task]
    else:
        named = np.sort(labels)[task].tolist()
    assert_same_state(make().fit(x, y, named).memory_, make().fit(x, y, task=task).memory_)


def test_one_task_is_what_no_task_is():
    x, y, _ = three_tasks()
    one = make().fit(x, y, task=["only"] * len(x))
    assert_same_state(one.memory_, make().fit(x, y).memory_)
    assert one.memory_.tasks == 1
    assert one.partial_fit(x, y, task="next").memory_.tasks == 1, "`fit` has ended its tasks"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ([0, 1], r"`task` has shape \(2,\), and not one entry for each of the 60 examples"),
        (3, r"`task` has shape \(\), .* or call `partial_fit` with one label"),
        (np.zeros((60, 1)), r"`task` has shape \(60, 1\)"),
        ([0.0] * 59 + [np.nan], "missing entries"),
        ([None] + ["a"] * 59, "missing entries, or some that cannot be put in order"),
    ],
)
def test_tasks_that_do_not_fit_the_examples_are_refused_before_anything_changes(task, message):
    x, y, _ = three_tasks()
    ours = make().fit(x, y)
    before = deepcopy(ours)
    with pytest.raises(ValueError, match=message):
        ours.fit(x, y, task=task)
    with pytest.raises(ValueError, match="`task` is a `list`, and `partial_fit` takes one label"):
        ours.partial_fit(x, y, task=[0] * 60)
    assert_same_state(ours.memory_, before.memory_)
    assert torch.equal(ours.network_[0].weight, before.network_[0].weight)


def test_a_grid_search_over_strengths_learns_the_tasks_of_each_fold():
    """Each strength is judged after all tasks, on the examples of all that were left out."""
    X, y, task = shuffled_digits()
    ours = RWalkClassifier(optimizer=torch.optim.SGD, lr=0.1, batch_size=10, epochs=4, random_state=0)
    search = GridSearchCV(ours, {"strength": [0.0, 0.1]}, cv=2).fit(X, y, task=task)
    plain, held = search.cv_results_["mean_test_score"]
    assert held > plain + 0.05, (plain, held)
    assert search.best_params_ == {"strength": 0.1}
    best = search.best_estimator_
    assert best.memory_.tasks == 3
    assert_same_state(best.memory_, clone(best).fit(X, y, task).memory_)


def test_a_cross_validation_gives_each_fold_its_own_tasks_also_by_metadata_routing():
    X, y, task = shuffled_digits(2, 60)
    weight = np.random.default_rng(1).integers(0, 3, len(X)).astype(float)
    ours, folds = RWalkClassifier(hidden=(20,), epochs=2, random_state=0), KFold(2, shuffle=True, random_state=0)
    found = cross_validate(ours, X, y, cv=folds, params={"task": task, "sample_weight": weight}, return_estimator=True)
    with sklearn.config_context(enable_metadata_routing=True):
        asking = make_pipeline(StandardScaler(with_mean=False, with_std=False), clone(ours).set_fit_request(task=True))
        routed = cross_validate(asking, X, y, cv=folds, params={"task": task}, return_estimator=True)
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError, match="task"):
            cross_validate(ours, X, y, cv=folds, params={"task": task}, error_score="raise")
    for fold, (rows, _) in enumerate(folds.split(X)):
        expected = clone(ours).fit(X[rows], y[rows], task[rows], weight[rows])
        assert_same_state(found["estimator"][fold].memory_, expected.memory_)
        assert expected.memory_.tasks == 2
        last = routed["estimator"][fold][-1]
        assert_same_state(last.memory_, clone(ours).fit(X[rows], y[rows], task[rows]).memory_)


@pytest.mark.parametrize("kind", [RWalkClassifier, RWalkRegressor])
@pytest.mark.parametrize("rule", [RWalk(delta_t=3), SI(xi=1e-2)], ids=repr)
def test_whole_weights_are_repeated_examples_where_a_step_sees_them_all(kind, rule):
    x, y, task = three_tasks()
    weight = np.random.default_rng(2).integers(0, 4, len(x))
    weighted = make(kind, rule, 0.05).fit(x, y, task, sample_weight=weight * 0.3)
    x, y, task = (np.repeat(column, weight, axis=0) for column in (x, y, task))
    assert_close(weighted, make(kind, rule, 0.05).fit(x, y, task), rtol=1e-6)


@pytest.mark.parametrize("rule", [None, RWalk(), EWC(), Kronecker(measure="data")], ids=repr)
def test_examples_of_weight_zero_are_left_out_and_equal_weights_are_none(rule):
    x, y, task = three_tasks()
    one = make(rule=rule, batch_size=7, epochs=2)
    counts = (np.arange(len(x)) % 3 > 0) & ((task != 1) | (np.arange(len(x)) < 30))
    left = clone(one).fit(x[counts], y[counts], task[counts])
    assert_same_state(clone(one).fit(x, y, task, counts * 2.5).memory_, left.memory_)
    assert_same_state(clone(one).fit(x, y, task, np.full(len(x), 0.1)).memory_, clone(one).fit(x, y, task).memory_)
    alone = clone(one).fit(x, y, task, (task == 2) * 1.0)
    assert alone.memory_.tasks == 1, "tasks without an example that counts are none"


def test_a_batchs_loss_is_the_weighted_mean_over_its_examples():
    (x, y), weight = batches(0, 1, 6)[0], np.array([1, 2, 3, 1e-3, 0.5, 7])
    ours = make(strength=0).partial_fit(x, y, [0, 1, 2], sample_weight=weight)
    model = small(5, 3).double()
    loss = F.cross_entropy(model(torch.tensor(x)), torch.tensor(y), reduction="none")
    grads = torch.autograd.grad((loss * torch.tensor(weight)).sum() / weight.sum(), list(model.parameters()))
    for mine, start, grad in zip(ours.network_.parameters(), model.parameters(), grads, strict=True):
        torch.testing.assert_close(mine, start - 0.1 * grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("call", ["fit", "consolidate"])
def test_rules_that_measure_on_data_see_examples_as_often_as_their_weights_say(call):
    """Example j alone has input j, so the Fisher information of a linear model's weight j counts how often it was seen."""
    weight, seen = np.array([1, 2, 0, 4, 0.5, 0.25, 2.25]), []
    x, y = np.eye(7), np.arange(7.0)
    for seed in range(60):
        ours = make(RWalkRegressor, EWC(), module=torch.nn.Linear, epochs=1, random_state=seed)
        ours.fit(x, y, sample_weight=weight) if call == "fit" else ours.partial_fit(x, y).consolidate(x, y, weight)
        seen.append(ours.memory_.anchor.importance()["weight"][0].numpy())
    share = weight / weight.sum()
    counts = np.array(seen) * 6  # as many as count at all
    np.testing.assert_allclose(counts.sum(1), 6)
    assert (np.abs(counts - 6 * share) < 1).all()
    np.testing.assert_allclose(np.mean(seen, 0), share, atol=0.04)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, 2.0], r"`sample_weight` has shape \(2,\), and not one weight for each of the 60 examples"),
        ([1.0] * 59 + [-1], "negative for no example"),
        ([1.0] * 59 + [np.inf], "must be finite"),
        ([0.0] * 60, "not zero for all"),
    ],
)
def test_weights_that_mean_nothing_are_refused_before_anything_changes(weight, message):
    x, y, _ = three_tasks()
    for call in (make().fit, make().partial_fit):
        more = {"classes": [0, 1, 2]} if call.__name__ == "partial_fit" else {}
        with pytest.raises(ValueError, match=message):
            call(x, y, sample_weight=weight, **more)
        assert not hasattr(call.__self__, "memory_")


def test_an_ensemble_weights_the_examples_it_draws():
    X, y = load_digits(return_X_y=True)
    member = RWalkClassifier(EWC(), hidden=(30,), lr=0.01, epochs=5)
    both = BaggingClassifier(member, 2, random_state=0).fit(X[:300], y[:300])
    assert both.score(X[300:600], y[300:600]) > 0.7


def test_the_parameters_of_a_rule_are_parameters_of_the_estimator():
    rule = RWalk(alpha=0.3)
    ours = RWalkClassifier(rule, 2.0)
    deep = ours.get_params()
    assert {name: deep[f"rule__{name}"] for name in ("alpha", "delta_t", "eps", "fisher")} == vars(rule)
    assert not any(name.startswith("rule__") for name in ours.get_params(deep=False))
    assert ours.set_params(rule__alpha=0.5, rule__delta_t=4, lr=0.1) is ours
    assert ours.rule == RWalk(alpha=0.5, delta_t=4)
    assert rule == RWalk(alpha=0.3), "the rule that was given is somebody else's"
    assert clone(ours).rule == ours.rule
    assert ours.set_params(rule__samples=5, rule=EWC()).rule == EWC(samples=5)
    pipeline = make_pipeline(StandardScaler(), ours).set_params(rwalkclassifier__rule__labels="true")
    assert pipeline[-1].rule == EWC(labels="true", samples=5)
    assert RWalkRegressor().set_params(rule__rank=8).rule == Kronecker(rank=8)
    assert RWalkRegressor().get_params()["rule__rank"] == 32


def test_parameters_that_a_rule_does_not_have_or_take_are_refused_and_change_nothing():
    ours = RWalkClassifier(RWalk(), 2.0)
    with pytest.raises(ValueError, match=r"Invalid parameter 'alfa' for estimator RWalk\(.*Valid parameters are: \['alpha', "):
        ours.set_params(lr=0.5, rule__alfa=0.5)
    with pytest.raises(ValueError, match=r"Invalid parameter 'rules' for estimator RWalkClassifier\("):
        ours.set_params(rules__alpha=0.5)
    with pytest.raises(ValueError, match="`alpha` of RWalk must be a number"):
        ours.set_params(lr=0.5, rule__alpha=5)
    with pytest.raises(ValueError, match="Invalid parameter 'alpha' for estimator none"):
        ours.set_params(rule="none", rule__alpha=0.5)
    assert (ours.rule, ours.lr) == (RWalk(), 0.001)


def test_a_grid_search_over_the_parameters_of_rules():
    X, y, task = shuffled_digits(2, 60)
    grid = [{"rule": [RWalk()], "rule__alpha": [0.1, 0.9]}, {"rule__rank": [4]}]
    search = GridSearchCV(RWalkClassifier(hidden=(20,), epochs=1, random_state=0), grid, cv=2).fit(X, y, task=task)
    assert len(search.cv_results_["params"]) == 3
    assert search.best_estimator_.memory_.rule in (RWalk(alpha=0.1), RWalk(), Kronecker(rank=4))


def test_own_networks_get_the_number_of_outputs():
    (x, y) = batches(0, 1)[0]
    ours = make(module=lambda features, outputs: mlp() if (features, outputs) == (5, 3) else None).fit(x, y)
    assert [type(m).__name__ for m in ours.network_] == ["Linear", "Tanh", "Linear"]
