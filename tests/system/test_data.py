"""The digits, and data sets from parquet files in the Hugging Face schema, whole and damaged."""

import binascii
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rwalk.bench.data import load
from rwalk.bench.parquet import download
from stored import encoded, features, write

SHARED = Path(os.environ.get("RWALK_DATA") or Path(__file__).parents[3] / "shared" / "data")


def png(array, mode="L"):
    return encoded(Image.fromarray(array).convert(mode))


@pytest.fixture
def pictures(tmp_path):
    """Two grey images of class 3 and 7 for training, one for testing, with the hub's metadata."""
    marked = features(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": list("abcdefgh")})
    dark, light = np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)
    folder = tmp_path / "pictures"
    write(folder, "train-00000-of-00001.parquet", {"image": [png(dark), png(light)], "label": [3, 7]}, marked)
    write(folder, "test-00000-of-00001.parquet", {"image": [png(light)], "label": [7]}, marked)
    return folder


def test_digits_come_whole_and_split_the_same_way_each_time():
    data = load("digits")
    assert data.train_x.shape == (1433, 1, 8, 8)
    assert data.test_x.shape == (364, 1, 8, 8)
    assert 0 <= data.train_x.min() < data.train_x.max() <= 1
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    rows = sorted(zip(theirs.images.reshape(-1, 64).tolist(), theirs.target.tolist(), strict=True))
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    assert sorted(zip((16 * x).flatten(1).tolist(), y.tolist(), strict=True)) == rows
    assert data.test_y.bincount().tolist() == [-(-count // 5) for count in np.bincount(theirs.target)]
    assert data.digest() == load("digits").digest()


PLAIN_INSTALL = """
import sys, warnings
class Without:  # a place to find modules, without those that a plain install lacks
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *where):
        lacking = ("numpy", "pyarrow", "PIL", "datasets", "sklearn", "scipy", "pandas", "tyro", "rich", "jinja2", "numba")
        return None if name.split(".")[0] in lacking else self.finder.find_spec(name, *where)
sys.meta_path[:] = map(Without, sys.meta_path)
warnings.simplefilter("ignore")  # PyTorch warns that there is no NumPy
from rwalk import RWalk, bench
x, y = bench.permuted("digits", tasks=3)[2].train.read()
assert x.shape == (1433, 1, 8, 8)
print(bench.run(bench.split("digits", tasks=2), RWalk(), strength=1).config["stream"]["data"])
"""


def test_the_digits_and_the_runner_need_torch_alone():
    done = subprocess.run([sys.executable, "-c", PLAIN_INSTALL], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == load("digits").digest(), done.stderr


def test_images_by_folder_and_by_name(pictures, monkeypatch):
    data = load(str(pictures))
    assert data.name == "pictures"
    assert data.train_x.shape == (2, 1, 2, 3)
    assert data.train_x[0].max() == 0
    assert data.train_x[1].min() == 1
    assert data.train_y.tolist() == [0, 1]
    assert data.test_y.tolist() == [1]
    assert data.classes == ("d", "h")
    assert load("pictures", pictures.parent).digest() == data.digest()
    assert load("pictures", pictures).digest() == data.digest()
    assert load("another-name", pictures).digest() == data.digest()
    monkeypatch.setenv("RWALK_DATA", str(pictures.parent))
    assert load("pictures").digest() == data.digest()


def test_a_download_goes_through_datasets_to_the_same_tensors(pictures, tmp_path, monkeypatch):
    """The real loading code of Hugging Face `datasets`, pointed at a folder instead of the hub."""
    import datasets

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name: real(str(pictures), cache_dir=str(tmp_path / "cache")))
    tables = download("someone/pictures")
    assert tables["train"].column("label").to_pylist() == [3, 7]
    monkeypatch.setattr("rwalk.bench.parquet.download", lambda name: tables)
    assert load("someone/pictures").digest() == load(str(pictures)).digest()


def test_a_name_that_nobody_has(monkeypatch):
    def broken(name):
        raise OSError("no such thing\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)  # the hub answers
    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(ConnectionError, match=r"`nothing` cannot be downloaded \(OSError: no such thing\).*--data"):
        load("nothing")


def test_mixed_grey_and_colour_images_become_colour(tmp_path):
    grey, colour = np.full((2, 2), 10, np.uint8), np.zeros((2, 2, 3), np.uint8)
    write(tmp_path / "d", "train.parquet", {"img": [png(grey), png(colour, "RGB")], "label": [0, 1]})
    write(tmp_path / "d", "test.parquet", {"img": [png(grey)], "label": [0]})
    data = load(str(tmp_path / "d"))
    assert data.train_x.shape == (2, 3, 2, 2)
    assert data.test_x.shape == (1, 3, 2, 2)


def test_numeric_columns_and_lists_are_standardised_by_the_training_split(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(3, 5, (50, 2))
    label = ["yes", "no"] * 25
    write(tmp_path / "t", "train.parquet", {"a": values[:, 0], "b": values[:, 1], "c": [7] * 50, "target": label})
    write(tmp_path / "t", "test.parquet", {"a": [3.0], "b": [3.0], "c": [7], "target": ["no"]})
    data = load(str(tmp_path / "t"))
    assert data.classes == ("no", "yes")
    assert torch.allclose(data.train_x.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(data.train_x[:, :2].std(0, correction=0), torch.ones(2), atol=1e-4)
    lists = [row.tolist() for row in values]
    write(tmp_path / "l", "train.parquet", {"x": lists, "label": [0, 1] * 25})
    write(tmp_path / "l", "validation.parquet", {"x": lists[:1], "label": [0]})
    assert torch.allclose(load(str(tmp_path / "l")).train_x, data.train_x[:, :2])


def fails(folder, kind, match):
    with pytest.raises(kind, match=match) as caught:
        load(str(folder))
    assert str(caught.value).endswith(".")


def test_damaged_folders(tmp_path, pictures):
    fails(tmp_path / "absent", FileNotFoundError, "does not exist")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", FileNotFoundError, "no parquet file")
    with pytest.raises(FileNotFoundError, match="Correct `--data`"):
        load("mnist", tmp_path / "absent")
    write(tmp_path / "lone", "train.parquet", {"x": [1.0], "label": [0]})
    fails(tmp_path / "lone", FileNotFoundError, "test split")
    whole = (pictures / "train-00000-of-00001.parquet").read_bytes()
    for cut in (b"", whole[:40], whole[:-20], b"PAR1" + b"\0" * 100):
        (pictures / "train-00000-of-00001.parquet").write_bytes(cut)
        fails(pictures, ValueError, "cannot be read")


@pytest.mark.parametrize(("columns", "match"), [
    ({"name": ["a"], "label": [0]}, "a column marked as Image"),
    ({"text": ["a", None], "label": [0, 1]}, "missing texts"),
    ({"text": ["a"], "tags": [["b"]]}, "column of labels"),
    ({"x": [1.0], "kind": [0]}, "column of labels"),
    ({"x": [float("nan")], "label": [0]}, "missing or infinite"),
    ({"x": [1.0], "label": [-1]}, "missing or -1"),
    ({"x": [1.0], "label": [None]}, "missing or -1"),
    ({"x": [1.0], "label": [0.5]}, "no whole numbers"),
    ({"x": [[1.0], [1.0, 2.0]], "label": [0, 1]}, "lists of numbers need one shape"),
    ({"image": [{"bytes": b"no image", "path": None}], "label": [0]}, "cannot be read"),
    ({"image": [png(np.zeros((2, 2), np.uint8)), png(np.zeros((3, 2), np.uint8))], "label": [0, 1]}, "sizes 2 x 2, 3 x 2"),
], ids=str)  # fmt: skip
def test_wrong_schemas(tmp_path, columns, match):
    write(tmp_path / "d", "train.parquet", columns)
    write(tmp_path / "d", "test.parquet", columns)
    fails(tmp_path / "d", ValueError, match)


def test_splits_that_do_not_belong_together(tmp_path):
    write(tmp_path / "d", "train.parquet", {"x": [1.0, 2.0], "label": [0, 1]})
    write(tmp_path / "d", "test.parquet", {"x": [1.0], "label": [2]})
    fails(tmp_path / "d", ValueError, "test labels 2 that train lacks")
    write(tmp_path / "d", "test.parquet", {"x": [1.0], "label": ["1"]})
    fails(tmp_path / "d", ValueError, "test labels '1' that train lacks")
    write(tmp_path / "d", "test.parquet", {"y": [1.0], "label": [1]})
    fails(tmp_path / "d", ValueError, "the column `x` in the test split too")
    write(tmp_path / "d", "test.parquet", {"x": [1.0]})
    fails(tmp_path / "d", ValueError, "the column `label` in the test split too")
    write(tmp_path / "e", "train.parquet", {"x": [[1.0], [2.0]], "label": [0, 1]})
    write(tmp_path / "e", "test.parquet", {"x": [[1.0, 2.0]], "label": [1]})
    fails(tmp_path / "e", ValueError, "one shape")
    write(tmp_path / "d", "test.parquet", {"x": pa.array([], pa.float64()), "label": pa.array([], pa.int64())})
    fails(tmp_path / "d", ValueError, "empty test split")


PICTURE = {"bytes": png(np.eye(2, dtype=np.uint8))["bytes"], "path": None}


@pytest.mark.parametrize(("train", "test", "kind"), [
    (["a", "b"], [1, 2], "int64"), (["a", "b"], [["a"], ["b"]], "list"), (["a", "b"], [b"a", b"b"], "binary"),
    (["a", "b"], pa.array([1, 2], pa.timestamp("ms")), "timestamp"), (["a", "b"], pa.nulls(2), "null"),
    ([PICTURE] * 2, [{"path": "a"}] * 2, "struct"), ([PICTURE] * 2, [1, 2], "int64"), ([PICTURE] * 2, ["a", "b"], "string"),
    ([PICTURE] * 2, [{"bytes": "a"}] * 2, "struct"), ([PICTURE] * 2, [[PICTURE]] * 2, "list"),
    ([PICTURE] * 2, [{"bytes": 5}] * 2, "struct"), ([PICTURE] * 2, [{"bytes": [5]}] * 2, "struct"),
    ([1.0, 2.0], ["a", "b"], "string"), ([1.0, 2.0], [[1.0], [2.0]], "list"), ([[1.0], [2.0]], [1.0, 2.0], "double|shape"),
    (["x", "y"], [{"text": "a"}] * 2, "struct"),
])  # fmt: skip
def test_inputs_of_another_type_in_the_test_split_are_refused(tmp_path, train, test, kind):
    name = "text" if train[0] in ("a", "x") else "x"
    write(tmp_path / "d", "train.parquet", {name: train, "label": [0, 1]})
    write(tmp_path / "d", "test.parquet", {name: test, "label": [0, 1]})
    fails(tmp_path / "d", ValueError, rf"^The column `{name}` of `d` .*({kind})")


@pytest.mark.parametrize("test", [pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "b"], pa.large_string())], ids=str)
def test_texts_are_texts_however_they_are_stored(tmp_path, test):
    write(tmp_path / "d", "train.parquet", {"text": ["a", "b"], "label": [0, 1]})
    write(tmp_path / "d", "test.parquet", {"text": test, "label": [0, 1]})
    assert torch.equal(load(str(tmp_path / "d")).train_x, load(str(tmp_path / "d")).test_x)


def test_images_may_lack_their_mark_in_the_test_split(tmp_path):
    write(tmp_path / "d", "train.parquet", {"image": [PICTURE], "label": [0]}, features(image={"_type": "Image"}))
    write(tmp_path / "d", "test.parquet", {"image": [PICTURE], "label": [0]})
    assert torch.equal(load(str(tmp_path / "d")).train_x, load(str(tmp_path / "d")).test_x)


def test_a_pipe_is_no_parquet_file_and_keeps_nobody_waiting(tmp_path):
    for split in ("train", "test"):
        os.mkfifo(tmp_path / f"{split}.parquet")
    fails(tmp_path, ValueError, r"`.*train.parquet` cannot be read as a parquet file \(no file\)")


def test_folders_may_have_names_that_are_not_utf_8(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    for home in (folder / "a", Path(os.fsdecode(bytes(folder) + b"/\xfe"))):
        for split in ("train", "test"):
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{split}.parquet").write_bytes(stored({"x": [1.0, 2.0], "label": [0, 1]}))
    data = load(str(folder), by="folder")
    assert (data.domains, data.train_domain.tolist()) == (("\\xfe", "a"), [1, 1, 0, 0])


def stored(columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="no folder mnist in RWALK_DATA")
def test_mnist():
    data = load("mnist", SHARED)
    assert data.train_x.shape == (60000, 1, 28, 28)
    assert data.test_x.shape == (10000, 1, 28, 28)
    assert data.train_y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert data.train_x.mean().item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.skipif(not (SHARED / "tinyimagenet100a_32").is_dir(), reason="no folder tinyimagenet100a_32 in RWALK_DATA")
def test_images_some_of_which_are_grey():
    data = load("tinyimagenet100a_32", SHARED)
    assert data.test_x.shape == (4000, 3, 32, 32)
    assert len(data.classes) == 100


def test_columns_belong_together_by_name_not_by_order(tmp_path):
    write(
        tmp_path / "d",
        "train.parquet",
        {"a": [0.0, 2.0], "flag": [True, False], "label": [0.0, 1.0], "__index_level_0__": [5, 6]},
    )
    write(tmp_path / "d", "test.parquet", {"label": [1], "__index_level_0__": [5], "flag": [False], "a": [2.0], "more": [3.0]})
    data = load(str(tmp_path / "d"))
    assert torch.equal(data.test_x, data.train_x[1:])
    assert data.train_x.shape == (2, 2)
    assert data.train_y.tolist() == [0, 1]


def test_files_of_one_split_may_differ_in_width_but_not_in_columns(tmp_path):
    write(tmp_path / "d", "test.parquet", {"x": [1.0], "label": [1]})
    write(tmp_path / "d", "train-0.parquet", {"x": [1.0], "label": pa.array([0], pa.int32())})
    write(tmp_path / "d", "train-1.parquet", {"x": pa.array([2.0], pa.float32()), "label": [1]})
    assert load(str(tmp_path / "d")).train_y.tolist() == [0, 1]
    write(tmp_path / "d", "train-1.parquet", {"z": [2.0], "label": [1]})
    fails(tmp_path / "d", ValueError, "different columns: x, label and z, label")


def test_a_folder_of_several_data_sets_is_refused(tmp_path, pictures):
    import shutil

    shutil.copytree(pictures, pictures.parent / "twice" / "a")
    shutil.copytree(pictures, pictures.parent / "twice" / "b")
    fails(pictures.parent / "twice", ValueError, "train files in a, b")
    assert len(load(str(pictures.parent / "twice" / "a")).train_y) == 2


def test_sixteen_bit_images_are_scaled(tmp_path):
    images = []
    for value in (0, 257 * 100, 65535):
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 2), value, np.uint16)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    for name in ("train.parquet", "test.parquet"):
        write(tmp_path / "d", name, {"image": images, "label": [0, 1, 2]})
    assert load(str(tmp_path / "d")).train_x[:, 0, 0, 0].tolist() == pytest.approx([0, 100 / 255, 1])


def test_a_task_without_test_examples_is_refused(tmp_path):
    from rwalk import bench

    write(tmp_path / "d", "train.parquet", {"x": [1.0, 2.0, 3.0], "label": [0, 1, 2]})
    write(tmp_path / "d", "test.parquet", {"x": [1.0, 2.0], "label": [0, 1]})
    with pytest.raises(ValueError, match="no train or test example of the classes 2"):
        bench.split(str(tmp_path / "d"), tasks=3)


def number(word):
    return binascii.crc32(word.encode()) % 8192 + 1


def test_words_are_numbered_by_a_checksum_and_padded_to_the_longest_training_text(tmp_path):
    texts = ["Play: the NEXT song!", "don't", "..."]
    write(tmp_path / "d", "train.parquet", {"text": texts, "label": ["a", "b", "a"], "source": ["x", "y", "z"], "n": [1, 2, 3]})
    write(tmp_path / "d", "test.parquet", {"text": ["next next next next next"], "label": ["b"]})
    data = load(str(tmp_path / "d"))
    assert data.train_x.dtype == torch.int64
    assert data.train_x.tolist() == [[number(w) for w in ("play", "the", "next", "song")], [number("don't"), 0, 0, 0], [0] * 4]
    assert data.test_x.tolist() == [[number("next")] * 4]
    assert data.tokens == 8193
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 1, 0], [1])


def test_texts_without_labels_are_windows_of_bytes_and_what_follows_each(tmp_path):
    rows = ["ab" * 100, "\u00e9" * 150, "c" * 57]
    write(tmp_path / "d", "train.parquet", {"text": rows, "domain": ["one", "two", "one"]})
    write(tmp_path / "d", "test.parquet", {"text": rows[:2], "domain": ["one", "two"]})
    data = load(str(tmp_path / "d"), by="domain")
    one, two = (rows[0] + rows[2]).encode(), rows[1].encode()
    assert data.domains == ("one", "two")
    assert data.train_domain.tolist() == [0, 0, 1, 1]
    expected = [one[:128], one[128:256], two[:128], two[128:256]]
    assert [bytes(row) for row in data.train_x.tolist()] == expected
    assert [bytes(row) for row in data.train_y.tolist()] == [one[1:129], one[129:257], two[1:129], two[129:257]]
    assert data.test_domain.tolist() == [0, 1, 1]
    assert len(load(str(tmp_path / "d")).train_x) == (len(one) + len(two) - 1) // 128


def test_a_stream_in_one_file_is_ordered_by_its_time_and_every_fifth_row_is_for_testing(tmp_path):
    rng = np.random.default_rng(1)
    time, value = rng.permutation(50), rng.normal(2, 3, 50)
    write(tmp_path / "d", "stream.parquet", {"t": time, "x": value, "label": time % 2})
    data = load(str(tmp_path / "d"))
    ordered = pd.DataFrame({"x": value, "label": time % 2}, index=time).sort_index()
    train, test = ordered[ordered.index % 5 != 4], ordered[ordered.index % 5 == 4]
    for x, y, truth in ((data.train_x, data.train_y, train), (data.test_x, data.test_y, test)):
        assert y.tolist() == truth.label.tolist()
        expected = (truth.x - train.x.mean()) / train.x.std(ddof=0)
        np.testing.assert_allclose(x[:, 0].numpy(), expected, atol=1e-5)
    assert data.train_x.shape == (40, 1)


ROWS = [(1, 9), (0, 8), (1, 3), (2, 8), (2, 3), (0, 2)]
"""Day and hour: neither gives the order alone."""


def dates(texts):
    return [f"2020-01-{day + 10}" for day, _ in ROWS] if texts else pa.array([day for day, _ in ROWS], pa.date32())


def hours(texts):
    return [f"{hour:02}:00" for _, hour in ROWS] if texts else pa.array([hour * 3600 for _, hour in ROWS], pa.time32("s"))


@pytest.mark.parametrize("times", [
    {"date": dates(False), "time": hours(False)}, {"time": hours(True), "date": dates(True)},
    {"t": hours(False), "date": dates(True)}, {"date": dates(False), "time": [hour for _, hour in ROWS]},
    {"date": dates(False), "t": [hour for _, hour in ROWS]}, {"date": [20200101 + r[0] for r in ROWS], "time": hours(False)},
    {"time": hours(False), "timestamp": pa.array([24 * r[0] + r[1] for r in ROWS], pa.timestamp("s"))},
    {"timestamp": pa.array([f"2020-01-{r[0] + 10} {r[1]:02}:00" for r in ROWS]).dictionary_encode(), "time": hours(True)},
], ids=lambda times: " ".join(f"{name}:{getattr(column, 'type', 'list')}" for name, column in times.items()))  # fmt: skip
def test_dates_and_times_of_day_give_the_order_together(tmp_path, times):
    """Truth: Python's order of pairs of day and hour."""
    order = sorted(range(6), key=ROWS.__getitem__)
    write(tmp_path / "d", "stream.parquet", times | {"x": [float(order.index(row)) for row in range(6)], "label": [0, 1] * 3})
    data = load(str(tmp_path / "d"))
    assert data.train_x.shape == (5, 1)
    assert data.train_x[:, 0].tolist() == sorted(data.train_x[:, 0].tolist())
    assert data.train_x[:4, 0].diff().allclose(data.train_x[:2, 0].diff())  # 0 to 3 and 5; 4 is for testing


@pytest.mark.parametrize(("times", "match"), [
    ({"time": hours(False)}, "holds times of day alone"), ({"t": hours(True)}, "holds times of day alone"),
    ({"t": [b"6", b"7", b"8", b"9", b"10", b"11"]}, "of binary, gives no order"), ({"t": [True, False] * 3}, "of bool, gives"),
    ({"t": pa.array(list("123456")).dictionary_encode()}, "of string, gives no order"), ({"t": [[1]] * 6}, "gives no order"),
    ({"date": dates(True), "time": [None, *hours(True)[1:]]}, "without a time in column `time` .row 0 of stream.parquet"),
])  # fmt: skip
def test_what_gives_no_order_is_refused(tmp_path, times, match):
    write(tmp_path / "d", "stream.parquet", times | {"x": [float(k) for k in range(6)], "label": [0, 1] * 3})
    fails(tmp_path / "d", ValueError, match)


def test_a_column_of_domains_gives_no_order(tmp_path):
    write(
        tmp_path / "d", "stream.parquet", {"date": list("babaaabbaa"), "x": [float(k) for k in range(10)], "label": [0, 1] * 5}
    )
    assert load(str(tmp_path / "d"), by="date").train_domain.tolist() == [1, 0, 1, 0, 0, 1, 1, 0]


def test_folders_can_be_the_domains(tmp_path):
    for k, name in enumerate(("books", "films")):
        write(tmp_path / "d" / name, "train.parquet", {"x": [0.0, 1.0], "label": [0, k]})
        write(tmp_path / "d" / name / "test", "part.parquet", {"x": [k * 1.0], "label": [k]})
    data = load(str(tmp_path / "d"), by="folder")
    assert data.domains == ("books", "films")
    assert (data.train_domain.tolist(), data.test_domain.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert data.train_x.shape == (4, 1)
    assert data.train_y.tolist() == [0, 0, 0, 1]
    fails(tmp_path / "d", ValueError, "by `folder`")


def from_the_hub(monkeypatch, folder, cache):
    """Point the real `datasets.load_dataset` at a folder, and return the names that it was asked for."""
    import datasets

    real, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or real(str(folder), cache_dir=str(cache)))
    return asked


def test_cifar100_by_name_has_fine_labels_coarse_labels_and_coarse_domains(tmp_path, monkeypatch):
    class_label = {"_type": "ClassLabel", "names": ["a", "b", "c", "d"]}
    marked = features(img={"_type": "Image"}, fine_label=class_label, coarse_label={**class_label, "names": ["p", "q"]})
    image = png(np.zeros((4, 4, 3), np.uint8), "RGB")
    for split, fine in (("train", [0, 3, 1, 2]), ("test", [3, 2, 1, 0])):
        columns = {"img": [image] * 4, "fine_label": fine, "coarse_label": [f // 2 for f in fine]}
        write(tmp_path / "hub", f"{split}-00000-of-00001.parquet", columns, marked)
    asked = from_the_hub(monkeypatch, tmp_path / "hub", tmp_path / "cache")
    monkeypatch.delenv("RWALK_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    fine, coarse = load("cifar100"), load("cifar100", label="coarse_label", by="fine_label")
    assert asked == ["uoft-cs/cifar100"] * 2
    assert (fine.train_y.tolist(), fine.classes) == ([0, 3, 1, 2], ("a", "b", "c", "d"))
    assert (coarse.train_y.tolist(), coarse.classes) == ([0, 1, 0, 1], ("p", "q"))
    assert (coarse.test_domain.tolist(), coarse.domains) == ([3, 2, 1, 0], ("a", "b", "c", "d"))
    assert coarse.train_x.shape == (4, 3, 4, 4)
    assert fine.digest() != coarse.digest()


def test_tiny_imagenet_by_name_is_tested_on_its_validation_split(tmp_path, monkeypatch):
    grey, colour = png(np.full((4, 4), 51, np.uint8)), png(np.full((4, 4, 3), 255, np.uint8), "RGB")
    write(tmp_path / "hub", "train-00000-of-00001.parquet", {"image": [grey, colour], "label": [0, 1]})
    write(tmp_path / "hub", "valid-00000-of-00001.parquet", {"image": [colour], "label": [1]})
    asked = from_the_hub(monkeypatch, tmp_path / "hub", tmp_path / "cache")
    monkeypatch.delenv("RWALK_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    data = load("tiny_imagenet")
    assert asked == ["zh-plus/tiny-imagenet"]
    assert data.train_x[:, :, 0, 0].tolist() == [[pytest.approx(0.2)] * 3, [1.0] * 3]
    assert data.test_y.tolist() == [1]


def test_columns_that_are_not_there(tmp_path):
    write(tmp_path / "d", "train.parquet", {"x": [1.0, 2.0], "label": [0, 1], "place": [0, 1]})
    write(tmp_path / "d", "test.parquet", {"x": [1.0, 2.0], "label": [0, 1], "place": [0, 2]})
    for wrong, match in (
        ({"label": "kind"}, "column `kind`"),
        ({"by": "domain"}, "column `domain`"),
        ({"by": "place"}, "2 that"),
    ):
        with pytest.raises(ValueError, match=match):
            load(str(tmp_path / "d"), **wrong)
    with pytest.raises(ValueError, match="column `domain`"):
        load("digits", by="domain")


def shared(name):
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"no folder {name} in RWALK_DATA")


@shared("clinc150")
def test_clinc150_against_pandas():
    data = load("clinc150", SHARED, by="domain")
    for split, x, y, domain in (
        ("train", data.train_x, data.train_y, data.train_domain),
        ("test", data.test_x, data.test_y, data.test_domain),
    ):
        truth = pd.read_parquet(SHARED / "clinc150" / f"{split}.parquet")
        assert y.tolist() == truth.label.tolist()
        assert domain.tolist() == truth.domain.tolist()
        words = truth.text.str.lower().str.findall(r"[\w']+")
        assert (x != 0).sum(1).tolist() == words.str.len().clip(upper=28).tolist()
        for row in range(0, len(truth), 1000):
            assert x[row][x[row] != 0].tolist() == [number(w) for w in words[row]][:28]
    assert data.train_x.shape == (15100, 28)
    assert data.classes[150] == "oos"
    assert len(data.domains) == 11


@shared("lm_domains")
def test_lm_domains_against_pyarrow():
    data = load("lm_domains", SHARED, by="domain")
    table = pq.read_table(SHARED / "lm_domains" / "test.parquet").to_pylist()
    for d in range(4):
        whole = "".join(row["text"] for row in table if row["domain"] == d).encode()
        x, y = data.test_x[data.test_domain == d], data.test_y[data.test_domain == d]
        assert bytes(x.flatten().tolist()) == whole[: x.numel()]
        assert bytes(y.flatten().tolist()) == whole[1 : y.numel() + 1]
        assert 0 <= len(whole) - 1 - x.numel() < 128
    assert data.domains == ("shakespeare", "state_of_the_union", "movie_reviews", "genesis_kjv")


COUNTED = """
import os, sys
from pathlib import Path
from rwalk.bench import parquet
from rwalk.bench.rows import read
before = len(os.listdir("/proc/self/task"))
table = read(Path(sys.argv[1]))
print(len(table), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of this process's threads")
def test_reading_leaves_no_thread_that_outlives_python(tmp_path):
    """Such a thread frees what belongs to the open file after the interpreter has gone, and aborts the process."""
    write(tmp_path, "train.parquet", {"image": [PICTURE] * 2000, "label": [0] * 2000})
    words = [sys.executable, "-c", COUNTED, str(tmp_path / "train.parquet")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, threads = map(int, done.stdout.split())
    assert rows == 2000
    assert threads <= 1, "that of the allocator, which holds nothing of Python's"
