"""Tuning: what it tries, on which examples, what it chooses, and that it goes on."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch

from rwalk import EWC, RWalk, bench
from rwalk.bench import Record, Training, search
from rwalk.bench.holdout import early, later
from rwalk.bench.pool import Failure, Outcome
from rwalk.bench.spec import RunSpec
from rwalk.bench.tuned import Tuned
from rwalk.cli import main

SMALL = Training(hidden=(8,), batch_size=50)
QUICK = ["--hidden", "8", "--batch-size", "50"]


def stream(tasks=5):
    return bench.permuted("digits", tasks=tasks, seed=4)


class Untouchable:
    """A part of the data that must not be read."""

    def __len__(self):
        raise AssertionError("read")

    read = __len__


def test_neither_test_examples_nor_later_tasks_are_read():
    tasks = stream()
    shut = [replace(e, test=Untouchable(), train=e.train if e.task < 2 else Untouchable()) for e in tasks]
    options = {"strengths": [0.1, 1], "training": SMALL, "tasks": 2}
    assert bench.tune(shut, RWalk(), **options) == bench.tune(tasks, RWalk(), **options)


@pytest.mark.parametrize("make", [bench.permuted, bench.split], ids=lambda m: m.__name__)
def test_held_out_examples_and_the_others_are_the_training_examples(make):
    whole = make("digits", tasks=5)
    first = early(whole, tasks=2, validation=0.25)
    assert len(first) == 2
    for experience, now in zip(whole, first, strict=False):
        x, y = experience.train.read()
        kept, held = now.train.read(), now.test.read()
        assert len(held[1]) == round(0.25 * len(y))
        rows = [tuple(map(float, [*a.flatten(), b])) for a, b in zip(x, y, strict=True)]
        ours = [tuple(map(float, [*a.flatten(), b])) for part in (kept, held) for a, b in zip(*part, strict=True)]
        assert sorted(rows) == sorted(ours)
        again = early(whole, tasks=2, validation=0.25)[now.task].test.read()
        assert torch.equal(again[0], held[0])
    assert first[0].stream["name"] == f"{whole[0].stream['name']}-validation"


def test_later_tasks_are_the_others_counted_anew():
    whole = bench.split("digits", tasks=5, scenario="class")
    left = later(whole, tasks=3)
    assert [e.task for e in left] == [0, 1]
    assert [e.classes for e in left] == [e.classes for e in whole[3:]]
    assert left[0].stream["tasks"] == 2
    assert bench.run(left, "finetune", training=SMALL).scores[0][1] is None
    assert later(whole, 0) == whole


def test_the_choice_is_the_best_of_plain_runs():
    """Truth: each run done by hand."""
    strengths, rates, seeds = [0.01, 1.0], [0.03, 0.1], (0, 1)
    tuned = bench.tune(stream(), RWalk(), strengths, rates, seeds, SMALL, tasks=2)
    first = early(stream(), 2)
    means = {}
    for strength in strengths:
        for lr in rates:
            runs = [bench.run(first, RWalk(), strength, seed, replace(SMALL, lr=lr)) for seed in seeds]
            means[strength, lr] = sum(r.average for r in runs) / 2
    assert {(t["strength"], t["lr"]): t["accuracy"] for t in tuned.trials} == pytest.approx(means)
    assert (tuned.strength, tuned.lr) == max(means, key=means.get)
    assert tuned.accuracy == pytest.approx(max(means.values()))
    assert tuned.edge == ["strength", "lr"]  # two values have no middle
    assert tuned.tasks == 2


def test_by_default_nine_strengths_around_the_methods_own_are_tried():
    for method, default in (("recipe", 0.1), (RWalk(), 1.0)):
        found = search.Search(RunSpec(early(stream()), method, training=SMALL), None, None, (0,))
        assert [p["strength"] for p in found.grid] == pytest.approx([default * s for s in search.SPREAD])


def test_workers_and_a_folder_change_nothing_and_the_same_call_goes_on(tmp_path, monkeypatch):
    options = {"strengths": [0.1, 1, 10], "training": Training(hidden=(8,), batch_size=50), "tasks": 2, "refine": 5}
    plain = bench.tune(stream(), "recipe", **options)
    assert len(plain.trials) == 8
    proposed = [t["strength"] for t in plain.trials if t["strength"] not in (0.1, 1, 10)]
    assert len(set(proposed)) == 5
    assert all(0.1 <= s <= 10 for s in proposed)
    assert bench.tune(stream(), "recipe", **options, workers=2, out=tmp_path) == plain
    assert len(list(tmp_path.glob("*.json"))) == 8
    monkeypatch.setattr(RunSpec, "run", None)
    assert bench.tune(stream(), "recipe", **options, out=tmp_path) == plain, "Optuna's journal has all trials"


def test_a_search_that_was_stopped_continues_from_optunas_journal(tmp_path, monkeypatch):
    """Truth: the search that was not stopped. The first attempt ends in the middle of the grid, the second in refining."""
    options = {"strengths": [0.1, 1, 10], "training": Training(hidden=(8,), batch_size=50), "tasks": 2, "refine": 5}
    plain = bench.tune(stream(), "recipe", **options)
    run, done = RunSpec.run, []

    def stopping(spec, *arguments, **more):
        if len(done) in (2, 5):
            done.append(None)
            raise KeyboardInterrupt
        done.append(spec.strength)
        return run(spec, *arguments, **more)

    monkeypatch.setattr(RunSpec, "run", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bench.tune(stream(), "recipe", **options, out=tmp_path)
    for record in tmp_path.glob("*.json"):
        record.unlink()
    found = bench.tune(stream(), "recipe", **options, out=tmp_path)
    assert len(found.trials) == 8
    assert len([s for s in done if s is not None]) == 8, "no trial was done twice"
    assert [t for t in found.trials if t["strength"] in (0.1, 1, 10)] == [
        t for t in plain.trials if t["strength"] in (0.1, 1, 10)
    ]


def test_refining_a_single_pair_of_values_ends():
    found = bench.tune(stream(), RWalk(), [1.0], training=SMALL, tasks=1, refine=2)
    assert [t["strength"] for t in found.trials] == [1.0] * 3


def test_a_trial_whose_worker_died_is_tried_again_by_the_same_call(tmp_path):
    spec, calls = RunSpec(early(stream(), 1), RWalk(), training=SMALL), []

    def evaluate(specs):
        for run in specs:
            calls.append(run.strength)
            died = len(calls) == 1
            yield run, Outcome(Failure("A worker died.", known=False) if died else run.run())

    results = [search.Search(spec, [0.1, 1.0], None, (0,)).result(evaluate, tmp_path) for _ in range(2)]
    assert [t["failures"] for t in results[0].trials] == [["A worker died."], []]
    assert [t["failures"] for t in results[1].trials] == [[], []]
    assert calls == [0.1, 1.0, 0.1]


def test_a_journal_that_is_none_is_named(tmp_path):
    options = {"strengths": [0.1, 1], "training": SMALL, "tasks": 1, "out": tmp_path}
    bench.tune(stream(), EWC(), **options)
    (journal,) = tmp_path.glob("*.journal")
    for content in (b"{", b"[]\n{}\n", b"\0" * 50 + b"\n\n"):
        journal.write_bytes(content)
        with pytest.raises(ValueError, match=r"journal` cannot be read as Optuna's journal.*Move it away"):
            bench.tune(stream(), EWC(), **options)


def test_a_strength_that_fails_is_not_chosen(recwarn):
    tuned = bench.tune(stream(), RWalk(), [1, 1e6], training=Training(), tasks=2)
    assert tuned.strength == 1
    assert tuned.trials[1]["accuracy"] is None
    assert "not finite" in tuned.trials[1]["failures"][0]
    with pytest.raises(ValueError, match=r"No run of `rwalk` succeeded.*gradients"):
        bench.tune(stream(), RWalk(), [1e6, 2e6], training=Training(), tasks=2)


@pytest.mark.parametrize(("options", "word"), [
    ({"strengths": [0, 1]}, "strength among"), ({"learning_rates": [float("nan")]}, "learning rate among"),
    ({"tasks": 6}, "6 tasks cannot be taken from a stream of 5"), ({"tasks": 0}, "0 tasks"), ({"validation": 0}, "share of 0 "),
    ({"validation": 1.0}, "share of 1.0"), ({"validation": 1e-9}, "share of 1e-09"), ({"refine": -1}, "-1 trials"),
    ({"method": "finetune"}, "Method `finetune` has no strength"),
])  # fmt: skip
def test_mistakes_are_named(options, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        bench.tune(stream(), **{"method": RWalk(), "training": SMALL, **options})


def test_a_result_is_saved_whole(tmp_path):
    tuned = bench.tune(stream(), EWC(), [0.1, 1], training=SMALL, tasks=1)
    path = tuned.save(tmp_path)
    assert Tuned.load(path) == tuned
    for content in (b"{", b"{}", path.read_bytes().replace(b'"strength": 1', b'"strength": "1"').replace(b'"lr"', b'"no"')):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no tuned strength.*Tune again"):
            Tuned.load(path)


def test_from_the_command_line_to_the_runs_that_count(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    words = ["permuted-digits", *QUICK, *out, "--tasks", "4", "--rwalk.alpha", "0.5"]
    tune = ["tune", *words, "--method", "rwalk", "--tune-tasks", "2", "--strength", "0.1,0.5,1", "--learning-rates", "0.1,0.2"]
    assert main.main(tune) == 0
    printed = capsys.readouterr().out
    tuned = Tuned.load(next(tmp_path.glob("*.tuned")))
    assert tuned.trials == bench.tune(
        bench.permuted("digits", tasks=4), RWalk(alpha=0.5), [0.1, 0.5, 1], [0.1, 0.2], training=SMALL, tasks=2
    ).trials  # fmt: skip
    assert f"Chosen: strength {tuned.strength:g}, learning rate {tuned.lr:g}" in printed
    assert main.main(tune) == 0
    again = capsys.readouterr().out
    assert "average accuracy" not in again, "the search is done"
    assert (
        again
        == printed[printed.index("\npermuted-digits") if printed.startswith("\npermuted") else printed.index("\nrwalk on") :]
    )
    command = shlex.split(printed.split("Run: ")[1])
    assert command[0] == "rwalk"
    assert main.main([*command[1:], "--seeds", "1"]) == 0
    (record,) = [Record.load(p) for p in tmp_path.glob("*.json")]
    assert record.config["strength"] == tuned.strength
    assert record.config["training"]["lr"] == tuned.lr
    assert record.config["rule"]["alpha"] == 0.5
    assert len(record.scores) == 2
    capsys.readouterr()
    by_name = ["run", *words, "--methods", "finetune,rwalk", "--strength", "tuned", "--skip", "2", "--seeds", "1"]
    assert main.main([*by_name, "--lr", repr(tuned.lr)]) == 0
    assert "rwalk seed 0: average accuracy" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert main.main([*by_name, "--lr", "0.5"]) == 2
    assert f"The strength was tuned with --lr {tuned.lr:g}, not 0.5" in capsys.readouterr().err
    assert main.main([*by_name, "--epochs", "2"]) == 2
    assert "no tuned strength for `rwalk` on permuted-digits with these settings" in capsys.readouterr().err
    assert main.main(["report", str(tmp_path)]) == 0
    report = capsys.readouterr()
    assert report.err == ""
    assert "permuted-digits-validation" in report.out


@pytest.mark.parametrize(("arguments", "word"), [
    (["--strength", "tuned"], "--strength tuned is for"), (["--skip", "1"], "--skip 1 is for"),
    (["--methods", "joint"], "Method `joint` has no strength"), (["--learning-rates", "a"], "--learning-rates a"),
    (["--strength", "0"], "A strength among"), (["--tune-tasks", "9"], "9 tasks cannot be taken from a stream of 5"),
])  # fmt: skip
def test_mistakes_on_the_command_line(arguments, word, tmp_path, capsys):
    assert main.main(["tune", "split-digits", *QUICK, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"rwalk: {word}")
    assert not any(tmp_path.iterdir())


def test_a_search_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ValueError, match=r"Tuning needs the package `optuna` .*Run: pip install 'rwalk\[tune\]'"):
        bench.tune(stream(), RWalk(), [1], training=SMALL)


def test_the_file_of_a_search_is_json_with_all_trials(tmp_path):
    path = bench.tune(stream(), RWalk(), [0.1, 1], training=SMALL, tasks=1).save(tmp_path)
    content = json.loads(path.read_text())
    assert [t["strength"] for t in content["trials"]] == [0.1, 1]
    assert content["config"]["stream"]["validation"] == 0.2
