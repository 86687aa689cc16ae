"""Metrics against numbers computed by hand."""

import pytest

from rwalk.bench import Record, metrics

A = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.75, 0.5, 0.85]]


def test_metrics_of_three_tasks():
    assert metrics.average(A) == pytest.approx((0.75 + 0.5 + 0.85) / 3)
    assert metrics.forgetting(A) == pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2)
    assert metrics.backward_transfer(A) == pytest.approx(((0.75 - 0.9) + (0.5 - 0.8)) / 2)
    assert metrics.forward_transfer(A, [0.1, 0.15, 0.05]) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.05)) / 2)
    joint = [[1.0, None, None], [0.9, 0.9, None], [0.95, 0.95, 0.95]]
    assert metrics.intransigence(A, joint) == pytest.approx(0.95 - 0.85)


def test_forgetting_takes_the_best_accuracy_before_the_last_task():
    assert metrics.forgetting([[0.5, None, None], [0.9, 0.6, None], [0.6, 0.6, 0.7]]) == pytest.approx(0.15)


def test_what_is_not_defined_is_none():
    assert metrics.forgetting([[0.9]]) is None
    assert metrics.backward_transfer([[0.9]]) is None
    assert metrics.average([]) is None
    assert metrics.average([[None]]) is None
    assert metrics.forward_transfer([[0.9, None], [0.8, 0.9]], [0.1, 0.1]) is None
    assert metrics.intransigence(A, A[:2]) is None


def test_errors_mean_the_same_as_gains_of_the_opposite_sign():
    """With each error e = 1 - accuracy all differences are the same, and the average error is what the accuracy leaves."""
    errors = [[None if a is None else 1 - a for a in row] for row in A]
    right, wrong = Record("m", "s", 0, A, [0.1, 0.15, 0.05]), Record("m", "s", 0, errors, [0.9, 0.85, 0.95], "error", False)
    for name in ("forgetting", "backward_transfer", "forward_transfer", "forgotten"):
        assert getattr(wrong, name) == pytest.approx(getattr(right, name)), name
    assert wrong.average == pytest.approx(1 - right.average)
    assert wrong.learned == pytest.approx(1 - right.learned)
    assert wrong.kept is None  # a share of an error that is left would say nothing
    joint = [[1.0, None, None], [0.9, 0.9, None], [0.95, 0.95, 0.95]]
    opposite = Record("joint", "s", 0, [[None if a is None else 1 - a for a in row] for row in joint], [], "error", False)
    assert wrong.intransigence(opposite) == pytest.approx(right.intransigence(Record("joint", "s", 0, joint)))
