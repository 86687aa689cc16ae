"""A strength for each method, beside the one for all."""

import json

import pytest

from rwalk.bench import Record
from rwalk.cli.main import main

QUICK = ["--seeds", "1", "--hidden", "4", "--batch-size", "100", "--tasks", "3"]


def strengths(folder):
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((r["method"], r["config"].get("strength")) for r in found)


def test_a_methods_own_strength_goes_before_that_of_all(tmp_path, capsys):
    words = ["--methods", "finetune,rwalk,ewc,default,recipe,lwf", "--strength", "2", "--ewc.strength", "7,8"]
    words += ["--default.strength", "0.5", "--lwf.strength", "3"]
    assert main(["run", "split-digits", *QUICK, *words, "--out", str(tmp_path)]) == 0
    assert strengths(tmp_path) == [
        ("default", 0.5), ("ewc", 7), ("ewc", 8), ("finetune", None), ("lwf", 3), ("recipe", 2), ("rwalk", 2),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "ewc strength 7 seed 0" in printed
    (path,) = tmp_path.glob("*rwalk*.json")
    assert "strength" not in Record.load(path).config["rule"]


def test_without_one_for_all_the_others_keep_their_defaults(tmp_path):
    words = ["--methods", "rwalk,recipe,task-fisher", "--task-fisher.strength", "4"]
    assert main(["run", "split-digits", *QUICK, *words, "--out", str(tmp_path)]) == 0
    assert strengths(tmp_path) == [("recipe", 0.1), ("rwalk", 1), ("task_fisher", 4)]


def test_each_method_is_tuned_on_its_own_strengths_and_runs_with_what_was_found(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    tune = ["--methods", "rwalk,ewc", "--strength", "1,2", "--ewc.strength", "5", "--ewc.samples", "9", "--tune-tasks", "2"]
    assert main(["tune", "split-digits", *QUICK, *tune, *out]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert {method for method, _ in strengths(tmp_path / "tuning")} == {"rwalk", "ewc"}
    assert {s for m, s in strengths(tmp_path / "tuning") if m == "ewc"} == {5}
    assert {s for m, s in strengths(tmp_path / "tuning") if m == "rwalk"} == {1, 2}
    assert "--ewc.strength" not in printed
    for_rwalk, for_ewc = (part.split("--skip")[0] for part in printed.split("rwalk run ")[1:3])
    assert "--ewc.samples" not in for_rwalk, "the command for one method has no options of another"
    assert "--ewc.samples 9" in for_ewc
    run = ["--methods", "rwalk,ewc", "--ewc.samples", "9", "--rwalk.strength", "tuned", "--ewc.strength", "3", "--skip", "2"]
    assert main(["run", "split-digits", *QUICK, *run, *out]) == 0
    assert strengths(tmp_path)[0] == ("ewc", 3)
    assert strengths(tmp_path)[1][1] in (1, 2)


@pytest.mark.parametrize(("words", "match"), [
    (["run", "--methods", "rwalk", "--ewc.strength", "3"], "--ewc.strength is for `ewc`, which is not among --methods"),
    (["tune", "--rwalk.strength", "tuned"], "--strength tuned is for `rwalk run`"),
    (["run", "--rwalk.strength", "much"], "much is not understood; pass numbers with commas between, or tuned"),
    (["run", "--rwalk.strength", "tuned"], "no tuned strength for `rwalk`"),
])  # fmt: skip
def test_contradictions(words, match, tmp_path, capsys):
    assert main([words[0], "split-digits", *QUICK, *words[1:], "--out", str(tmp_path / "out")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
