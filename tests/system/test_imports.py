"""Rules, learners and models of one's own: by import path from the command line, in workers, in records, and from Python."""

import functools
import importlib
import json
import re
import shlex
import sys

import loky
import pytest
import torch
from torch import nn

from rwalk import RWalk, bench, report
from rwalk.bench import Training
from rwalk.cli.main import main
from rwalk.report.names import names
from rwalk.report.reproduce import commands

OWN = """
from dataclasses import dataclass

import torch
from torch import nn

from rwalk import EWC, RWalk


@dataclass(frozen=True)
class Mine(RWalk):
    alpha: float = 0.5
    outputs: int = 7


def measured(outputs):
    return EWC(samples=10 * outputs)


gentle = RWalk(alpha=0.25)


class Prior:
    def __init__(self, outputs):
        self.counts = torch.zeros(outputs)

    def fit(self, experience):
        self.counts += torch.bincount(experience.train.labels(), minlength=len(self.counts))

    def predict(self, x, seen):
        labels = torch.tensor(sorted(seen))
        return labels[self.counts[labels].argmax()].expand(len(x))


prior = Prior(10)


def by_task(experience):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, experience.outputs))


def by_name(inputs, outputs, width=32, *, tokens, **unused):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs + tokens, width), nn.ReLU(), nn.Linear(width, outputs))


def by_shape(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, shape[1]), nn.Flatten(), nn.Linear(4, classes))


class Net(nn.Sequential):
    def __init__(self, num_classes=1000):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))


class Ten(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


class Space:
    net = staticmethod(by_task)


def thousand(weights=None):
    return Net(1000)


def deep(width, depth):
    return Ten()


def broken():
    raise RuntimeError("no file of weights")


def chances(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.Softmax(1))


ready = Ten()  # which draws random numbers when the module is imported
"""
QUICK = ["run", "split-digits", "--seeds", "1", "--tasks", "2", "--batch-size", "100", "--hidden", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the module, which is the current one; the module is imported anew, also by workers."""
    loky.get_reusable_executor(2).shutdown(kill_workers=True)  # those of an earlier test are in its folder
    (tmp_path / "own_things.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_things", None)


@pytest.fixture
def own(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    return importlib.import_module("own_things")


def records(folder):
    return {r["method"]: r for r in (json.loads(path.read_text()) for path in folder.glob("*.json"))}


def test_methods_by_import_path_are_run_in_workers_recorded_and_repeated(here, capsys):
    names = ["Mine", "measured", "gentle", "Prior"]
    words = ["--methods", ",".join(f"own_things:{name}" for name in names), "--model", "own_things:by_name", "--strength", "3"]
    assert main([*QUICK, *words, "--workers", "2", "--out", "out"]) == 0
    found = records(here / "out")
    assert found.keys() == {f"own_things:{name}" for name in names}
    rules = {name: found[f"own_things:{name}"]["config"].get("rule", {}) for name in names}
    assert (rules["Mine"]["alpha"], rules["Mine"]["outputs"]) == (0.5, 7), "a rule's fields are its own"
    assert rules["measured"]["samples"] == 100
    assert rules["gentle"]["alpha"] == 0.25
    assert found["own_things:Mine"]["config"]["strength"] == 3
    assert found["own_things:Prior"]["scores"][-1][0] == pytest.approx(0.2, abs=0.02)
    (command,) = {record.command for record in report.read(here / "out")[0]}
    assert main([*shlex.split(command)[1:-1], "again"]) == 0
    assert {name: r["scores"] for name, r in records(here / "again").items()} == {
        name: r["scores"] for name, r in found.items()
    }


def test_a_command_repeats_the_runs_of_records_without_one(here, capsys):
    assert main([*QUICK, "--methods", "own_things:Mine", "--model", "own_things:Net", "--out", "out"]) == 0
    (record,) = report.read(here / "out")[0]
    (path,) = (here / "out").glob("*.json")
    path.unlink()
    record = bench.Record(**{**vars(record), "command": ""})
    (line,) = commands(report.summarise([record])[0]).lines
    assert "--methods own_things:Mine" in line
    assert "--model own_things:Net" in line
    assert main([*shlex.split(line)[1:], "--out", "out"]) == 0
    assert [p.name for p in (here / "out").glob("*.json")] == [path.name]
    lambdas = bench.Record(**{**vars(record), "config": record.config | {"training": {"model": "__main__:<lambda>"}}})
    assert "its model was made in Python" in commands(report.summarise([lambdas])[0]).notes[0]


@pytest.mark.parametrize(("name", "size"), [
    ("by_task", 650), ("by_name", 65 * 32 + 33 * 10), ("by_shape", 4 * 65 + 50), ("Net", 650), ("Ten", 650), ("Space.net", 650),
])  # fmt: skip
def test_models_are_given_what_they_ask_for(name, size, own):
    tasks = bench.split("digits", tasks=2)
    record = bench.run(tasks, training=Training(model=f"own_things:{name}"))
    assert record.memory["model_bytes"] == 4 * size
    there = functools.reduce(getattr, name.split("."), own)
    again = bench.run(tasks, training=Training(model=there))
    assert again.scores == record.scores
    assert again.config["training"]["model"] in (f"own_things:{name}", "own_things:by_task")


@pytest.mark.parametrize(("option", "name", "match"), [
    ("model", "thousand", r"\(2, 1000\).*has to give scores of shape \(2, 10\)"), ("model", "deep", "it needs `width`"),
    ("model", "chances", "gives probabilities.*Leave its last softmax out"), ("model", "ready", "a network already"),
    ("model", "broken", "RuntimeError: no file of weights"), ("model", "Prior", "object of type Prior"),
    ("methods", "Ten", "object of type Ten"), ("methods", "prior", "neither a class nor a function"),
    ("methods", "ready", "a network already"), ("methods", "absent", "has no attribute 'absent'"),
    ("methods", "", "cannot be made"),
    ("methods", "deep", "it needs `width`.*may ask for task, shape, inputs, outputs"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(option, name, match, here, capsys):
    words = {"methods": "finetune"} | {option: f"own_things:{name}"}
    assert main([*QUICK, *(f"--{key}={value}" for key, value in words.items()), "--out", "out"]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert error.startswith(f"rwalk: {option.rstrip('s').capitalize()} `own_things:{name}` ")
    assert re.search(match, error), error
    assert not (here / "out").exists()


def test_a_module_that_is_not_there(here, capsys):
    assert main([*QUICK, "--methods", "nowhere:Rule", "--out", "out"]) == 2
    assert "No module named 'nowhere'" in capsys.readouterr().err


def test_a_rule_by_import_path_is_tuned(here, capsys):
    words = ["tune", *QUICK[1:], "--methods", "own_things:Mine", "--strength", "1,10", "--tune-tasks", "1", "--out", "out"]
    assert main(words) == 0
    assert "--methods own_things:Mine --strength" in " ".join(capsys.readouterr().out.split())


def linear(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
def test_a_model_that_no_path_finds_is_run_and_named_and_kept_in_no_file(tmp_path):
    tasks = bench.split("digits", tasks=2)
    nameless = [lambda task: linear(64, task.outputs), functools.partial(linear, 64, outputs=10)]
    truth = bench.run(tasks, RWalk(), training=Training(model=linear))
    for model, name in zip(nameless, ("test_imports:test_a_model", "test_imports:linear(64, outputs=10)"), strict=True):
        record = bench.run(tasks, RWalk(), training=Training(model=model))
        assert record.config["training"]["model"].startswith(name)
        assert record.scores == truth.scores
        for refused in (
            lambda m=model: bench.run(tasks, training=Training(model=m), checkpoint=tmp_path / "c"),
            lambda m=model: bench.tune(tasks, RWalk(), training=Training(model=m), tasks=1, out=tmp_path / "t"),
        ):
            with pytest.raises(ValueError, match=r"know a model by its import path.*top of a module"):
                refused()
    assert not any(tmp_path.iterdir())
    found = bench.tune(tasks, RWalk(), [1, 10], training=Training(model=nameless[0]), tasks=2, workers=2)
    assert found.strength in (1, 10)


def test_a_network_in_place_of_what_makes_it_is_refused():
    with pytest.raises(TypeError, match="a `Linear`, which runs would share; pass its name, or the class"):
        Training(model=nn.Linear(2, 2))


class Linear:
    """A learner with a training loop of its own."""

    def __init__(self, outputs=10, training=None, seed=0, rate=0.1):
        self.model, self.rate = linear(64, outputs), rate
        self._order = torch.Generator().manual_seed(seed)
        self._epochs = 1 if training is None else training.epochs

    def fit(self, experience):
        x, y = experience.train.read()
        for _ in range(self._epochs):
            for rows in torch.randperm(len(y), generator=self._order).split(20):
                grads = torch.autograd.grad(nn.functional.cross_entropy(self.model(x[rows]), y[rows]), self.model.parameters())
                with torch.no_grad():
                    for parameter, grad in zip(self.model.parameters(), grads, strict=True):
                        parameter -= self.rate * grad

    def predict(self, x, seen):
        labels = torch.tensor(sorted(seen))
        return labels[self.model(x)[:, labels].argmax(1)]


def test_a_learner_starts_anew_in_each_run():
    tasks, learner = bench.split("digits", tasks=2), Linear()
    first, second = (bench.run(tasks, learner) for _ in range(2))
    assert first.scores == second.scores
    assert first.scores[0][0] > 0.9
    assert learner.predict(tasks[0].test.read()[0], {0}).unique().tolist() == [0]


def test_learners_of_one_class_are_told_apart_by_their_settings():
    tasks = bench.split("digits", tasks=2)
    found = [bench.run(tasks, Linear(rate=rate), seed=seed) for rate in (0.1, 0.001) for seed in range(2)]
    assert len({record.name for record in found}) == 4
    (comparison,) = report.summarise(found)
    assert [line.seeds for line in comparison.lines] == [[0, 1], [0, 1]]
    assert [name.partition("(")[2] for name in names(comparison)] == ["rate 0.1)", "rate 0.001)"]


def test_a_learner_is_given_the_training_and_the_seed_that_it_asks_for():
    tasks = bench.split("digits", tasks=2)
    one, other, three = (
        bench.run(tasks, Linear, seed=seed, training=Training(epochs=epochs)) for seed, epochs in ((0, 1), (1, 1), (0, 3))
    )
    assert one.method == "linear"
    assert one.scores == bench.run(tasks, Linear).scores
    assert one.average != other.average
    assert three.average > one.average
    function = bench.run(tasks, lambda seed, training: Linear(10, training, seed), seed=1)
    assert function.scores == other.scores


def test_a_rules_class_is_the_rule():
    tasks = bench.split("digits", tasks=2)
    assert bench.run(tasks, RWalk).scores == bench.run(tasks, RWalk()).scores
    assert bench.run(tasks, RWalk).method == "rwalk"


def test_what_cannot_be_copied_is_refused():
    class Locked(Linear):
        def __deepcopy__(self, memo):
            raise TypeError("it has a lock")

    with pytest.raises(ValueError, match=r"The learner Locked cannot be copied.*pass the class, or a function"):
        bench.run(bench.split("digits", tasks=2), Locked())


def test_records_of_code_that_was_edited_are_not_taken_for_new_ones(here, capsys):
    words = [*QUICK, "--methods", "own_things:Prior", "--out", "out"]
    for _ in range(2):
        assert main(words) == 0
    assert "on disk" in capsys.readouterr().out
    (here / "own_things.py").write_text(OWN.replace("argmax()", "argmin()"))
    sys.modules.pop("own_things")
    assert main(words) == 0
    assert "on disk" not in capsys.readouterr().out
    (comparison,) = report.summarise(report.read(here / "out")[0])
    assert len(comparison.lines) == 2
    assert all("code" in name for name in names(comparison))
