"""Tables of every type of column against NumPy, and columns that are refused by name."""

import datetime as dt
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rwalk import bench
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet
from stored import splits, write

LABEL = [0, 1, 0, 1]
DAYS = [dt.date(2024, 2, day) for day in (28, 29, 1, 2)]
WHOLE = (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32())
TIMES = [dt.datetime(2024, 2, 29, 23, 59, second, 7) for second in (1, 2, 4, 59)]


def storable(column):
    """Tell whether this version of pyarrow can write a type to a parquet file."""
    try:
        pq.write_table(pa.table({"x": column}), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True


def standardised(values, known=None):
    """By the definition, in extended precision; what never changes becomes 0."""
    values = np.asarray(values, np.longdouble)
    known = values if known is None else np.asarray(known, np.longdouble)
    spread = known.std(0)
    return ((values - known.mean(0)) / np.where(known.max(0) == known.min(0), 1, spread)).astype(float)


def table(folder, train, test=None):
    """A data set of columns, with labels."""
    train, test = ({**some, "label": LABEL[: len(next(iter(some.values())))]} for some in (train, test or train))
    return load(splits(folder / "d", train, test))


def since(values, unit):
    return [(value - values[0]) / unit for value in values]


@pytest.mark.parametrize(("column", "numbers"), [
    (pa.array([True, False, False, False]), [1, 0, 0, 0]),
    *((pa.array([1, 2, 3, 7], kind), [1, 2, 3, 7]) for kind in WHOLE),
    (pa.array([2**62, 2**62 + 1, 2**62 + 5, 2**62 + 2]), [0, 1, 5, 2]),
    (pa.array([2**64 - 1, 2**64 - 2, 2**64 - 9, 2**64 - 4], pa.uint64()), [9, 8, 1, 6]),
    (pa.array([-(2**63), 2**63 - 1, 0, 5]), [-(2.0**63), 2.0**63, 0, 5]),
    (pa.array(np.array([1, 2.5, 3, 7], np.float16)), [1, 2.5, 3, 7]),
    (pa.array([1, 2.5, 3, 7], pa.float32()), [1, 2.5, 3, 7]),
    (pa.array([1, 2.5, 3, 7]), [1, 2.5, 3, 7]),
    (pa.array([Decimal(text) for text in ("1.25", "-2.50", "3.00", "7.75")]), [1.25, -2.5, 3, 7.75]),
    (pa.array([Decimal(10**30 + k) for k in (1, 2, 3, 7)], pa.decimal128(38, 0)), [1, 2, 3, 7]),
    (pa.array([Decimal(10**60 + k) for k in (1, 2, 3, 7)], pa.decimal256(70, 0)), [1, 2, 3, 7]),
    (pa.array(DAYS), since(DAYS, dt.timedelta(1))),
    (pa.array(DAYS, pa.date64()), since(DAYS, dt.timedelta(1))),
    *((pa.array(TIMES, pa.timestamp("us", zone)), since(TIMES, dt.timedelta(0, 1))) for zone in (None, "Asia/Kathmandu")),
    (pa.array([10**18 + k for k in (3, 1, 2, 9)]).cast(pa.timestamp("ns")), [3, 1, 2, 9]),
    (pa.array([3, 1, 2, 9], pa.int32()).cast(pa.time32("ms")), [3, 1, 2, 9]),
    (pa.array([3, 1, 2, 9]).cast(pa.time64("ns")), [3, 1, 2, 9]),
    (pa.array([3, 1, 2, -9]).cast(pa.duration("us")), [3, 1, 2, -9]),
    (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 0, 1], pa.int8())), [1, 0, 0, 1]),
    (pa.array([1e308, -1e308, 0, 3e307]), [1, -1, 0, 0.3]),
    (pa.array([1e-300, 2e-300, 0, 7e-300]), [1, 2, 0, 7]),
    (pa.array([1e16, 1e16 + 2, 1e16, 1e16 + 4]), [0, 2, 0, 4]),
    (pa.array([-1e16, 2 - 1e16, -1e16, 4 - 1e16]), [0, 2, 0, 4]),
    (pa.array([0.1] * 4), [0] * 4),
    (pa.array([1013.25] * 4, pa.float32()), [0] * 4),
], ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "")  # fmt: skip
def test_each_type_of_number_has_mean_0_and_deviation_1_beside_another(tmp_path, column, numbers):
    data = table(tmp_path, {"x": [5.0, 6, 8, 9], "c": column})
    assert data.train_x.dtype == torch.float32
    np.testing.assert_allclose(data.train_x[:, 0], standardised([5, 6, 8, 9]), atol=1e-6)
    np.testing.assert_allclose(data.train_x[:, 1], standardised(numbers), atol=1e-6)
    assert torch.equal(data.test_x, data.train_x)


def test_many_rows_of_large_numbers_lose_nothing(tmp_path):
    """Air pressure in Pa and times in ns: in float32 both would be constants."""
    rng = np.random.default_rng(0)
    count = 100_000
    pressure = rng.normal(101_325, 0.01, count)
    time = 1_700_000_000_000_000_000 + rng.permutation(count)
    label = np.arange(count) % 2
    data = load(splits(tmp_path / "d", {"p": pressure, "t": pa.array(time), "k": [1013.25] * count, "label": label}))
    expected = np.stack([standardised(pressure), standardised(time - time.min()), np.zeros(count)], 1)
    np.testing.assert_allclose(data.train_x, expected, atol=2e-5)
    assert abs(data.train_x[:, :2].double().mean(0)).max() < 1e-5


def test_categories_become_a_column_of_0_and_1_for_each_value_that_training_has(tmp_path):
    """Whether they come as texts or as a dictionary, in train and in test; values that are new in test are 0 everywhere."""
    colours = ["red", "blue", "red", "green"]
    expected = [[c == value for value in ("blue", "green", "red")] for c in colours]
    kinds = [pa.array(colours), pa.array(colours, pa.large_string()), pa.array(colours, pa.string_view())]
    for k, train in enumerate(filter(storable, [*kinds, kinds[0].dictionary_encode()])):
        for test in (pa.array(["green", "black"]), pa.array(["green", "black"]).dictionary_encode()):
            data = table(tmp_path / str(k), {"x": [1, 2, 3, 4], "c": train}, {"x": [1, 2], "c": test})
            assert data.train_x[:, 1:].tolist() == expected
            assert data.test_x[:, 1:].tolist() == [[0, 1, 0], [0, 0, 0]]


REFUSED = {
    "binary": pa.array([b"a"] * 4),
    "large_binary": pa.array([b"a"] * 4, pa.large_binary()),
    "fixed_size_binary": pa.array([b"ab"] * 4, pa.binary(2)),
    "struct<": pa.array([{"a": 1}] * 4),
    "map<": pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
    "list<.*string": pa.array([["a"]] * 4),
    "list<.*struct": pa.array([[{"a": 1}]] * 4),
    "list_view": pa.array([[1]] * 4, pa.list_view(pa.int64())),
}


@pytest.mark.parametrize("kind", [kind for kind, column in REFUSED.items() if storable(column)])
def test_columns_that_are_no_numbers_are_refused_by_name(tmp_path, kind):
    with pytest.raises(ValueError, match=f"The column `more` of `d` holds {kind}.*numbers.*Drop this column"):
        table(tmp_path, {"x": [1.0, 2, 3, 4], "more": REFUSED[kind]})


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.float32()), pa.list_(pa.int8(), 2)], ids=str)
def test_lists_beside_numbers_are_refused_by_name(tmp_path, kind):
    for first in ("x", "z"):  # whatever the order
        with pytest.raises(ValueError, match=r"lists in column `y` beside `[xz]`.*Drop the other columns"):
            table(tmp_path / first, dict(sorted({first: [1, 2], "y": pa.array([[1, 2], [3, 4]], kind)}.items())))


def test_categories_of_too_many_values_are_refused_by_name(tmp_path):
    for count in (100, 101):
        columns = {"x": range(count), "city": [f"c{k}" for k in range(count)], "label": [0] * count}
        if count == 100:
            assert load(splits(tmp_path / "d", columns)).train_x.shape == (100, 101)
        else:
            with pytest.raises(ValueError, match=r"101 different values in column `city`.* 100 .*Drop this column"):
                load(splits(tmp_path / "d", columns))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("fine", "bad"), [
    ([1, 2], [3, None]), ([1.0, 2.0], [3.0, None]), ([1.0, 2.0], [3.0, np.nan]), ([1.0, 2.0], [3.0, np.inf]),
    (["a", "b"], ["a", None]), (DAYS[:2], [DAYS[0], None]), ([True, False], [True, None]),
    ([Decimal(1), Decimal(2)], [Decimal(1), None]),
    ([[1.0], [2.0]], [[3.0], [None]]), ([[1.0], [2.0]], [[3.0], None]), ([[1.0], [2.0]], [[3.0], []]),
    ([[1.0], [2.0]], [[3.0], [np.nan]]), ([[1.0], [2.0]], [[3.0], [1.0, 2.0]]), ([[[1]], [[2]]], [[[3]], [[4, 5]]]),
    ([1, 2], [None, None]),
], ids=str)  # fmt: skip
def test_what_is_missing_is_named_by_column_file_and_row(tmp_path, fine, bad, split):
    beside = {} if isinstance(fine[0], list) else {"other": [1.0, 2.0]}
    for name in ("train-0", "train-1", "test"):
        came = bad if name == {"train": "train-1", "test": "test"}[split] else fine
        write(tmp_path / "d", f"{name}.parquet", {**beside, "c": came, "label": [0, 1]})
    row = 0 if bad == [None, None] else 1
    name = "train-1" if split == "train" else "test"
    with pytest.raises(ValueError, match=f"column `c`.*row {row} of {name}.parquet, counted from 0"):
        load(str(tmp_path / "d"))


def test_nothing_is_learned_from_test(tmp_path):
    rng = np.random.default_rng(1)
    train = {"a": rng.normal(3, 5, 4), "b": [1, 5, 7, 7], "c": list("xyxz")}
    first, second = {"a": [1.0, 2.0], "b": [2, 3], "c": ["x", "q"]}, {"a": [1e6, -1e6], "b": [-100, 2**60], "c": ["r", "s"]}
    one, other = table(tmp_path / "1", train, first), table(tmp_path / "2", train, second)
    assert torch.equal(one.train_x, other.train_x)
    for data, test in ((one, first), (other, second)):
        for k, column in enumerate("ab"):
            np.testing.assert_allclose(data.test_x[:, k], standardised(test[column], train[column]), rtol=1e-6)


def test_a_test_number_that_no_float_can_hold_beside_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"column `x` that is too far.*row 1 of test.parquet"):
        table(tmp_path, {"x": [1.0, 2, 3, 4]}, {"x": [1.0, 1e300]})


@pytest.mark.parametrize(("train", "test", "numbers"), [
    (pa.array([1, 2, 3, 9]), pa.array([2.5]), 2.5),
    (pa.array([1, 2, 3, 9]), pa.array([True]), 1),
    (pa.array([1.5, 2, 3, 9], pa.float32()), pa.array([Decimal("2.5")]), 2.5),
    (pa.array([0, 1, 2, 9]).cast(pa.timestamp("us")), pa.array([2500]).cast(pa.timestamp("ns")), 2.5),
    (pa.array([0, 1, 2, 9], pa.int8()), pa.array([2**40]), 2**40),
])  # fmt: skip
def test_splits_may_differ_in_type_where_one_holds_both(tmp_path, train, test, numbers):
    data = table(tmp_path, {"x": train}, {"x": test})
    known = [float(v) for v in train.cast(pa.int64()).to_pylist()] if pa.types.is_temporal(train.type) else train.to_pylist()
    assert data.test_x[0, 0].item() == pytest.approx(standardised([numbers], known)[0], rel=1e-6)


@pytest.mark.parametrize(("train", "test"), [
    (pa.array([1.0, 2.0]), pa.array(["1"])), (pa.array(["a", "b"]).dictionary_encode(), pa.array([1])),
    (pa.array(DAYS[:2]), pa.array(TIMES[:1])), (pa.array(TIMES[:2]), pa.array(TIMES[:1], pa.timestamp("us", "UTC"))),
])  # fmt: skip
def test_types_that_do_not_go_together_are_refused_by_name(tmp_path, train, test):
    with pytest.raises(ValueError, match=r"column `x` of `d` is .* in train and .* in test"):
        table(tmp_path, {"x": train, "y": [1, 2]}, {"x": test, "y": [1]})


def test_lists_keep_their_shape_and_each_place_is_standardised(tmp_path):
    rng = np.random.default_rng(2)
    values = rng.normal(1e6, 0.1, (4, 2, 3))
    for kind in (
        pa.list_(pa.list_(pa.float64())),
        pa.large_list(pa.list_(pa.float64(), 3)),
        pa.list_(pa.list_(pa.float64(), 3), 2),
    ):
        data = table(tmp_path, {"x": pa.array(values.tolist(), kind)})
        assert data.train_x.shape == (4, 2, 3)
        np.testing.assert_allclose(data.train_x, standardised(values), atol=1e-5)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values[:, 0])
    np.testing.assert_allclose(table(tmp_path, {"x": tensors}).train_x, standardised(values[:, 0]), atol=1e-5)


def test_one_row_is_a_table_of_zeros(tmp_path):
    data = load(splits(tmp_path / "d", {"x": [5.0], "y": [True], "c": pa.array(["a"]).dictionary_encode(), "label": [3]}))
    assert data.train_x.tolist() == [[0, 0, 1]]
    assert data.classes == ("3",)


def test_columns_of_one_name_are_refused(tmp_path):
    columns = pa.table([pa.array([1, 2]), pa.array([3, 4]), pa.array([0, 1])], names=["x", "x", "label"])
    with pytest.raises(ValueError, match=r"more than one column `x`.*Rename or drop"):
        load(splits(tmp_path / "d", columns))


def test_a_column_called_folder_is_not_taken_for_the_folders(tmp_path):
    for name in ("a", "b"):
        for split in ("train", "test"):
            write(tmp_path / "d" / name, f"{split}.parquet", {"x": [1.0], "folder": ["x"], "label": [0]})
    with pytest.raises(ValueError, match="have a column `folder`"):
        load(str(tmp_path / "d"), by="folder")


def test_files_of_one_split_with_types_that_do_not_go_together_are_refused(tmp_path):
    write(tmp_path / "d", "test.parquet", {"x": [1.0], "label": [1]})
    write(tmp_path / "d", "train-0.parquet", {"x": [1.0], "label": [0]})
    write(tmp_path / "d", "train-1.parquet", {"x": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=r"train files of .* have columns of different types"):
        load(str(tmp_path / "d"))


def test_a_stretch_of_constants_is_shifted_to_0_and_large_offsets_lose_nothing():
    """Where the first stretch never changes, and where it lies far from 0 in its own spread."""
    rng = np.random.default_rng(3)
    raw = np.stack([np.full(40, 0.1), rng.normal(1000, 0.5, 40)], 1).astype(np.float32)
    raw[20:, 0] = 7
    x, y = torch.from_numpy(raw), torch.arange(40) % 2
    known = raw[:20].astype(np.longdouble)
    for shape in ((2,), (2, 1)):  # lists in lists, too
        form = x.view(-1, *shape)
        first, second = (e.train.read()[0].flatten(1) for e in bench.drift(DataSet("d", form, y, form, y, ("a", "b")), tasks=2))
        np.testing.assert_allclose(first, standardised(known), atol=1e-6)
        np.testing.assert_allclose(second, standardised(raw[20:], known), rtol=1e-6)
        assert first.dtype == torch.float32


@pytest.mark.parametrize("times", [
    [3, 1, 2, 5, 4], ["2024-01-02", "2023-12-31", "2024-01-01", "2024-01-10T01:00", "2024-01-10"],
    [dt.datetime(2024, 1, 1, hour) for hour in (3, 1, 2, 5, 4)], [Decimal(3), Decimal(1), Decimal(2), Decimal(50), Decimal(4)],
])  # fmt: skip
def test_the_column_of_times_gives_the_order_and_messages_name_rows_of_the_file(tmp_path, times):
    values = [10.0, 20, 40, 50, 80]
    write(tmp_path / "d", "stream.parquet", {"t": times, "x": values, "label": ["a"] * 5})
    data = load(str(tmp_path / "d"))
    assert data.train_x.shape == (4, 1)
    np.testing.assert_allclose(data.train_x[:, 0], standardised([20, 40, 10, 80]), atol=1e-6)
    np.testing.assert_allclose(data.test_x[:, 0], standardised([50], [20, 40, 10, 80]), atol=1e-6)
    write(tmp_path / "e", "stream-0.parquet", {"t": times[:2], "x": values[:2], "label": ["a"] * 2})
    write(tmp_path / "e", "stream-1.parquet", {"t": times[2:], "x": [40.0, 50.0, None], "label": ["a"] * 3})
    with pytest.raises(ValueError, match=r"column `x` .row 2 of stream-1.parquet"):
        load(str(tmp_path / "e"))


@pytest.mark.parametrize(("times", "match"), [
    ([1, None, 2], "without a time in column `t` .row 1 of stream.parquet"),
    ([1.0, 2.0, np.nan], "without a time in column `t` .row 2 of stream.parquet"),
    (["1/2/2024", "2/1/2024", "x"], "column `t` of .* gives no order"),
    ([[1], [2], [3]], "column `t` of .* gives no order"),
])  # fmt: skip
def test_times_that_give_no_order_are_refused(tmp_path, times, match):
    write(tmp_path / "d", "stream.parquet", {"t": times, "x": [1, 2, 3], "label": [0, 1, 0]})
    with pytest.raises(ValueError, match=match):
        load(str(tmp_path / "d"))
