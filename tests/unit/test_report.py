"""Summaries of records against numbers computed by hand."""

import io
import re
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console

from rwalk import report
from rwalk.bench.record import Record
from rwalk.report import show, summarise
from rwalk.report.figures import COLUMNS


def record(method, seed, last, step_ms, state=0, **config):
    setting = {"stream": {"tasks": 2, "scenario": "domain", "seed": seed}, "training": {"epochs": 1, "mask": "all"}}
    return Record(
        method=method,
        stream="permuted-x",
        seed=seed,
        accuracy=[[0.9, 0.1], [last, 0.8]],
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
    assert rwalk.average_accuracy.mean == pytest.approx((0.825 + 0.775) / 2)
    assert rwalk.average_accuracy.deviation == pytest.approx(stdev([0.825, 0.775]))
    assert rwalk.forgetting.mean == pytest.approx((0.05 + 0.15) / 2)
    assert rwalk.step_ratio.mean == pytest.approx((2.2 + 2.0) / 2)
    columns = {column.short: column.value(rwalk) for column in COLUMNS}
    assert columns["state"].mean == 8
    assert columns["intrans."].mean == pytest.approx(0.0)
    assert columns["FWT"].mean == pytest.approx(0.05)
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


def test_runs_of_other_settings_are_not_mixed():
    other = record("finetune", 0, 0.5, 1.0)
    other.config["training"]["mask"] = "task"
    assert len(summarise([*RECORDS, other])) == 2


def test_no_module_of_the_report_uses_torch():
    sources = [path.read_text() for path in Path(report.__file__).parent.glob("*.py")]
    assert len(sources) > 10
    assert not any(re.search(r"^\s*(import|from) torch\b", source, re.MULTILINE) for source in sources)
