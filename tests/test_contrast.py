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
from rwalk.cli import main
from rwalk.report import compare, compared


def record(seed=0, last=0.5, method="rwalk", step_ms=None, stream="permuted-x", lr=0.1, **config):
    """Two tasks; the average accuracy is `last`, and what is forgotten 0.9 less `last`."""
    setting = {"stream": {"name": stream, "tasks": 2, "seed": seed}, "training": {"lr": lr, "hidden": [8, 8]}}
    timings = {} if step_ms is None else {"step_ms": step_ms}
    return Record(method, stream, seed, [[0.9, None], [last, last]], config=setting | config, timings=timings)


def records(accuracies, first=0, **options):
    return [record(first + i, value, **options) for i, value in enumerate(accuracies)]


def only(a, b):
    """The one match of two sets, and its effect on accuracy."""
    (match,) = compare(a, b).matches
    return match, match.effects[0] if match.effects else None


def shown(contrast, width=100):
    file = io.StringIO()
    compared.show(contrast, "one", "two", Console(file=file, width=width))
    return file.getvalue()


A, B = [0.50, 0.60, 0.55, 0.52], [0.56, 0.63, 0.62, 0.54]


HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)


def test_equal_seeds_are_paired():
    """Differences .06, .03, .07, .02: mean .045, deviation .0238048; t of three degrees of freedom is 3.182446."""
    match, effect = only(records(A), records(B)[::-1])
    assert effect.paired
    assert effect.difference == pytest.approx(0.045)
    assert effect.interval == pytest.approx((0.045 - 3.182446 * 0.0238048 / 2, 0.045 + 3.182446 * 0.0238048 / 2), rel=1e-5)
    truth = stats.ttest_rel(B, A).confidence_interval(0.95)
    assert effect.interval == pytest.approx((truth.low, truth.high), rel=1e-9)
    spread = np.sqrt((np.var(A, ddof=1) + np.var(B, ddof=1)) / 2)
    bias = math.gamma(3 / 2) / (math.sqrt(3 / 2) * math.gamma(1))
    assert effect.effect == pytest.approx(bias * 0.045 / spread)
    assert (effect.measure, effect.verdict) == ("Hedges' g_av", "differs beyond seed noise")
    assert match.effects[1].figure == "forgetting"
    assert match.effects[1].difference == pytest.approx(-0.045)


def test_other_seeds_are_not_paired():
    _, effect = only(records(A), records([0.8, 0.7, 0.9], first=100))
    assert not effect.paired
    truth = stats.ttest_ind([0.8, 0.7, 0.9], A, equal_var=False).confidence_interval(0.95)
    assert effect.interval == pytest.approx((truth.low, truth.high), rel=1e-9)
    u, v = np.var(A, ddof=1), 0.01
    freedom = 3 * 2 * (u + v) ** 2 / (2 * u**2 + 3 * v**2)
    bias = math.gamma(freedom / 2) / (math.sqrt(freedom / 2) * math.gamma((freedom - 1) / 2))
    expected = bias * (0.8 - np.mean(A)) / math.sqrt((u + v) / 2)
    assert effect.effect == pytest.approx(expected)
    assert (effect.measure, effect.verdict) == ("Hedges' g*", "differs beyond seed noise")


@given(st.lists(st.tuples(HUNDREDTHS, HUNDREDTHS), min_size=3, max_size=8), st.booleans())
def test_intervals_are_those_of_scipy(pairs, paired):
    a, b = zip(*pairs, strict=True)
    _, effect = only(records(a), records(b, first=0 if paired else 50))
    if min(np.std(np.subtract(b, a)), np.std(a), np.std(b)) < 1e-6:
        return  # SciPy warns: it divides by the spread
    test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    assert effect.interval == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-6, abs=1e-9)
    assert effect.paired == paired


@pytest.mark.parametrize(("a", "b", "first", "paired", "interval", "verdict"), [
    ([0.5], [0.6], 0, True, None, "too few seeds to say"),
    ([0.5, 0.51], [0.6, 0.62], 0, True, (0.0415, 0.1685), "too few seeds to say"),
    ([0.5, 0.51], [0.6, 0.62], 9, False, True, "too few seeds to say"),
    ([0.5], [0.6, 0.61], 9, False, None, "too few seeds to say"),
    ([0.5, 0.6, 0.7], [0.51, 0.58, 0.71], 0, True, True, "within seed noise"),
    ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], 0, True, (0, 0), "the same with every seed"),
    ([0.5], [0.5], 0, True, None, "the same with every seed"),
    ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 9, False, (0, 0), "within seed noise"),
    ([0.25, 0.5, 0.75], [0.5, 0.75, 1.0], 0, True, (0.25, 0.25), "differs beyond seed noise"),
    ([0.5, 0.6, 0.7, 0.8], [0.6, 0.7, 0.8], 2, False, True, "within seed noise"),  # two in common are too few to pair
    ([0.5, 0.6, 0.7, 0.8], [0.6, 0.75, 0.8], 1, True, True, "within seed noise"),
])  # fmt: skip
def test_few_seeds_and_no_spread(a, b, first, paired, interval, verdict):
    _, effect = only(records(a), records(b, first))
    assert (effect.paired, effect.verdict) == (paired, verdict)
    if isinstance(interval, tuple):
        assert effect.interval == pytest.approx(interval, abs=1e-4)
    else:
        assert (effect.interval is not None) == bool(interval)


def test_the_same_records_do_not_differ():
    both = records(A, step_ms=2.0, strength=1.0) + records(B, method="finetune")
    contrast = compare(both, both)
    assert (contrast.only_a, contrast.only_b) == ((), ())
    assert [match.a for match in contrast.matches] == ["rwalk (strength 1)", "finetune"]
    for match in contrast.matches:
        assert match.differences == ()
        assert match.alone == ((), ())
        assert {effect.interval for effect in match.effects} == {(0.0, 0.0)}
        assert {effect.verdict for effect in match.effects} == {"the same with every seed"}
    assert [effect.figure for effect in contrast.matches[0].effects] == ["average accuracy", "forgetting", "ms a step"]
    assert "No setting differs." in shown(contrast)


def test_settings_that_differ_are_listed_each_with_its_values():
    a = [dataclasses.replace(r, versions={"torch": "2.6"}, threads=1) for r in records(A, rule={"alpha": 0.9}, strength=1.0)]
    b = [dataclasses.replace(r, versions={}, threads=4) for r in records(B, lr=0.2, rule={"alpha": 0.9, "eps": None})]
    a[1] = dataclasses.replace(a[1], versions={"torch": "2.7"})
    match, _ = only(a, b)
    assert {one.setting: (one.a, one.b) for one in match.differences} == {
        "training.lr": ((0.1,), (0.2,)),
        "strength": ((1.0,), ()),
        "rule.eps": ((), (None,)),
        "versions.torch": (("2.6", "2.7"), ()),
        "threads": ((1,), (4,)),
    }
    printed = " ".join(shown(compare(a, b)).split())
    assert "versions.torch 2.6 | 2.7 not recorded" in printed
    assert "rule.eps not recorded None" in printed
    assert "seed" not in {one.setting for one in match.differences}


def test_methods_are_matched_by_what_they_have_in_common():
    a = [*records(A, strength=1.0), *records(A, strength=2.0), *records(A, method="finetune"), *records(A, method="joint")]
    b = [*records(B, strength=2.0, lr=0.2), *records(B, strength=3.0, lr=0.2), *records(B, method="finetune", lr=0.2),
         *records(B, method="si", strength=1.0)]  # fmt: skip
    contrast = compare(a, b)
    assert {(match.a, match.b) for match in contrast.matches} == {
        ("rwalk (strength 2)", "rwalk (strength 2)"),
        ("finetune", "finetune"),
        ("rwalk (strength 1)", "rwalk (strength 3)"),
    }
    assert (contrast.only_a, contrast.only_b) == (("joint",), ("si (strength 1)",))
    printed = shown(contrast)
    assert "rwalk (strength 1) against rwalk (strength 3)" in printed
    assert "Only in A, with no partner: joint" in printed
    assert "Only in B, with no partner: si (strength 1)" in printed


def test_what_is_not_one_of_a_kind_has_no_partner():
    several = [*records(A, strength=1.0), *records(A, strength=2.0)]
    contrast = compare(several, [*records(B, strength=3.0), *records(B, strength=4.0)])
    assert contrast.matches == ()
    assert contrast.only_a == ("rwalk (strength 1)", "rwalk (strength 2)")


def test_two_single_methods_are_matched_whatever_they_are():
    match, effect = only(records(A, method="ewc"), records(B, method="si"))
    assert (match.a, match.b) == ("ewc", "si")
    assert "method" in {one.setting for one in match.differences}
    assert effect is not None


def test_other_streams_are_not_comparable_and_still_listed():
    contrast = compare(records(A, stream="permuted-x"), records(B, stream="permuted-y", lr=0.3))
    (match,) = contrast.matches
    assert not match.comparable
    assert match.effects == ()
    assert {one.setting for one in match.differences} == {"stream", "stream.name", "training.lr"}
    assert "Not comparable: the streams differ" in shown(contrast)


def test_a_setting_of_the_stream_that_an_older_record_lacks_is_no_other_stream():
    older = records(A)
    for one in older:
        del one.config["stream"]["tasks"]
    match, effect = only(older, records(B))
    assert match.comparable
    assert effect.paired
    bare = [Record("rwalk", "permuted-x", i, [[value]]) for i, value in enumerate(A)]
    match, effect = only(bare, records(B))
    assert match.comparable
    assert effect.verdict == "differs beyond seed noise"


def test_seeds_of_one_side_alone_are_named_and_left_out():
    contrast = compare(records(A), records(B[:3], first=1))
    (match,) = contrast.matches
    assert match.alone == ((0,), ())
    assert match.effects[0].seeds == ((1, 2, 3), (1, 2, 3))
    assert "Paired over seeds 1, 2, 3; left out: 0 of A." in shown(contrast)
    unpaired = shown(compare(records(A), records(B, first=10)))
    assert "Not paired: seeds 0, 1, 2, 3 of A, 10, 11, 12, 13 of B." in unpaired


def test_runs_without_figures_are_left_out():
    """As of a run that diverged: nulls in the matrix and in timings."""
    broken = records(A, step_ms=1.0)
    broken[0] = dataclasses.replace(broken[0], accuracy=[[None, None], [None, None]], timings={"step_ms": None})
    match, effect = only(broken, records(B, step_ms=2.0))
    assert effect.seeds[0] == (1, 2, 3)
    assert match.effects[2].a == (1.0, 1.0, 1.0)
    nothing = [dataclasses.replace(r, accuracy=[[None, None], [None, None]], timings={}) for r in records(A)]
    match, effect = only(nothing, records(B))
    assert effect is None
    assert "No figure that both have." in shown(compare(nothing, records(B)))
    assert compare([], []).matches == ()
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
    a = [Record(seed=i, accuracy=[[v]], **HOSTILE) for i, v in enumerate(A)]
    b = [dataclasses.replace(r, config={**r.config, "rule": 8, "[/b]": []}) for r in a]
    for width in (20, 40, 80, 200):
        printed = shown(compare(a, b), width)
        assert "\x1b" not in printed
        assert max(map(len, shown(compare(a, b), 200).splitlines())) <= 200
        printed.encode()
    huge = [dataclasses.replace(r, timings={"step_ms": v}) for r, v in zip(a, [1e200, -1e200, 10**400, True], strict=True)]
    assert [e.figure for e in compare(huge, a).matches[0].effects] == ["average accuracy"]
    deep = value = {}
    for _ in range(400):
        value["x"] = value = {}
    assert compare([dataclasses.replace(a[0], config=deep)], a).matches


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
    assert "Too few seeds to say" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "word"), [
    (None, "in which there are no records"), ("{", "without a record that can be read"),
    (json.dumps({"method": "m"}), "without a record that can be read"),
])  # fmt: skip
def test_folders_without_records_get_three_parts(tmp_path, capsys, content, word):
    b = saved(tmp_path / "b", records(B))
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "a" / "x.json").write_text(content)
    assert main(["compare", str(tmp_path / "a"), b]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.splitlines()[-1].startswith("rwalk: Got ")
    assert main(["compare", str(tmp_path / "a" / "x.json"), b]) == 2
