"""Streams: what each task contains, computed another way."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rwalk import bench
from rwalk.bench import builtin
from rwalk.bench.builtin import make, parse, rotate
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from rwalk.bench.streams import check
from rwalk.cli.options import parse as parsed
from rwalk.cli.run import describe

SHARED = Path(os.environ.get("RWALK_DATA") or Path(__file__).parents[3] / "shared" / "data")


def places():
    """Six examples of four classes in three domains, one of each for testing."""
    x, y, at = torch.arange(6.0).reshape(6, 1), torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([2, 0, 2, 1, 1, 0])
    return DataSet("places", x, y, x[:5], y[:5], tuple("abcd"), 0, at, at[:5], ("north", "east", "south"))


def characters():
    x, at = torch.randint(256, (4, 9)), torch.tensor([0, 1, 0, 1])
    return DataSet("c", x[:, :-1], x[:, 1:], x[:, :-1], x[:, 1:], tuple(map(chr, range(256))), 256, at, at, ("a", "b"))


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
    lambda: bench.domain("digits"),
    lambda: bench.domain(load("digits")),
    lambda: bench.domain(places(), tasks=4),
    lambda: bench.domain(places(), tasks=0),
    lambda: bench.domain(places(), scenario="both"),
    lambda: bench.domain(characters(), scenario="class"),
    lambda: bench.split(characters()),
    lambda: bench.permuted(characters()),
    lambda: bench.drift("digits", tasks=0),
    lambda: bench.drift("digits", tasks=400),
    lambda: check([]),
    lambda: check([*bench.split("digits"), *bench.permuted("digits")]),
])  # fmt: skip
def test_impossible_streams(call):
    with pytest.raises(ValueError, match=r"^[A-Z0-9`].*\.$"):
        call()


@pytest.mark.parametrize(("scenario", "classes"), [
    ("domain", [(0, 1, 2, 3)] * 3), ("class", [(1, 3), (2, 3), (0, 1)]), ("task", [(1, 3), (2, 3), (0, 1)]),
])  # fmt: skip
def test_each_domain_is_a_task(scenario, classes):
    stream = bench.domain(places(), scenario=scenario)
    assert [e.classes for e in stream] == classes
    assert [e.train.read()[0].flatten().tolist() for e in stream] == [[1, 5], [3, 4], [0, 2]]
    assert [e.train.read()[1].tolist() for e in stream] == [[1, 3], [2, 3], [0, 1]]
    assert [e.test.read()[0].flatten().tolist() for e in stream] == [[1], [3, 4], [0, 2]]
    assert {e.outputs for e in stream} == {4}
    assert [e.task for e in bench.domain(places(), tasks=2)] == [0, 1]
    assert stream[0].stream["domains"] == ["north", "east", "south"]


def test_characters_in_domains_keep_their_successors():
    data = characters()
    first, second = bench.domain(data)
    assert torch.equal(first.train.read()[1], data.train_y[::2])
    assert second.kind == "characters"
    assert (second.shape, second.outputs, second.tokens) == ((8,), 256, 256)


def test_drift_cuts_in_order_and_scales_by_the_first_stretch():
    rng = np.random.default_rng(0)
    raw = np.concatenate([rng.normal(3 * k, 1 + k, (8, 2)) for k in range(3)])
    raw[:8, 1] = 5
    x, y = torch.from_numpy(raw).float(), torch.arange(24) % 2
    stream = bench.drift(DataSet("d", x, y, x[::4], y[::4], ("a", "b")), tasks=3)
    mean, deviation = raw[:8].mean(0), np.array([raw[:8, 0].std(), 1])
    for k, e in enumerate(stream):
        np.testing.assert_allclose(e.train.read()[0], (raw[8 * k : 8 * k + 8] - mean) / deviation, atol=1e-5)
        np.testing.assert_allclose(e.test.read()[0], (raw[::4][2 * k : 2 * k + 2] - mean) / deviation, atol=1e-5)
        assert e.train.read()[1].tolist() == [0, 1] * 4
        assert (e.scenario, e.classes) == ("domain", (0, 1))


@pytest.mark.skipif(not (SHARED / "noaa_weather").is_dir(), reason="no folder noaa_weather in RWALK_DATA")
def test_drift_of_noaa_weather_against_pandas():
    table = pd.read_parquet(SHARED / "noaa_weather" / "stream.parquet").sort_values("t")
    held = np.arange(len(table)) % 5 == 4
    train, test = table[~held], table[held]
    columns = [f"feat_{i}" for i in range(1, 9)]
    stream = bench.drift("noaa_weather", tasks=10, root=SHARED)
    first = train[: len(stream[0].train)][columns].astype(float)
    at = [0, 0]
    for e in stream:
        for i, (part, truth) in enumerate(((e.train, train), (e.test, test))):
            rows = truth[at[i] : at[i] + len(part)]
            x, y = part.read()
            np.testing.assert_allclose(x.numpy(), (rows[columns] - first.mean()) / first.std(ddof=0), atol=1e-4)
            assert y.tolist() == rows.label.tolist()
            at[i] += len(part)
    assert at == [len(train), len(test)]
    assert {len(e.train) for e in stream} <= {1452, 1453}


@pytest.mark.skipif(not (SHARED / "clinc150").is_dir(), reason="no folder clinc150 in RWALK_DATA")
def test_domains_of_clinc150_against_pandas():
    tables = {split: pd.read_parquet(SHARED / "clinc150" / f"{split}.parquet") for split in ("train", "test")}
    stream = bench.domain("clinc150", scenario="task", root=SHARED)
    assert len(stream) == 11
    for e in stream:
        for split, part in (("train", e.train), ("test", e.test)):
            mine = tables[split][tables[split].domain == e.task]
            assert part.read()[1].tolist() == mine.label.tolist()
            assert e.classes == tuple(sorted(mine.label.unique()))


def test_a_new_kind_of_stream_gets_each_runs_seed_where_its_function_has_one(monkeypatch, tmp_path):
    def noisy(data="digits", tasks=2, seed=0, root=None):
        return [
            dataclasses.replace(e, stream=e.stream | {"name": "noisy-digits"}) for e in bench.permuted(data, tasks, seed, root)
        ]

    monkeypatch.setitem(builtin.STREAMS, "noisy", noisy)
    words = ["run", "noisy-digits", "--methods", "finetune", "--seeds", "2", "--tasks", "2"]
    assert [run.tasks[0].stream["seed"] for run in describe(parsed(words))] == [0, 1]
    assert [run.stream.seed for run in describe(parsed(["run", "split-digits", *words[2:]]))] == [0, 0]


def test_what_is_no_data_set_is_told_where_it_belongs():
    for kind in (bench.split, bench.permuted, bench.rotated, bench.drift):
        with pytest.raises(TypeError, match=r"The data set is a `tuple`, .* `rwalk.bench.stream` makes a stream of arrays"):
            kind((torch.zeros(3, 2), torch.zeros(3)))
