"""The scikit-learn estimators: scikit-learn's own checks, the weights of a loop by hand, and less forgetting on real data."""

from copy import deepcopy
from functools import partial
from itertools import chain

import joblib
import numpy as np
import pytest
import torch

from cases import assert_same_state, batches, mlp, train

pytest.importorskip("sklearn", reason="needs scikit-learn: make test-integrations")

from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from rwalk import EWC, SI, Consolidator, RWalk
from rwalk.integrations.sklearn import RWalkClassifier, RWalkRegressor

MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
SAMPLED = RWalk(alpha=0.01, delta_t=3, fisher="example")


def toy(features, classes):
    """The network of the loops by hand."""
    assert (features, classes) == (5, 3)
    return mlp()


def classifier(rule=None, strength=None, **options):
    settings = {"module": toy, "optimizer": MOMENTUM, "lr": 0.1, "dtype": "float64", "batch_size": 99, "random_state": 0}
    return RWalkClassifier(rule, strength, **settings | options)


def by_hand(rule, strength, tasks, with_data=False):
    """Train in a loop of ours; consolidate after each task."""
    model = mlp()
    optimizer = MOMENTUM(model.parameters(), lr=0.1)
    memory = Consolidator(model, rule, strength).attach(optimizer)
    for task in tasks:
        train(model, optimizer, task)
        memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in task] if with_data else None)
    return memory


def assert_close(ours, theirs):
    """Demand the same weights and importance, but for the order in which a batch's examples are summed."""
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=1e-12)
    for name, value in theirs.anchor.importance().items():
        torch.testing.assert_close(ours.anchor.importance()[name], value, rtol=1e-9, atol=1e-12)


ESTIMATORS = [RWalkClassifier(), RWalkClassifier(RWalk(), dtype="float64"), RWalkClassifier(EWC(), 10.0)]
ESTIMATORS += [RWalkRegressor(), RWalkRegressor(EWC(), 10.0, dtype="float64")]


def but_for_rounding(estimator):
    """One check compares weighted with repeated examples to 1e-7, which float32 may miss."""
    narrow = estimator.dtype == "float32"
    return {"check_sample_weight_equivalence_on_dense_data": "rounds in float32"} if narrow else {}


# No other check is exempt. One, on libraries of arrays other than NumPy, is skipped by scikit-learn unless it is asked for.
@parametrize_with_checks(ESTIMATORS, expected_failed_checks=but_for_rounding)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize(("rule", "strength"), [(None, 0.5), (RWalk(delta_t=3), 1.0), (SAMPLED, 1.0), (SI(), 0.1)])
def test_small_calls_with_one_label_are_one_task_as_in_a_loop_by_hand(rule, strength):
    tasks = [batches(seed, 7) for seed in range(3)]
    ours = classifier(rule, strength)
    for label, task in zip("abc", tasks, strict=True):
        for x, y in task:
            ours.partial_fit(x, y, classes=range(3), task=label)
    assert ours.memory_.tasks == 2
    ours.consolidate()
    assert_close(ours.memory_, by_hand(rule, strength, tasks))


def test_fit_is_a_whole_task_and_a_rule_may_measure_on_its_data():
    (first,), (second,) = batches(0, 1, size=30), batches(1, 1, size=30)
    ours = classifier(EWC(), 5.0, epochs=4).fit(*first)
    ours.partial_fit(*second).partial_fit(*second).consolidate(*second)
    theirs = by_hand(EWC(), 5.0, [[first] * 4, [second] * 2], with_data=True)
    assert_close(ours.memory_, theirs)


def test_only_a_new_label_ends_a_task():
    (task,) = batches(0, 1)
    ours = classifier().partial_fit(*task, classes=[0, 1, 2])
    labels = [None, "a", "a", None, "a", "b", None]
    counts = [ours.partial_fit(*task, task=label).memory_.tasks for label in labels]
    assert counts == [0, 1, 1, 1, 1, 2, 2]
    assert ours.consolidate().partial_fit(*task, task="c").memory_.tasks == 3, "consolidated already"
    assert ours.fit(*task).memory_.tasks == 1, "anew"
    assert ours.partial_fit(*task, task="c").memory_.tasks == 1, "`fit` has ended its task"


class Recorder(torch.nn.Linear):
    """Writes down the first feature of what it is trained on."""

    def forward(self, x):
        if self.training:
            vars(self).setdefault("seen", []).append(x[:, 0].tolist())
        return super().forward(x)


def test_each_pass_takes_every_example_once_in_a_new_order_and_one_call_of_partial_fit_is_one_pass():
    x, y = np.arange(20, dtype=np.float32).reshape(10, 2)[::-1], np.array([0, 1] * 5)
    ours = RWalkClassifier(module=Recorder, epochs=2, batch_size=4, random_state=0).fit(x, y).partial_fit(x, y)
    assert [len(batch) for batch in ours.network_.seen] == [4, 4, 2] * 3
    passes = [list(chain(*ours.network_.seen[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(0, 20, 2)) for one in passes)
    assert len({*map(tuple, passes), tuple(x[:, 0])}) == 4, "an order came twice"


def test_options_go_to_the_consolidator():
    (x, y) = batches(0, 1)[0]
    ours = classifier(RWalk(), options={"pull": "proximal", "average": "tail"}).fit(x, y)
    assert (ours.memory_.pull, ours.memory_.average) == ("proximal", "tail")
    with pytest.raises(ValueError, match="pull"):
        ours.set_params(options={"pull": "push"}).fit(x, y)


def test_labels_may_be_words_and_classes_come_later():
    x = np.vstack([np.eye(4)] * 5)
    y = np.array(["north", "east", "south", "west"] * 5)
    early = np.isin(y, ["north", "east"])
    ours = RWalkClassifier(strength=0, lr=0.05, random_state=0)
    for _ in range(30):
        ours.partial_fit(x[early], y[early], classes=["west", "south", "east", "north"], task="early")
    assert ours.score(x[early], y[early]) == 1
    assert list(ours.classes_) == ["east", "north", "south", "west"]
    for _ in range(30):
        ours.partial_fit(x, y, task="all")
    assert list(ours.predict(x)) == list(y)
    np.testing.assert_allclose(ours.predict_proba(x).sum(1), 1)


def test_labels_that_were_not_announced_are_refused_before_anything_changes():
    (x, y), ours = batches(0, 1)[0], classifier()
    with pytest.raises(ValueError, match=r"labels \[0, 1, 2\] .* classes \[\]\. Begin anew .* as `classes`"):
        ours.partial_fit(x, y)
    with pytest.raises(ValueError, match=r"labels \[2\] .* classes \[0, 1\]"):
        ours.partial_fit(x, y, classes=[0, 1])
    ours.partial_fit(x, y, classes=[0, 1, 2], task="a")
    before = deepcopy(ours)
    for labels, more in ((y + 2, {}), (y, {"classes": [0, 3]})):
        with pytest.raises(ValueError, match=r"labels .*3.* classes \[0, 1, 2\]"):
            ours.partial_fit(x, labels, task="b", **more)
    with pytest.raises(ValueError, match="labels"):
        ours.consolidate(x, y + 1)
    assert_same_state(ours.memory_, before.memory_)
    assert torch.equal(ours.network_[0].weight, before.network_[0].weight)


@pytest.mark.parametrize(("spoil", "message"), [(lambda x: x * np.nan, "NaN"), (lambda x: x[:, :4], "4 features")])
def test_bad_inputs_train_nothing(spoil, message):
    (x, y), ours = batches(0, 1)[0], classifier()
    ours.partial_fit(x, y, classes=[0, 1, 2], task="a")
    before = deepcopy(ours)
    with pytest.raises(ValueError, match=message):
        ours.partial_fit(spoil(x), y, task="b")
    assert_same_state(ours.memory_, before.memory_)
    with pytest.raises(ValueError, match="NaN"):
        (fresh := clone(ours)).partial_fit(x * np.nan, y, classes=[0, 1, 2])
    assert not hasattr(fresh, "network_")


def test_a_rule_that_measures_on_data_is_not_ended_without_it():
    (x, y), ours = batches(0, 1)[0], classifier(EWC())
    ours.partial_fit(x, y, classes=[0, 1, 2], task="a")
    before = deepcopy(ours)
    with pytest.raises(ValueError, match="consolidate"):
        ours.partial_fit(x, y, task="b")
    assert_same_state(ours.memory_, before.memory_)
    assert ours.consolidate(x, y).partial_fit(x, y, task="b").memory_.tasks == 1
    with pytest.raises(NotFittedError):
        clone(ours).consolidate()


@pytest.mark.parametrize("rule", [None, RWalk(delta_t=3), SAMPLED])
def test_a_file_of_joblib_continues_in_the_middle_of_a_task_exactly(rule, tmp_path):
    first, second, third = (np.float32(batches(seed, 1, size=50)[0][0]) for seed in range(3))
    y = batches(0, 1, size=50)[0][1]
    ours = RWalkClassifier(rule, hidden=(8,), batch_size=7, random_state=0).partial_fit(first, y, [0, 1, 2], task=0)
    ours.partial_fit(second, y, task=1)
    joblib.dump(ours, tmp_path / "classifier")
    theirs = joblib.load(tmp_path / "classifier")
    for one in (ours, theirs):
        one.partial_fit(second, y, task=1).partial_fit(third, y, task=2)
    assert ours.memory_.tasks == 2
    assert_same_state(ours.memory_, theirs.memory_)
    np.testing.assert_array_equal(ours.predict_proba(third), theirs.predict_proba(third))


def test_random_state_decides_everything_and_disturbs_nobody():
    (x, y) = batches(0, 1, size=40)[0]

    def learned(seed):
        torch.rand(1)
        before = torch.get_rng_state()
        ours = RWalkClassifier(epochs=2, batch_size=8, random_state=seed).fit(x, y).partial_fit(x, y)
        assert torch.equal(before, torch.get_rng_state())
        return ours

    one, same, other = (learned(seed) for seed in (3, 3, 4))
    assert_same_state(one.memory_, same.memory_)
    assert not np.array_equal(one.predict_proba(x), other.predict_proba(x))


def noisy(features, classes):
    return torch.nn.Sequential(
        torch.nn.Linear(features, 20), torch.nn.BatchNorm1d(20), torch.nn.Dropout(0.5), mlp_head(classes)
    )


def mlp_head(classes):
    return torch.nn.Linear(20, classes)


def test_own_networks_train_with_dropout_and_predict_without():
    (x, y) = batches(0, 1, size=40)[0]
    ours = RWalkClassifier(module=noisy, batch_size=20, random_state=0).fit(x, y)
    np.testing.assert_array_equal(ours.predict_proba(x), ours.predict_proba(x))
    mean = ours.network_[1].running_mean.clone()
    ours.partial_fit(x + 1, y)
    assert not torch.equal(ours.network_[1].running_mean, mean), "in training mode again"


def test_a_last_batch_of_one_example_joins_the_one_before():
    (x, y) = batches(0, 1, size=41)[0]
    sizes = []

    class Counting(torch.nn.Sequential):
        def forward(self, x):
            sizes.extend([len(x)] if self.training else [])
            return super().forward(x)

    RWalkClassifier(module=lambda *shape: Counting(*noisy(*shape)), batch_size=20, epochs=2, random_state=0).fit(x, y)
    assert sizes == [20, 21, 20, 21]


def test_grid_search_over_rules_in_a_pipeline_with_named_columns():
    pandas = pytest.importorskip("pandas")
    X, y = load_digits(return_X_y=True, as_frame=True)
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), RWalkClassifier(epochs=5, random_state=0))
    grid = {"rwalkclassifier__rule": [None, RWalk()], "rwalkclassifier__lr": [0.0, 0.003]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X[:600], y[:600])
    assert search.best_params_["rwalkclassifier__lr"] == 0.003
    assert search.score(X[600:], y[600:]) > 0.8
    fitted = search.best_estimator_[-1]
    assert list(fitted.feature_names_in_) == list(X.columns)
    with pytest.raises(ValueError, match="feature names"):
        fitted.partial_fit(pandas.DataFrame(X, columns=X.columns[::-1]), y)


@pytest.mark.parametrize("seed", range(3))
def test_less_is_forgotten_of_digits_with_shuffled_pixels(seed):
    """RWalk as published against the same training at strength 0."""
    X, y = load_digits(return_X_y=True)
    X, unseen, y, truth = train_test_split(X / 16, y, random_state=0)
    shuffled = [np.random.default_rng([seed, task]).permutation(64) for task in range(3)]
    score = {}
    for strength in (0.0, 1.0):
        ours = RWalkClassifier(RWalk(), strength, hidden=(256, 256), optimizer=torch.optim.SGD, lr=0.1, batch_size=10)
        ours.set_params(random_state=seed)
        for task, pixels in enumerate(shuffled):
            for _ in range(3):
                ours.partial_fit(X[:, pixels], y, classes=range(10), task=task)
        score[strength] = [ours.score(unseen[:, pixels], truth) for pixels in shuffled]
    assert score[1.0][0] > score[0.0][0] + 0.05, score
    assert np.mean(score[1.0]) > np.mean(score[0.0]), score
