"""Summaries of records against numbers computed by hand."""

import io
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console

from rwalk import report
from rwalk.bench.record import Record
from rwalk.report import charts, heatmaps, show, summarise
from rwalk.report.charts import styles
from rwalk.report.figures import columns
from rwalk.report.remarks import remarks, sentence


def record(method, seed, last, step_ms, state=0, **config):
    setting = {"stream": {"tasks": 2, "scenario": "domain", "seed": seed}, "training": {"epochs": 1, "mask": "all"}}
    return Record(
        method=method,
        stream="permuted-x",
        seed=seed,
        scores=[[0.9, 0.1], [last, 0.8]],
        untrained=[0.1, 0.05],
        config=setting | config,
        timings={"train_seconds": 2.0, "step_ms": step_ms},
        memory={"model_bytes": 100, "state_bytes": state, "stored_examples": 0},
    )


RECORDS = [
    record("rwalk", 0, 0.85, 2.2, 800, strength=1.0, rule={"alpha": 0.9}),
    record("rwalk", 1, 0.75, 2.0, 800, strength=1.0, rule={"alpha": 0.9}),
    record("rwalk", 0, 0.6, 2.0, 800, strength=1.0, rule={"alpha": 0.5}),
    record("finetune", 0, 0.5, 1.0),
    record("finetune", 1, 0.4, 1.0),
    record("joint", 1, 0.95, 1.0),
]


def test_lines_are_means_and_spreads_over_seeds():
    (comparison,) = summarise(RECORDS)
    assert [line.method for line in comparison.lines] == ["finetune", "rwalk", "rwalk", "joint"]
    plain, _, rwalk = (
        comparison.lines[:3] if comparison.lines[1].fields["alpha"] == 0.5 else (comparison.lines[0], None, comparison.lines[1])
    )
    assert rwalk.seeds == [0, 1]
    assert rwalk.average.mean == pytest.approx((0.825 + 0.775) / 2)
    assert rwalk.average.deviation == pytest.approx(stdev([0.825, 0.775]))
    assert rwalk.forgetting.mean == pytest.approx((0.05 + 0.15) / 2)
    assert rwalk.step_ratio.mean == pytest.approx((2.2 + 2.0) / 2)
    found = {column.short: column.value(rwalk) for column in columns(comparison)}
    assert found["state"].mean == 8
    assert found["intrans."].mean == pytest.approx(0.0)
    assert found["FWT"].mean == pytest.approx(0.05)
    assert plain.step_ratio.mean == 1
    assert comparison.lines[-1].forgetting is None


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_settings_and_fits(width):
    file = io.StringIO()
    show(summarise(RECORDS), Console(file=file, width=width))
    text = file.getvalue()
    assert "domain-incremental, softmax mask: all" in " ".join(text.split())
    assert "alpha=0.5" in text
    assert "80.0 ± 3.5" in text
    assert ("BWT" in text) == (width == 200)
    assert max(map(len, text.splitlines())) <= width


def test_of_several_records_of_a_seed_one_counts_and_that_is_said():
    again = record("rwalk", 1, 0.1, 2.0, 800, strength=1.0, rule={"alpha": 0.9})
    (comparison,) = summarise([*RECORDS, again])
    line = next(line for line in comparison.lines if line.fields.get("alpha") == 0.9)
    assert (line.seeds, line.repeated) == ([0, 1], (1,))
    assert line.average.mean == pytest.approx((0.825 + 0.775) / 2)
    assert any("several records of RWalk (alpha 0.9) with seed 1" in remark.text for remark in remarks(comparison))


def test_a_method_has_one_colour_in_all_comparisons():
    other = [replace(r, stream="split-x") for r in RECORDS] + [replace(record("ewc", 0, 0.6, 2.0), stream="split-x")]
    first, second = summarise([*RECORDS, *other])
    colours = [{line.method: style.colour for line, style in zip(c.lines, styles(c), strict=True)} for c in (first, second)]
    assert colours[1].items() > colours[0].items()


def test_runs_of_other_settings_are_not_mixed():
    other = record("finetune", 0, 0.5, 1.0)
    other.config["training"]["mask"] = "task"
    assert len(summarise([*RECORDS, other])) == 2


def test_no_module_of_the_report_uses_torch():
    sources = [path.read_text() for path in Path(report.__file__).parent.glob("*.py")]
    assert len(sources) > 10
    assert not any(re.search(r"^\s*(import|from) torch\b", source, re.MULTILINE) for source in sources)


def regression(method, seed, last, shift=0.0):
    """A record of mean squared errors on two months."""
    errors = [[2.0 + shift, 9.0], [last, 1.5 + shift]]
    config = {"stream": {"name": "months"}, "training": {"lr": 0.1}} | ({"strength": 1.0} if method == "rwalk" else {})
    return Record(method, "months", seed, errors, [10.0, 12.0], "MSE", False, ["jan", "feb"], config=config)


def test_a_report_of_errors_prefers_the_lowest():
    records = [regression("finetune", s, 8.0, s / 10) for s in range(3)] + [
        regression("rwalk", s, 2.5, s / 10) for s in range(3)
    ]
    (comparison,) = summarise(records)
    assert sentence(comparison) == "RWalk ended at the lowest average MSE, 2.05."
    plain, held = comparison.lines
    found = {column.name: column for column in columns(comparison)}
    average = (2.5 + 1.5 + 2.5 + 1.6 + 2.5 + 1.7) / 6
    assert found["Average MSE"].text(held) == f"{average:.2f} ± 0.05"
    assert found["Average MSE"].best(comparison) == {1}
    assert found["Forgetting"].text(plain) == "5.90 ± 0.10"  # 8 less 2, 2.1 and 2.2
    assert not found["Kept"].value(held)
    heatmap, _ = heatmaps.scores(comparison)
    assert heatmap.columns == ["jan", "feb"]
    cells = dict(heatmap.rows)["feb"]
    assert [cell.text for cell in cells] == ["8.00", "1.60"]
    assert cells[1].shade > cells[0].shade  # low errors are the good ones
    forgets = next(chart for chart in charts.charts(comparison) if chart.title.startswith("Average"))
    assert forgets.y == "average MSE"
    assert forgets.table()[1][0] == ["jan", "2.10 ± 0.10", "2.10 ± 0.10"]


def test_errors_that_grow_are_remarked():
    """A method that ends above fine-tuning is bad; one of another metric is not compared with it."""
    records = [regression("finetune", s, 4.0) for s in range(3)] + [regression("rwalk", s, 8.0) for s in range(3)]
    (comparison,) = summarise(records)
    text = " ".join(remark.text for remark in remarks(comparison))
    assert "RWalk ended above fine-tuning (4.75 against 2.75)" in text
    assert len(summarise([*records, replace(records[0], metric="R2", higher=True)])) == 2
