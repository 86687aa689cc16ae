"""Metrics against numbers computed by hand."""

import pytest

from rwalk.bench import metrics

A = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.75, 0.5, 0.85]]


def test_metrics_of_three_tasks():
    assert metrics.average_accuracy(A) == pytest.approx((0.75 + 0.5 + 0.85) / 3)
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
    assert metrics.average_accuracy([]) is None
    assert metrics.average_accuracy([[None]]) is None
    assert metrics.forward_transfer([[0.9, None], [0.8, 0.9]], [0.1, 0.1]) is None
    assert metrics.intransigence(A, A[:2]) is None
