"""Columns of labels and domains of every type."""

import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pytest

from rwalk.bench.data import load
from stored import features, splits, write


def loaded(folder, labels, test=None, **options):
    metadata = options.pop("metadata", None)
    known = {"x": [float(k) for k in range(len(labels))], "label": labels}
    other = known if test is None else {"x": [0.0] * len(test), "label": test}
    return load(splits(folder / "d", known, other, metadata), **options)


@pytest.mark.parametrize(("labels", "numbers", "names"), [
    ([3, 7, 3], [0, 1, 0], ("3", "7")), ([-2, 5, -2], [0, 1, 0], ("-2", "5")), ([1.0, 0.0, 1.0], [1, 0, 1], ("0", "1")),
    ([True, False, True], [1, 0, 1], ("False", "True")), (["b", "a", ""], [2, 1, 0], ("", "a", "b")),
    ([b"b", b"a", b"\xff"], [2, 1, 0], ("\\xff", "a", "b")), ([2**63 - 1, 0, 1], [2, 0, 1], ("0", "1", str(2**63 - 1))),
    ([Decimal("2.0"), Decimal("1.0"), Decimal("2.0")], [1, 0, 1], ("1", "2")),
    (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
    ([dt.date(2024, 1, 2), dt.date(2023, 1, 1), dt.date(2024, 1, 2)], [1, 0, 1], ("2023-01-01", "2024-01-02")),
    ([9, 9, 9], [0, 0, 0], ("9",)), (["10", "9", "10"], [0, 1, 0], ("10", "9")),
])  # fmt: skip
def test_labels_are_numbered_in_their_order_and_keep_their_names(tmp_path, labels, numbers, names):
    data = loaded(tmp_path, labels)
    assert data.train_y.tolist() == data.test_y.tolist() == numbers
    assert data.classes == names


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("fine", "bad", "match"), [
    ([0, 1], [0, None], "missing or -1"), (["a", "b"], ["a", None], "missing or -1"), ([0, 1], [0, -1], "missing or -1"),
    ([0.0, 1.0], [0.0, float("nan")], "no whole numbers"), ([0.0, 1.0], [0.0, float("inf")], "no whole numbers"),
    ([0.0, 1.0], [0.0, 0.5], "no whole numbers"),
    ([Decimal("0.0"), Decimal("1.0")], [Decimal("0.0"), Decimal("0.5")], "no whole numbers"),
    ([0, 1], [None, None], "missing or -1"),
])  # fmt: skip
def test_what_is_no_label_is_named_by_file_and_row(tmp_path, fine, bad, match, split):
    for name in ("train-0", "train-1", "test"):
        came = bad if name == {"train": "train-1", "test": "test"}[split] else fine
        write(tmp_path / "d", f"{name}.parquet", {"x": [1.0, 2.0], "label": came})
    row, name = 0 if bad == [None, None] else 1, "train-1" if split == "train" else "test"
    with pytest.raises(ValueError, match=rf"labels that are {match} .row {row} of {name}.parquet"):
        load(str(tmp_path / "d"))


def test_a_test_label_that_train_lacks_is_named_by_row(tmp_path):
    with pytest.raises(ValueError, match=r"test labels 2 that train lacks .row 1 of test.parquet"):
        loaded(tmp_path, [0, 1], [0, 2])


@pytest.mark.parametrize(
    "labels", [[[0, 1], [1]], [{"a": 1}, {"a": 2}], pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64()))]
)
def test_several_labels_in_a_row_are_refused(tmp_path, labels):
    with pytest.raises(ValueError, match=r"The column `label` of `d` holds labels of type .* each row"):
        loaded(tmp_path, labels)


def test_names_of_the_hub_belong_to_numbers_from_0_on(tmp_path):
    mark = features(label={"_type": "ClassLabel", "names": ["cat", "dog", "cow"]})
    assert loaded(tmp_path, [-2, 0, 1, 2, 3], metadata=mark).classes == ("-2", "cat", "dog", "cow", "3")


@pytest.mark.parametrize("where", ["train-1", "test"])
@pytest.mark.parametrize("column", ["label", "place"])
def test_names_that_differ_between_files_are_refused_and_more_of_them_are_not(tmp_path, where, column):
    def store(file, names):
        columns = {"x": [1.0, 2.0], "label": [0, 1], "place": [1, 0]}
        write(tmp_path / "d", f"{file}.parquet", columns, features(**{column: {"_type": "ClassLabel", "names": names}}))

    for file in ("train-0", "train-1", "test"):
        store(file, ["cat", "dog"])
    store(where, ["cat", "dog", "cow"])
    assert load(str(tmp_path / "d"), label="label").classes == (("cat", "dog") if column == "label" else ("0", "1"))
    store(where, ["dog", "cat"])
    with pytest.raises(ValueError, match=rf" name 0 in the column `{column}` both 'cat' and 'dog'\."):
        load(str(tmp_path / "d"), label="label", by="place")


def test_domains_may_be_negative_but_not_missing(tmp_path):
    columns = {"x": [1.0, 2.0, 3.0], "label": [0, 1, 0], "place": [-1, 5, -1]}
    data = load(splits(tmp_path / "a", columns), by="place")
    assert (data.domains, data.train_domain.tolist()) == (("-1", "5"), [0, 1, 0])
    with pytest.raises(ValueError, match=r"missing domains .row 1 of train.parquet"):
        load(splits(tmp_path / "b", columns | {"place": [1, None, 1]}), by="place")
