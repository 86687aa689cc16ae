"""Records for other programs: frames, CSV, LaTeX, notebooks and files of charts, and the methods of a folder in order."""

import csv
import io
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from records import made
from rwalk import Consolidator, RWalk, bench, report
from rwalk.bench import Record
from rwalk.cli.main import main
from rwalk.report.between import holm
from rwalk.report.metric import ScoreMetric

LAST = {"finetune": (0.2, 0.3, 0.25, 0.35), "rwalk": (0.7, 0.6, 0.65, 0.75), "ewc": (0.68, 0.66, 0.6, 0.74)}


@pytest.fixture
def records():
    return [made(method, seed, last) for method, row in LAST.items() for seed, last in enumerate(row)]


def test_a_frame_has_a_row_for_each_record_and_one_for_each_score(records):
    frame = report.frame(records)
    assert len(frame) == 12
    means = frame.groupby("method")["average"].mean()
    assert means["rwalk"] == pytest.approx(np.mean([(a + 0.8) / 2 for a in LAST["rwalk"]]))
    scores = report.frame(records, "scores")
    assert len(scores) == 12 * 6  # two before training, and two after each of two tasks
    row = scores.query("method == 'ewc' and seed == 3 and after == 2 and task == '1'")
    assert row["score"].tolist() == [0.74]
    assert scores.query("after == 0")["score"].tolist() == [0.1] * 24


def test_csv_holds_what_the_frame_holds(records):
    rows = list(csv.DictReader(io.StringIO(report.as_csv(records, "scores"))))
    frame = report.frame(records, "scores")
    assert [float(row["score"]) for row in rows] == frame["score"].tolist()
    first, *_ = csv.DictReader(io.StringIO(report.as_csv(records)))
    assert first["stored_examples"] == "0"
    assert first["strength"] == ""  # fine-tuning has none
    assert report.as_csv([]) == "\r\n"


def test_latex_escapes_names_and_has_as_many_cells_in_each_row(records):
    text = report.latex(report.summarise([*records, made(r"odd_name & \write18{} 100 %")]))
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 5
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {text.split("{tabular}{")[1].index("}") - 1}
    assert r"odd\_name \& \textbackslash{}write18\{\} 100 \%" in text
    assert rf"\textbf{{{73.8:.1f} $\pm$" in body  # RWalk, the best average
    assert "±" not in text


def test_notebooks_show_records_lists_comparisons_and_summaries(records):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    memory = Consolidator(model, RWalk()).attach(optimizer)
    hostile = made("<script>alert(1)</script>")
    shown = {
        "record": records[0]._repr_html_(),
        "list": report.summarise(records)._repr_html_(),
        "summary": memory.summary()._repr_html_(),
        "hostile": hostile._repr_html_() + report.summarise([hostile])._repr_html_(),
    }
    for name, html in shown.items():
        for table in re.findall(r"<table>.*?</table>", html):
            ET.fromstring(table)
        assert "<table>" in html, name
        assert "<script" not in html
    assert "average accuracy 50.0 %, forgetting 70.0 %" in shown["record"]
    assert "<b>" in shown["list"]
    assert "RWalk" in shown["summary"]


def test_read_records_show_themselves(records, tmp_path):
    for record in records:
        record.save(tmp_path)
    found, _ = report.read(tmp_path)
    assert found._repr_html_() == report.summarise(found)._repr_html_()


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_plots_are_files_that_stand_alone(records, tmp_path, kind):
    for name, drawing in {"one": records[0].plot(), "all": report.plot(records)}.items():
        content = drawing.save(tmp_path / f"{name}.{kind}").read_bytes()
        assert content.startswith({"svg": b"<svg", "pdf": b"%PDF", "png": b"\x89PNG"}[kind])
        if kind == "svg" and name == "all":
            text = content.decode()
            assert "var(--" not in text  # colours of the page alone
            assert all(f">{method}<" in text for method in ("fine-tuning", "RWalk", "EWC"))  # the legend
            shown = drawing._repr_svg_()
            assert drawing.chart.title in shown
            assert all(f">{method}<" in shown for method in ("fine-tuning", "RWalk", "EWC"))
            assert 'fill="#ffffff"' in shown  # a ground of its own, whatever the notebook's


def test_a_plot_shows_the_averages_of_the_records(records):
    chart = report.plot(records).chart
    held = next(series for series in chart.series if series.name == "RWalk")
    expected = [90.0, 100 * np.mean([(a + 0.8) / 2 for a in LAST["rwalk"]])]
    assert [point.value.mean for point in held.points] == pytest.approx(expected)
    one = records[0].plot().chart
    assert [[p.value.mean for p in series.points] for series in one.series] == [
        pytest.approx([90, 20]),
        pytest.approx([10, 80]),
    ]


def test_what_cannot_be_drawn_is_named(records, tmp_path):
    other = [replace(record, stream="other") for record in records]
    with pytest.raises(ValueError, match="There are records of 2 different streams, metrics or settings"):
        report.plot([*records, *other])
    with pytest.raises(ValueError, match="There is no chart `Speed` of these records; there is Average accuracy"):
        report.plot(records, "Speed")
    with pytest.raises(ValueError, match="This record has no scores"):
        Record("m", "s", 0, []).plot()
    with pytest.raises(ValueError, match=r"drawings are saved as \.svg, \.pdf, \.png"):
        records[0].plot().save(tmp_path / "a.gif")


def test_methods_of_a_folder_are_compared_with_the_best_and_corrected_for_their_number(records):
    (ranking,) = report.between(records)
    averages = {name: np.array([(a + 0.8) / 2 for a in row]) for name, row in LAST.items()}
    assert ranking.reference == "RWalk (strength 1)"
    assert [rival.name for rival in ranking.rivals] == ["EWC (strength 1)", "fine-tuning"]
    raw = [ttest_rel(averages["rwalk"], averages[name]).pvalue for name in ("ewc", "finetune")]
    assert raw[1] < raw[0]
    assert [rival.p for rival in ranking.rivals] == pytest.approx([raw[0], 2 * raw[1]])
    assert [rival.verdict for rival in ranking.rivals] == ["seed noise", "differs"]
    differences = [averages[name].mean() - averages["rwalk"].mean() for name in ("ewc", "finetune")]
    assert [rival.effect.difference for rival in ranking.rivals] == pytest.approx(differences)
    (plain,) = report.between(records, "finetune")
    assert [rival.name for rival in plain.rivals] == ["RWalk (strength 1)", "EWC (strength 1)"]
    with pytest.raises(ValueError, match="no records of `mas` to compare with; there are some of ewc, finetune, rwalk"):
        report.between(records, "mas")


def test_methods_are_compared_with_joint_training_only_if_there_is_nothing_else(records):
    joint = [replace(r, method="joint") for r in records if r.method == "finetune"]
    better = [replace(r, scores=[[1.0, 1.0], [1.0, 1.0]]) for r in joint]
    (ranking,) = report.between([*records, *better])
    assert ranking.reference == "RWalk (strength 1)"
    assert ranking.rivals[0].name == "joint training"
    assert report.between(better)[0].reference == "joint training"


def test_of_errors_the_lowest_is_the_best(records):
    errors = [
        replace(r, metric="error", higher=False, scores=[[1 - a for a in row] for row in r.scores], untrained=[])
        for r in records
    ]
    (ranking,) = report.between(errors)
    assert ranking.reference == "RWalk (strength 1)"
    assert ranking.metric.better == "lower"


def test_too_few_seeds_give_no_verdict(records):
    (ranking,) = report.between([record for record in records if record.seed < 2])
    assert {rival.verdict for rival in ranking.rivals} == {"too few seeds"}


def test_holm_by_the_example_of_its_definition():
    """Of four chances the smallest counts four times, the next three times, and no later one less than those before it."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("lowest", "highest", "digits"), [(0.1, 0.345, 3), (2, 12.5, 1), (-3500, 20, 0), (0, 0, 2), (0, 1e-5, 7)]
)
def test_three_digits_of_the_largest_score_are_shown(lowest, highest, digits):
    assert ScoreMetric("RMSE", False, lowest, highest).digits == digits


def test_a_bar_shows_tasks_and_steps_and_changes_nothing(capsys):
    stream, training = bench.split("digits", 2), bench.Training(batch_size=100)
    ticks, seen = [], []
    options = {"training": training, "tick": lambda: ticks.append(0), "track": lambda figures, task: seen.append(task)}
    shown = bench.run(stream, "finetune", progress=True, **options)
    text = capsys.readouterr().err
    steps = sum(-(-len(e.train) // 100) for e in stream)
    assert f"{steps}/{steps}" in text
    assert "task 2 of 2, average 0." in text
    assert (len(ticks), seen) == (steps, [1, 2])
    quiet = bench.run(stream, "finetune", training=training)
    assert capsys.readouterr().err == ""
    assert quiet.scores == shown.scores


def test_the_report_command_writes_what_is_asked_for(records, tmp_path, capsys):
    for record in records:
        record.save(tmp_path)
    assert main(["report", str(tmp_path), "--csv", "--latex", "--figures", "svg,pdf"]) == 0
    written = {path.name for path in tmp_path.iterdir() if path.suffix != ".json"}
    charts = {f"report-1-average-accuracy.{kind}" for kind in ("svg", "pdf")}
    assert written == {"report.html", "report.md", "report.csv", "report-scores.csv", "report.tex", *charts}
    assert (tmp_path / "report-scores.csv").read_bytes() == report.as_csv(report.read(tmp_path)[0], "scores").encode()
    assert "Written:" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--figures", "gif"]) == 2
    assert "--figures gif is no kind of file; pass some of svg, pdf, png" in capsys.readouterr().err


def test_the_compare_command_takes_one_folder(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for record in records:
        record.save(tmp_path)
    assert main(["compare", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("RWalk (strength 1) against the others (average accuracy, %, higher is better)" in line for line in lines)
    assert next(line for line in lines if "fine-tuning" in line).split()[-1] == "differs"
    assert main(["compare", str(tmp_path), "--against", "finetune"]) == 0
    assert "fine-tuning against the others" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), str(tmp_path), "--against", "finetune"]) == 2
    assert "--against is for the methods of one folder" in capsys.readouterr().err
