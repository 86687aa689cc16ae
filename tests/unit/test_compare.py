"""Comparisons of two sets of records: intervals and effect sizes against SciPy and by hand, and what is matched with what."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from rwalk.bench.record import Record
from rwalk.cli.main import main
from rwalk.report import compare, terminal
from rwalk.report.compare import comparable


def record(seed=0, last=0.5, method="rwalk", step_ms=None, stream="permuted-x", lr=0.1, **config):
    """Two tasks; the average accuracy is `last`, and what is forgotten 0.9 less `last`."""
    setting = {"stream": {"name": stream, "tasks": 2, "seed": seed}, "training": {"lr": lr, "hidden": [8, 8]}}
    timings = {} if step_ms is None else {"step_ms": step_ms}
    return Record(method, stream, seed, [[0.9, None], [last, last]], config=setting | config, timings=timings)


def records(accuracies, first=0, **options):
    return [record(first + i, value, **options) for i, value in enumerate(accuracies)]


def only(a, b):
    """The one pair of two sets, and its effect on accuracy."""
    (pair,) = compare(a, b).pairs
    return pair, pair.effects[0] if pair.effects else None


def shown(contrast, width=100):
    file = io.StringIO()
    terminal.show_contrast(contrast, "one", "two", Console(file=file, width=width))
    return file.getvalue()


A, B = [0.50, 0.60, 0.55, 0.52], [0.56, 0.63, 0.62, 0.54]


HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)


def test_equal_seeds_are_paired():
    """Differences .06, .03, .07, .02: mean .045, deviation .0238048; t of three degrees of freedom is 3.182446."""
    pair, effect = only(records(A), records(B)[::-1])
    assert effect.difference == pytest.approx(0.045)
    assert effect.interval == pytest.approx((0.045 - 3.182446 * 0.0238048 / 2, 0.045 + 3.182446 * 0.0238048 / 2), rel=1e-5)
    truth = stats.ttest_rel(B, A).confidence_interval(0.95)
    assert effect.interval == pytest.approx((truth.low, truth.high), rel=1e-9)
    spread = np.sqrt((np.var(A, ddof=1) + np.var(B, ddof=1)) / 2)
    bias = math.gamma(3 / 2) / (math.sqrt(3 / 2) * math.gamma(1))
    assert effect.g == pytest.approx(bias * 0.045 / spread)
    assert effect.verdict == "differs beyond seed noise"
    assert pair.effects[1].figure == "forgetting"
    assert pair.effects[1].difference == pytest.approx(-0.045)


def test_without_common_seeds_there_are_no_effects():
    contrast = compare(records(A), records([0.8, 0.7, 0.9], first=100))
    assert contrast.pairs[0].effects == ()
    assert "No figure that both have for a common seed." in shown(contrast)


@given(st.lists(st.tuples(HUNDREDTHS, HUNDREDTHS), min_size=3, max_size=8))
def test_intervals_are_those_of_scipy(pairs):
    a, b = zip(*pairs, strict=True)
    _, effect = only(records(a), records(b))
    if np.std(np.subtract(b, a)) < 1e-6:
        return  # SciPy warns: it divides by the spread
    truth = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert effect.interval == pytest.approx(tuple(truth), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("a", "b", "first", "interval", "verdict"), [
    ([0.5], [0.6], 0, None, "too few common seeds for a verdict"),
    ([0.5, 0.51], [0.6, 0.62], 0, (0.0415, 0.1685), "too few common seeds for a verdict"),
    ([0.5, 0.6, 0.7], [0.51, 0.58, 0.71], 0, True, "within seed noise"),
    ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], 0, (0, 0), "the same with every seed"),
    ([0.5], [0.5], 0, None, "the same with every seed"),
    ([0.25, 0.5, 0.75], [0.5, 0.75, 1.0], 0, (0.25, 0.25), "differs beyond seed noise"),
    ([0.5, 0.6, 0.7, 0.8], [0.6, 0.7, 0.9], 2, True, "too few common seeds for a verdict"),
    ([0.5, 0.6, 0.7, 0.8], [0.6, 0.75, 0.8], 1, True, "within seed noise"),
])  # fmt: skip
def test_few_seeds_and_no_spread(a, b, first, interval, verdict):
    _, effect = only(records(a), records(b, first))
    assert effect.verdict == verdict
    if isinstance(interval, tuple):
        assert effect.interval == pytest.approx(interval, abs=1e-4)
    else:
        assert (effect.interval is not None) == bool(interval)


def test_the_same_records_do_not_differ():
    both = records(A, step_ms=2.0, strength=1.0) + records(B, method="finetune")
    contrast = compare(both, both)
    assert (contrast.only_a, contrast.only_b) == ((), ())
    assert [pair.a for pair in contrast.pairs] == ["rwalk (strength 1)", "finetune"]
    for pair in contrast.pairs:
        assert pair.differences == {}
        assert {effect.interval for effect in pair.effects} == {(0.0, 0.0)}
        assert {effect.verdict for effect in pair.effects} == {"the same with every seed"}
    assert [effect.figure for effect in contrast.pairs[0].effects] == ["average accuracy", "forgetting", "ms a step"]
    assert "No setting differs." in shown(contrast)


def test_settings_that_differ_are_listed_each_with_its_values():
    a = [dataclasses.replace(r, versions={"torch": "2.6"}, threads=1) for r in records(A, rule={"alpha": 0.9}, strength=1.0)]
    b = [dataclasses.replace(r, versions={}, threads=4) for r in records(B, lr=0.2, rule={"alpha": 0.9, "eps": None})]
    a[1] = dataclasses.replace(a[1], versions={"torch": "2.7"})
    pair, _ = only(a, b)
    assert pair.differences == {
        "training.lr": ((0.1,), (0.2,)),
        "strength": ((1.0,), ()),
        "rule.eps": ((), (None,)),
        "versions.torch": (("2.6", "2.7"), ()),
        "threads": ((1,), (4,)),
    }
    printed = " ".join(shown(compare(a, b)).split())
    assert "versions.torch 2.6 | 2.7 not recorded" in printed
    assert "rule.eps not recorded None" in printed
    assert "seed" not in pair.differences


def test_the_partner_of_a_method_differs_from_it_in_the_fewest_settings():
    a = [*records(A, strength=1.0), *records(A, strength=2.0), *records(A, method="finetune"), *records(A, method="joint")]
    b = [*records(B, strength=2.0, lr=0.2), *records(B, strength=3.0, lr=0.2), *records(B, method="finetune", lr=0.2),
         *records(B, method="si", strength=1.0)]  # fmt: skip
    contrast = compare(a, b)
    assert {(pair.a, pair.b) for pair in contrast.pairs} == {
        ("rwalk (strength 2)", "rwalk (strength 2)"),
        ("finetune", "finetune"),
    }
    assert contrast.only_a == ("rwalk (strength 1)", "joint")
    assert contrast.only_b == ("rwalk (strength 3)", "si (strength 1)")
    printed = shown(contrast)
    assert "Only in A, with no partner: rwalk (strength 1), joint" in printed
    assert "Only in B, with no partner: rwalk (strength 3), si (strength 1)" in printed


def test_where_several_are_as_near_there_is_no_partner():
    several = [*records(A, strength=1.0), *records(A, strength=2.0)]
    contrast = compare(several, [*records(B, strength=3.0), *records(B, strength=4.0)])
    assert contrast.pairs == ()
    assert contrast.only_a == ("rwalk (strength 1)", "rwalk (strength 2)")


def test_two_single_methods_are_partners_whatever_they_are():
    pair, effect = only(records(A, method="ewc"), records(B, method="si"))
    assert (pair.a, pair.b) == ("ewc", "si")
    assert "method" in pair.differences
    assert effect is not None


def test_other_streams_are_not_comparable_and_still_listed():
    contrast = compare(records(A, stream="permuted-x"), records(B, stream="permuted-y", lr=0.3))
    (pair,) = contrast.pairs
    assert not comparable(pair.differences)
    assert pair.effects == ()
    assert set(pair.differences) == {"stream", "stream.name", "training.lr"}
    assert "Not comparable: the streams differ." in shown(contrast)


def test_a_setting_of_the_stream_that_an_older_record_lacks_is_no_other_stream():
    older = records(A)
    for one in older:
        del one.config["stream"]["tasks"]
    pair, effect = only(older, records(B))
    assert comparable(pair.differences)
    bare = [Record("rwalk", "permuted-x", i, [[value]]) for i, value in enumerate(A)]
    pair, effect = only(bare, records(B))
    assert comparable(pair.differences)
    assert effect.verdict == "differs beyond seed noise"


def test_seeds_of_one_side_alone_are_left_out():
    contrast = compare(records(A), records(B[:3], first=1))
    (pair,) = contrast.pairs
    assert pair.effects[0].seeds == (1, 2, 3)
    assert "Paired over seeds 1, 2, 3." in shown(contrast)


def test_runs_without_figures_are_left_out():
    """As of a run that diverged: nulls in the matrix and in timings."""
    broken = records(A, step_ms=1.0)
    broken[0] = dataclasses.replace(broken[0], scores=[[None, None], [None, None]], timings={"step_ms": None})
    pair, effect = only(broken, records(B, step_ms=2.0))
    assert effect.seeds == (1, 2, 3)
    assert pair.effects[2].a == (1.0, 1.0, 1.0)
    nothing = [dataclasses.replace(r, scores=[[None, None], [None, None]], timings={}) for r in records(A)]
    pair, effect = only(nothing, records(B))
    assert effect is None
    assert "No figure that both have for a common seed." in shown(compare(nothing, records(B)))
    assert compare([], []).pairs == ()
    assert compare([], records(A)).only_b == ("rwalk",)


CONFIG = {
    "stream": "x", "training": [1], "strength": {"a": []}, "rule": 7, "method": "other", "[/b]": "[/]" * 500,
    "\x1b]0;title\x07": "\u202e",
}  # fmt: skip
HOSTILE = {
    "method": "[bold red]\x1b[31m</td><script>",
    "stream": "\ud800[/]",
    "config": CONFIG,
    "timings": {"step_ms": "fast"},
}


def test_hostile_records_are_shown_as_text():
    a = [Record(seed=i, scores=[[v]], **HOSTILE) for i, v in enumerate(A)]
    b = [dataclasses.replace(r, config={**r.config, "rule": 8, "[/b]": []}) for r in a]
    for width in (20, 40, 80, 200):
        printed = shown(compare(a, b), width)
        assert "\x1b" not in printed
        assert max(map(len, shown(compare(a, b), 200).splitlines())) <= 200
        printed.encode()
    huge = [dataclasses.replace(r, timings={"step_ms": v}) for r, v in zip(a, [1e200, -1e200, 10**400, True], strict=True)]
    assert [e.figure for e in compare(huge, a).pairs[0].effects] == ["average accuracy"]
    deep = value = {}
    for _ in range(400):
        value["x"] = value = {}
    assert compare([dataclasses.replace(a[0], config=deep)], a).pairs


def saved(folder, some):
    for one in some:
        one.save(folder)
    return str(folder)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_command_takes_folders_and_files(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    a, b = saved(tmp_path / "a", records(A, step_ms=1.5)), saved(tmp_path / "b", records(B, lr=0.2, step_ms=1.25))
    (tmp_path / "a" / "bad.json").write_text('{"method": "\x1b[31m"')
    assert main(["compare", a, b]) == 0
    printed, error = capsys.readouterr()
    assert "bad.json" in error
    assert "\x1b" not in error
    words = " ".join(printed.split())
    assert "Differs beyond seed noise: average accuracy, forgetting, ms a step." in words
    assert "+4.50" in words
    assert "+0.71 to +8.29" in words
    assert "-0.25" in words
    assert "Paired over seeds 0, 1, 2, 3." in words
    (one,) = [path for path in (tmp_path / "a").iterdir() if "seed0" in path.name]
    assert main(["compare", str(one), b]) == 0
    assert "Too few common seeds for a verdict" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "word"), [
    (None, "has no records"), ("{", "has no record that can be read"),
    (json.dumps({"method": "m"}), "has no record that can be read"),
])  # fmt: skip
def test_folders_without_records_are_named(tmp_path, capsys, content, word):
    b = saved(tmp_path / "b", records(B))
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "a" / "x.json").write_text(content)
    assert main(["compare", str(tmp_path / "a"), b]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.splitlines()[-1].startswith("rwalk: ")
    assert main(["compare", str(tmp_path / "a" / "x.json"), b]) == 2
