"""Streams: what each task contains, computed another way."""

import numpy as np
import pytest
import torch

from rwalk import bench
from rwalk.bench.data import DataSet, load
from rwalk.bench.experience import check, make, parse, rotate


def test_split_divides_classes_and_loses_no_example():
    stream = bench.split("digits", tasks=4)
    assert [e.classes for e in stream] == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    data = load("digits")
    assert sum(len(e.train) for e in stream) == len(data.train_y)
    for e in stream:
        for part in (e.train, e.test):
            _, y = part.read()
            assert set(y.tolist()) == set(e.classes)
    x, y = stream[2].train.read()
    keep = (data.train_y == 6) | (data.train_y == 7)
    assert torch.equal(x, data.train_x[keep])
    assert torch.equal(y, data.train_y[keep])


def test_domain_incremental_split_shares_labels():
    stream = bench.split("digits", tasks=5, scenario="domain")
    for task, e in enumerate(stream):
        assert e.classes == (0, 1)
        assert e.outputs == 2
        assert set(e.train.read()[1].tolist()) == {0, 1}
        assert len(e.test) == len(bench.split("digits")[task].test)


def test_permutations_differ_by_task_and_seed_and_keep_the_pixels():
    stream, again, other = (bench.permuted("digits", tasks=3, seed=s) for s in (0, 0, 1))
    x = load("digits").test_x
    seen = [e.test.read()[0] for e in stream]
    assert all(torch.equal(a, e.test.read()[0]) for a, e in zip(seen, again, strict=True))
    assert not torch.equal(seen[0], other[0].test.read()[0])
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(s.flatten(1).sort(1).values, x.flatten(1).sort(1).values) for s in seen)
    first, second = (e.test.read()[0].flatten(1) for e in stream[:2])
    moved = [(column == first.T).all(1).nonzero().flatten().tolist() for column in second.T]
    assert all(moved)
    train = stream[0].train.read()[0].flatten(1)
    base = load("digits").train_x.flatten(1)
    order = [next(i for i in range(64) if torch.equal(base[:, i], train[:, j])) for j in range(5)]
    assert all(torch.equal(x.flatten(1)[:, i], first[:, j]) for j, i in enumerate(order))


def test_rotation_by_right_angles_is_numpys():
    x = torch.rand(2, 1, 6, 6)
    for turns in range(4):
        expected = np.rot90(x.numpy(), turns, axes=(2, 3))
        np.testing.assert_allclose(rotate(x, 90.0 * turns).numpy(), expected, atol=1e-5)
    wide = torch.zeros(1, 1, 5, 9)
    wide[0, 0, 2, 4] = 1
    assert rotate(wide, 37.0)[0, 0, 2, 4] == pytest.approx(1, abs=1e-5)
    wide[0, 0, 2, 6] = 1
    assert rotate(wide, 90.0)[0, 0, 0, 4] == pytest.approx(1, abs=1e-4)


def test_rotated_streams_turn_further_with_each_task():
    stream = bench.rotated("digits", tasks=4, degrees=360)
    x = load("digits").test_x
    for task, e in enumerate(stream):
        assert torch.allclose(e.test.read()[0], torch.rot90(x, task, (2, 3)), atol=1e-5)
        assert e.classes == tuple(range(10))


@pytest.mark.parametrize("call", [
    lambda: bench.split("digits", tasks=11),
    lambda: bench.split("digits", tasks=0),
    lambda: bench.split("digits", tasks=3, scenario="domain"),
    lambda: bench.split("digits", scenario="both"),
    lambda: bench.permuted("digits", tasks=0),
    lambda: bench.rotated("digits", tasks=-1),
    lambda: bench.rotated(DataSet("t", *(torch.zeros(2, 3), torch.zeros(2).long()) * 2, ("a",))),
    lambda: parse("digits"),
    lambda: parse("split-"),
    lambda: make("permuted", "digits", scenario="class"),
    lambda: check([]),
    lambda: check([*bench.split("digits"), *bench.permuted("digits")]),
])  # fmt: skip
def test_impossible_streams(call):
    with pytest.raises(ValueError, match=r"Got .* Expected .*\. [A-Z].*"):
        call()
