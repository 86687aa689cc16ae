"""Streams of one's own data: every form gives the tasks that the arrays hold, and what does not fit is refused in words."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils import data as torch_data

from rwalk import EWC, bench
from rwalk.bench import Training

SMALL = Training(hidden=(16,), batch_size=20)
RNG = np.random.default_rng(0)
X = [RNG.normal(size=(30, 4)) + k for k in range(4)]
Y = [RNG.permutation(np.arange(30) % 3) for _ in range(4)]
ARRAYS = [((X[0], Y[0]), (X[1], Y[1])), ((X[2], Y[2]), (X[3], Y[3]))]


class Squares(torch_data.Dataset):
    """A map-style data set with a transform, as torchvision's have one."""

    def __init__(self, x, y, transform):
        self.x, self.y, self.transform, self.reads = x, y, transform, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.reads.append(row)
        return self.transform(torch.tensor(self.x[row])), int(self.y[row])


def tensors(x, y):
    return torch_data.TensorDataset(torch.tensor(x), torch.tensor(y))


FORMS = {
    "arrays": lambda x, y: (x, y),
    "tensors": lambda x, y: (torch.tensor(x), torch.tensor(y)),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "lists of tensors": lambda x, y: ([torch.tensor(row) for row in x], list(torch.tensor(y))),
    "read-only": lambda x, y: (np.broadcast_to(x, x.shape), np.broadcast_to(y, y.shape)),
    "other bytes": lambda x, y: (x.astype(">f8")[::-1][::-1], y.astype(">i2")),
    "pandas": lambda x, y: (pd.DataFrame(x), pd.Series(y)),
    "a column": lambda x, y: (pd.DataFrame(x), pd.DataFrame(y)),
    "TensorDataset": tensors,
    "Subset": lambda x, y: torch_data.Subset(tensors(np.concatenate([x, x + 9]), np.concatenate([y, y])), range(30)),
    "map-style": lambda x, y: Squares(x, y, lambda row: row),
    "a list of pairs": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "loader": lambda x, y: torch_data.DataLoader(tensors(x, y), batch_size=7),
    "shuffling loader": lambda x, y: torch_data.DataLoader(tensors(x, y), batch_size=7, shuffle=True, drop_last=True),
    "loader of batches": lambda x, y: torch_data.DataLoader(
        list(zip(np.split(x, 3), np.split(y, 3), strict=True)), batch_size=None
    ),
    "loader of less than a batch": lambda x, y: torch_data.DataLoader(tensors(x, y), batch_size=64, drop_last=True),
    "loader with batches": lambda x, y: torch_data.DataLoader(
        tensors(x, y), batch_sampler=torch_data.BatchSampler(torch_data.RandomSampler(tensors(x, y)), 4, False)
    ),
    "loader of one part": lambda x, y: torch_data.DataLoader(
        tensors(np.concatenate([x, x + 9]), np.concatenate([y, y])), 8, sampler=torch_data.SubsetRandomSampler(range(30))
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_stream(form):
    before = torch.get_rng_state()
    stream = bench.stream([tuple(FORMS[form](*side) for side in task) for task in ARRAYS])
    assert torch.equal(before, torch.get_rng_state())
    for e, task in zip(stream, ARRAYS, strict=True):
        for part, (x, y) in zip((e.train, e.test), task, strict=True):
            inputs, labels = part.read()
            np.testing.assert_array_equal(inputs.numpy(), x.astype(np.float32))
            np.testing.assert_array_equal(labels.numpy(), y)
        assert (e.classes, e.outputs, e.scenario, e.shape, e.kind) == ((0, 1, 2), 3, "domain", (4,), "table")
    assert stream[0].stream == bench.stream(ARRAYS)[0].stream
    assert stream[0].stream["rows"] == [60, 60]


def test_a_data_set_is_read_once_through_its_transform_with_the_same_draws_each_time():
    def noisy(row):
        return row + torch.rand(4)

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sides = [Squares(*ARRAYS[0][0], noisy), Squares(*ARRAYS[0][1], noisy)]
        (task,) = bench.stream([sides])
        assert [side.reads for side in sides] == [list(range(30))] * 2
        found.append(task.train.read()[0])
        assert 0 < (found[-1] - torch.tensor(X[0])).max() < 1
    assert torch.equal(*found)


def test_bytes_are_images_from_0_to_1_and_words_stay_numbers():
    pixels = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    (task,) = bench.stream([((pixels, [0, 1]), (pixels, [0, 1]))])
    np.testing.assert_allclose(task.train.read()[0].numpy(), pixels / 255, rtol=1e-6)
    assert task.kind == "image"
    words = [[3, 1, 0], [2, 2, 4]]
    (task,) = bench.stream([((words, [0, 1]), (words, [0, 1]))], tokens=5)
    assert task.train.read()[0].tolist() == words
    assert (task.kind, task.tokens) == ("text", 5)


@pytest.mark.parametrize(("scenario", "classes"), [
    ("task", [(0, 2), (1, 2)]), ("class", [(0, 2), (1, 2)]), ("domain", [(0, 1, 2)] * 2),
])  # fmt: skip
@pytest.mark.parametrize("labels", [[["ant", "fly"], ["bee", "fly"]], [[-1, 7], [3, 7]], [[False, True]] * 2])
def test_labels_are_numbered_in_their_sorted_order_over_all_tasks(scenario, classes, labels):
    x = np.ones((4, 3))
    stream = bench.stream([((x, two * 2), (x[:2], np.array(two))) for two in labels], scenario)
    order = sorted({label for two in labels for label in two})
    classes = classes if len(order) == 3 else [(0, 1)] * 2
    for e, two, mine in zip(stream, labels, classes, strict=True):
        assert e.train.read()[1].tolist() == [order.index(label) for label in two * 2]
        assert e.test.read()[1].tolist() == [order.index(label) for label in two]
        assert (e.classes, e.outputs) == (mine, len(order))


def test_a_share_is_held_out_at_random_and_no_example_twice():
    stream = bench.stream([task[0] for task in ARRAYS], test=0.2)
    again = bench.stream([{"train": task[0]} for task in ARRAYS], test=0.2)
    for e, other, task in zip(stream, again, ARRAYS, strict=True):
        assert (len(e.train), len(e.test)) == (24, 6)
        both = torch.cat([e.train.read()[0], e.test.read()[0]])
        assert sorted(both[:, 0].tolist()) == sorted(task[0][0][:, 0].astype(np.float32).tolist())
        assert torch.equal(e.test.read()[0], other.test.read()[0])
    assert stream[0].stream["test"] == 0.2


def test_records_of_different_data_have_different_names():
    def config(**changes):
        options = {"tasks": ARRAYS} | changes
        return bench.run(bench.stream(**options), training=SMALL).name

    changed = [((X[0] + 1e-6 * (np.arange(30) == 3)[:, None], Y[0]), ARRAYS[0][1]), ARRAYS[1]]
    cut = [((X[0][:29], Y[0][:29]), (np.concatenate([X[0][29:], X[1]]), np.concatenate([Y[0][29:], Y[1]]))), ARRAYS[1]]
    names = [config(), config(tasks=changed), config(tasks=cut), config(tasks=ARRAYS[::-1]), config(name="mine"),
             config(scenario="class"), config(names=["a", "b"]), config(tasks=[t[0] for t in ARRAYS], test=0.2)]  # fmt: skip
    assert len(set(names)) == len(names)
    assert config() == names[0]
    assert names[4].startswith("mine-finetune-seed0-")


@pytest.mark.parametrize("method", ["finetune", "joint", "replay", "agem", "lwf", "default", EWC()], ids=str)
def test_methods_learn_a_stream_of_ones_own(method):
    y = [np.arange(30) % 3 for _ in range(4)]
    x = [rows + 3 * np.eye(4)[labels] for rows, labels in zip(X, y, strict=True)]
    stream = bench.stream([((x[0], y[0]), (x[1], y[1])), ((x[2], y[2]), (x[3], y[3]))], names=["first", "second"])
    record = bench.run(stream, method, training=Training(hidden=(16,), epochs=20))
    assert record.stream == "custom"
    assert record.config["stream"]["names"] == ["first", "second"]
    assert record.average > 0.6


def test_tuning_reads_training_examples_of_the_first_tasks():
    found = bench.tune(bench.stream(ARRAYS, "class", name="mine"), "recipe", [0.1, 1], training=SMALL, tasks=1)
    assert (found.stream, found.metric, len(found.trials)) == ("mine", "accuracy", 2)


class Endless(torch_data.IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(4), 0)])


def changed(x=X[0], y=Y[0]):
    return [((x, y), (X[1], Y[1])), ARRAYS[1]]


NAN = np.where(np.arange(120).reshape(30, 4) == 21, np.nan, X[0])
IMPOSSIBLE = {
    "no tasks": (lambda: bench.stream([]), "`tasks` is none"),
    "a mapping": (lambda: bench.stream({"a": ARRAYS[0]}), "`tasks` is a `dict`"),
    "no test data": (lambda: bench.stream([(X[0], Y[0])]), "no pair of training and test data"),
    "no test key": (lambda: bench.stream([{"train": (X[0], Y[0])}]), "have the keys train; `train` and `test` belong"),
    "test data twice": (lambda: bench.stream(ARRAYS, test=0.2), "Leave one of them away"),
    "a share of all": (lambda: bench.stream([ARRAYS[0][0]], test=1.0), "cannot be held out"),
    "names": (lambda: bench.stream(ARRAYS, names=["a"]), "There are 1 different names for 2 tasks"),
    "a built-in name": (lambda: bench.stream(ARRAYS, name="split-digits"), "cannot be named `split-digits`"),
    "no name": (lambda: bench.stream(ARRAYS, name=""), "cannot be named"),
    "a scenario": (lambda: bench.stream(ARRAYS, "both"), "no scenario `both`"),
    "an iterable": (lambda: bench.stream([(Endless(), Endless())]), "collect what has no length"),
    "a loader of one": (
        lambda: bench.stream([{"train": torch_data.DataLoader(Endless()), "test": ARRAYS[0][0]}]), "came as a `Endless`"
    ),
    "a number": (lambda: bench.stream([(3, 4)]), "Task 1's training data came as a `int`"),
    "no pairs": (lambda: bench.stream([{"train": list(X[0]), "test": ARRAYS[0][0]}]), "An item of task 1's training data is"),
    "dictionaries": (lambda: bench.stream([([{"x": 1.0, "y": 0}], ARRAYS[0][0])]), "is a `dict`"),
    "shapes in a data set": (
        lambda: bench.stream([([(torch.zeros(2), 0), (torch.zeros(3), 1)], ARRAYS[0][0])]), "cannot be joined"
    ),
    "ragged lists": (lambda: bench.stream(changed([[1.0], [1.0, 2.0]], [0, 1])), "are no array"),
    "other lengths": (lambda: bench.stream(changed(y=Y[0][:-1])), "There are 30 inputs and 29 labels"),
    "no examples": (lambda: bench.stream(changed(X[0][:0], Y[0][:0])), "There are 0 inputs and 0 labels"),
    "an empty data set": (lambda: bench.stream([([], ARRAYS[0][0])]), "inputs of task 1's training data"),
    "one dimension": (lambda: bench.stream(changed(X[0][:, 0])), r"are of shape \(30,\)"),
    "names as inputs": (lambda: bench.stream(changed(list("abc"), [0, 1, 2])), "are of names"),
    "tables of words": (lambda: bench.stream(changed(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), [0, 1])), "of type object"),
    "dates": (lambda: bench.stream(changed(np.zeros((30, 2), "datetime64[s]"))), "of type datetime64"),
    "complex": (lambda: bench.stream(changed(torch.zeros(30, 4, dtype=torch.cfloat))), "real numbers"),
    "NaN": (lambda: bench.stream(changed(NAN)), r"missing, infinite or too large \(number 5, counted from 0\)"),
    "infinite": (lambda: bench.stream(changed(X[0] / 0.0)), "missing, infinite or too large"),
    "too large": (lambda: bench.stream(changed(X[0] * 1e300)), "missing, infinite or too large"),
    "a word": (lambda: bench.stream(changed(np.full((30, 4), 9)), tokens=9), "no whole number from 0 to 8"),
    "half a word": (lambda: bench.stream(changed(np.full((30, 4), 0.5)), tokens=9), "no whole number from 0 to 8"),
    "missing names": (lambda: bench.stream(changed(X[0][:2], ["a", None])), "`NoneType`"),
    "names and numbers": (lambda: bench.stream(changed(X[0][:2], ["a", 1])), r"`int` \(number 1"),
    "other labels": (lambda: bench.stream(changed(X[0][:2], ["a", "b"])), "Give all tasks one form"),
    "several labels": (lambda: bench.stream(changed(y=np.stack([Y[0]] * 2, 1))), r"have shape \(30, 2\)"),
    "other inputs": (lambda: bench.stream(changed(X[0][:, :3])), r"of shape \(3,\), and task 1's test data of shape"),
    "a label": (lambda: bench.stream([(ARRAYS[0][0], (X[1], Y[1] * 5)), ARRAYS[1]]), "task 1 have the label 5"),
    "a label of another task": (
        lambda: bench.stream([((X[0], Y[0] + 1), (X[1], Y[1])), ARRAYS[1]], "class"), "label 0, which its training data lack"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_does_not_fit_is_refused_in_words(what):
    call, words = IMPOSSIBLE[what]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert re.fullmatch(r"[A-Z`](.|\n)*\.", str(error.value))
