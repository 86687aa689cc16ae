"""The report's page: what it says, against figures worked out by hand, and how it behaves in a real browser."""

import json
import re
import shlex
import sys
from dataclasses import replace
from html import unescape

import pytest

from records import made
from rwalk import EWC, RWalk, bench, report
from rwalk._io import files
from rwalk.bench.baselines import BASELINES
from rwalk.bench.builtin import STREAMS
from rwalk.bench.holdout import VALIDATION
from rwalk.bench.record import Record
from rwalk.bench.tuned import Tuned
from rwalk.cli.main import main
from rwalk.cli.options import parse
from rwalk.cli.run import describe
from rwalk.report import charts, page, remarks, reproduce
from rwalk.report.names import clean, rule_names
from rwalk.report.remarks import MATRICES
from rwalk.rules import rules

SMALL = bench.Training(hidden=(8,), batch_size=64)
HOSTILE = "<img src=http://127.0.0.1/x onerror=alert(1)></script><script>alert(2)</script>\0\ud800\u202e|`$(id)`"


@pytest.fixture(scope="session")
def records():
    """Real runs: two seeds on a task-incremental stream, with a sweep, and one of a class-incremental one."""
    task, classes = bench.split("digits", tasks=3), bench.split("digits", tasks=3, scenario="class")
    plans = [("finetune", None), ("joint", None), (RWalk(), 1.0), (RWalk(), 2.0), (EWC(samples=20), 1.0), ("recipe", None)]
    runs = [bench.run(task, method, strength, seed, SMALL) for method, strength in plans for seed in (0, 1)]
    mine = [("finetune", {}), (RWalk(), {}), (RWalk(), {"replay": 40}), ("replay", {})]
    return runs + [bench.run(classes, method, training=SMALL, **options) for method, options in mine]


@pytest.fixture
def visit(browser, tmp_path):
    """Return a function that opens the page of some records; what it asks for and complains about is refused at the end."""
    contexts, heard = [], []

    def opened(records, width=1280, scheme="light", **options):
        place = written(records, tmp_path / "runs")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options))
        sheet = contexts[-1].new_page()
        sheet.on("console", lambda message: heard.append(message.text))
        sheet.on("pageerror", lambda error: heard.append(str(error)))
        sheet.on("dialog", lambda dialog: heard.append(dialog.message) or dialog.dismiss())
        sheet.on("request", lambda request: request.url == place.as_uri() or heard.append(request.url))
        sheet.goto(place.as_uri())
        return sheet

    yield opened
    for context in contexts:
        context.close()
    assert not heard


def written(records, folder):
    for record in records:
        record.save(folder)
    return report.write(folder)


THREE = [made(m, s, a) for m, a in (("finetune", 0.45), ("rwalk", 0.72), ("joint", 0.9)) for s in range(3)]


def said(records):
    (comparison,) = report.summarise(records)
    words = remarks.sentence(comparison), " ".join(remark.text for remark in remarks.remarks(comparison))
    return tuple(text.replace("\u00a0", " ") for text in words)


def test_the_sentence_says_what_was_kept_and_what_it_cost():
    assert said(THREE)[0] == (
        "RWalk kept 80.0 % of what was learned on earlier tasks (fine-tuning 50.0 %, joint training 100.0 %) and ended at the "
        "highest average accuracy, 76.0 %; a step took 2.5× the CPU time of fine-tuning's, and it stored no data."
    )


@pytest.mark.parametrize(("records", "expected"), [
    ([made("finetune")], "Fine-tuning kept 66.7 % of what was learned on earlier tasks and ended at an average accuracy of "
     "70.0 %."),
    ([made("joint")], "Joint training kept 66.7 % of what was learned on earlier tasks and ended at an average accuracy of "
     "70.0 %; it stored no data."),
    ([made("si", last=0.5, tasks=1, memory={})], "SI ended at an average accuracy of 50.0 %."),
    ([made("finetune", last=0.8), made("mas", last=0.2)], "Fine-tuning kept 88.9 % of what was learned on earlier tasks and "
     "ended at the highest average accuracy, 80.0 %."),
    ([made(scores=[[None, None], [None, None]])], "These runs hold no average accuracy."),
    ([made(scores=[])], "These runs hold no average accuracy."),
])  # fmt: skip
def test_the_sentence_is_true_of_few_runs_too(records, expected):
    assert said(records)[0] == expected


def classes(record):
    return replace(record, config=record.config | {"stream": record.config["stream"] | {"scenario": "class"}})


@pytest.mark.parametrize(("records", "expected"), [
    ([made("finetune"), made()], "Only 1 seed: differences may be noise"),
    ([made("finetune"), *(made(seed=s) for s in range(3))], "Not all methods were run with the same seeds"),
    ([classes(made())], "expect RWalk near fine-tuning"),
    ([made("finetune", last=0.8), made("mas", last=0.2)], "MAS ended below fine-tuning (50.0 % against 80.0 %)"),
    ([made(scores=[[0.9, 0.1], [0.1, 0.1]])], "RWalk seems to have diverged (it ended no better than the untrained network)"),
    ([made(diagnostics=[{"figures": {"penalty": None}}])], "(its penalty overflowed); the gradient pull overshoots"),
    ([made(), made(config=made().config | {"strength": 10.0})], "RWalk was run with 2 strengths"),
    ([made("finetune"), made(scores=[[0.9, 0.1], [0.9, 0.5]])],
     "New tasks reach only 70.0 % with RWalk, with fine-tuning 85.0 %: try smaller"),
    ([made("finetune", last=0.2), made(last=0.2)], "With RWalk as much is forgotten as with fine-tuning"),
    ([made(diagnostics=[{"figures": {"steps left out": 3.0}}])], "left out 3 steps whose gradients were not finite"),
    ([made(diagnostics=[{"figures": {"windows beyond eps": 0.0}}])], "eps in less than 0.1 % of the windows of RWalk"),
    ([made("finetune", last=0.9), made(last=0.9)], "Fine-tuning forgets 0.0 points here"),
    ([made()], "No fine-tuning among the runs"),
    ([made("finetune", tasks=1)], "One task: there is nothing to forget"),
    ([made("joint", last=0.1), made()], "Joint training ends below the best method"),
])  # fmt: skip
def test_remarks_say_where_figures_mean_trouble(records, expected):
    assert expected in said(records)[1]


def test_remarks_keep_quiet_where_nothing_is_wrong():
    assert said(THREE)[1] == ""
    assert "expect" not in said([classes(made(memory={"stored_examples": 9}))])[1]


def test_charts_show_means_and_deviations():
    first = made(scores=[[0.9, 0.1, 0.1], [0.5, 0.8, 0.1], [0.4, 0.6, 0.7]], untrained=[])
    second = made(scores=[[0.9, 0.1, 0.1], [0.7, 0.8, 0.1], [0.6, 0.8, 0.7]], untrained=[], seed=1)
    (comparison,) = report.summarise([first, second])
    accuracy, forgetting = charts.charts(comparison)
    (line,) = accuracy.series
    assert [p.value.mean for p in line.points] == pytest.approx([90, 70, 100 * (1.7 + 2.1) / 6])
    assert line.points[1].value.deviation == pytest.approx(100 * 0.1 / 2**0.5)
    assert [p.value.mean for p in forgetting.series[0].points] == pytest.approx([40, 10])
    assert accuracy.table() == (["tasks learned", "RWalk"], [["1", "90.0 ± 0.0"], ["2", "70.0 ± 7.1"], ["3", "63.3 ± 9.4"]])


def test_a_sweep_is_a_curve_of_stability_against_plasticity():
    strong = made(config=made().config | {"strength": 10.0}, scores=[[0.9, 0.1], [0.81, 0.5]])
    (comparison,) = report.summarise([made(), strong])
    (sweep,) = [chart for chart in charts.charts(comparison) if chart.labelled]
    assert [(p.label, p.x, p.value.mean) for p in sweep.series[0].points] == [
        ("1", pytest.approx(85), pytest.approx(100 * 0.6 / 0.9)), ("10", pytest.approx(70), pytest.approx(90))
    ]  # fmt: skip


def test_no_two_lines_of_a_chart_look_alike():
    runs = [made(f"mine{i}", config=made().config | {"strength": s}) for i in range(8) for s in (1.0, 2.0, 3.0)]
    (comparison,) = report.summarise([*runs, made("finetune"), made("joint")])
    looks = charts.styles(comparison)
    assert len({(s.colour, s.shape, tuple(s.dash)) for s in looks}) == len(looks)
    assert len(charts.drawn(comparison)) == 10


def test_commands_do_the_same_runs_again(records, tmp_path):
    for comparison in report.summarise(records):
        found = reproduce.commands(comparison)
        assert found.notes == []
        mine = {r.name for line in comparison.lines for r in line.records}
        assert {name for line in found.lines for name in names_of(shlex.split(line)[1:])} == mine


@pytest.mark.parametrize(("command", "expected"), [
    ("rwalk run split-x --methods si,rwalk --data 'a b'", "rwalk run split-x --methods si,rwalk --data 'a b'"),
    ("rwalk tune split-x; rm -r /", "rwalk tune 'split-x;' rm -r /"),
    ("rwalk run 'split-x", "rwalk run permuted-x --methods rwalk"),
    ("rm -r /", "rwalk run permuted-x --methods rwalk"),
])  # fmt: skip
def test_a_command_in_a_record_is_the_one_that_repeats_it_and_nothing_else(command, expected):
    (comparison,) = report.summarise([made(command=command, seed=seed) for seed in range(2)])
    (line,) = reproduce.commands(comparison).lines
    assert line.startswith(expected)


def names_of(words):
    """Return the names of the records that a command writes."""
    return [run.name for run in describe(parse(words))]


@pytest.mark.parametrize("extra", [
    ["--methods", "lwf,recipe,si", "--strength", "0.5", "--pull", "proximal"],
    ["--methods", "rwalk,mas", "--rwalk.alpha", "0.5", "--mas.samples", "9", "--mask", "all"],
    ["--methods", "ewcpp", "--ewcpp.alpha", "0.25"],
    ["--methods", "ewcpp,si"],
    ["--methods", "replay,agem", "--replay", "30", "--per", "class", "--select", "herding", "--replay-batch", "4"],
    ["--methods", "finetune,l2", "--tasks", "5", "--skip", "2", "--seeds", "3", "--first-seed", "4", "--optimizer", "adam"],
])  # fmt: skip
@pytest.mark.parametrize("stream", ["split-digits", "permuted-digits", "rotated-digits", "drift-digits"])
def test_commands_hold_every_setting(stream, extra):
    words = ["run", stream, "--hidden", "8", "4", *extra]
    wanted = [planned(run) for run in describe(parse(words))]
    assert [record.name for record in wanted] == names_of(words)
    lines = [line for comparison in report.summarise(wanted) for line in reproduce.commands(comparison).lines]
    assert {name for line in lines for name in names_of(shlex.split(line)[1:])} == {record.name for record in wanted}


def planned(run):
    """Return the record that a run would leave, except for what it would measure."""
    return Record(run.method_name, run.tasks[0].stream["name"], run.seed, [], config=run.configuration)


def test_kinds_and_methods_of_commands_are_those_of_the_command_line():
    assert set(reproduce.KINDS) == set(STREAMS)
    assert set(reproduce.PLAIN) == set(BASELINES)
    assert rule_names() == set(rules())
    assert {name for name, kind in rules().items() if not kind.anchor_kind.by_element} == MATRICES
    assert reproduce.VALIDATION == VALIDATION
    assert bench.rotated("digits", tasks=1)[0].stream["degrees"] == reproduce.DEGREES


def test_the_way_a_strength_was_chosen_is_told(tmp_path):
    config = {"stream": {"tasks": 2, "scenario": "domain"}, "training": {"lr": 0.1}, "strength": 0.5}
    trials = [{"strength": s, "lr": 0.1, "accuracy": s, "seeds": {}} for s in (0.25, 0.5)]
    Tuned("rwalk", "permuted-x", 0.5, 0.1, 0.5, 3, trials, config).save(tmp_path)
    (tmp_path / "broken.tuned").write_text("{")
    text = written(
        [made(config=config), made("ewc"), made("si"), made("si", config=made().config | {"strength": 9.0})], tmp_path
    ).read_text()
    assert "tuned on the first 3 tasks, 2 trials" in text
    assert "given, or the default" in text
    assert "one of 2 that were run" in text


@pytest.mark.parametrize(("changes", "why"), [
    ({"stream": "custom"}, "stream was made in Python"),
    ({"stream": "split-x-validation"}, "`rwalk tune` made it"),
    ({"method": "mine"}, "method was made in Python"),
    ({"ranks": 2}, "2 processes trained the model together"),
    ({"config": {}}, "does not hold all settings"),
    ({"config": {"stream": {"tasks": 1, "seed": 5}, "training": {}}}, "another seed"),
    ({"config": {"stream": {"tasks": 1, "degrees": 90.0}, "training": {}}}, "another angle"),
    ({"config": {"stream": {"tasks": 1}, "training": {}, "mine": 1}}, "its mine came from Python"),
])  # fmt: skip
def test_what_no_command_does_is_said(changes, why):
    (comparison,) = report.summarise([made(**changes)])
    found = reproduce.commands(comparison)
    assert not found.lines
    assert why in found.notes[0]


@pytest.mark.parametrize(
    ("backend", "flag"), [("blocked", "--kernels blocked"), ("numba", "--kernels numba"), ("numba+blocked", "")]
)
def test_commands_name_the_kernels(backend, flag):
    (comparison,) = report.summarise([made(versions={"kernels": backend})])
    (line,) = reproduce.commands(comparison).lines
    assert (flag in line) if flag else ("--kernels" not in line)


def test_commands_say_how_much_data_there_was():
    (comparison,) = report.summarise([made(config={"stream": {"tasks": 1, "rows": [70, 30]}, "training": {}})])
    assert "70 training and 30 test examples" in reproduce.commands(comparison).notes[0]


def test_gaps_between_seeds_have_commands():
    (comparison,) = report.summarise([made(seed=s) for s in (0, 1, 5)])
    first, second = reproduce.commands(comparison).lines
    assert "--first-seed 0 --seeds 2" in first
    assert "--first-seed 5 --seeds 1" in second


def hostile():
    """Return records with hostile text wherever there is room for some."""
    config = {
        "stream": {"name": HOSTILE, "tasks": HOSTILE, "scenario": HOSTILE, HOSTILE: HOSTILE},
        "training": {"epochs": HOSTILE, "mask": [HOSTILE], "hidden": HOSTILE, "model": HOSTILE, "optimizer": {HOSTILE: 1}},
        "strength": -1e299, "pull": HOSTILE, "rule": {HOSTILE: HOSTILE, "n": 10**400},
        "replay": {"size": HOSTILE, "batch": HOSTILE},
    }  # fmt: skip
    layers = [{"name": HOSTILE, "share": -5e299, "drift": None}, {"name": "", "share": 3, "drift": 1e299}]
    diagnostics = [{"figures": {"penalty / loss": 1e299, "windows beyond eps": -9, HOSTILE: 1}, "layers": layers}, {}]
    whole = made(HOSTILE, 10**30, config=config, diagnostics=diagnostics, versions={HOSTILE: HOSTILE}, bits=[[1e299], []],
                 timings={"step_ms": 1e299}, memory={"model_bytes": 1e-299, "state_bytes": 1e299})  # fmt: skip
    numbers = config | {"stream": {"name": HOSTILE, "tasks": 2}, "rule": {"n": [HOSTILE]}}
    return [
        whole,
        replace(whole, seed=-1),
        made(HOSTILE, config=numbers),
        made("rwalk", stream=HOSTILE, scores=[], untrained=[]),
    ]


def test_hostile_values_are_text(tmp_path):
    html = written(hostile(), tmp_path).read_text()
    assert "<img" not in html
    assert html.count("<script>") == html.count("</script>") == 1
    assert clean(HOSTILE) in unescape(html)
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search(r"(?<!\\)[<|]img", markdown)
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 3
    assert all(len({line.count(" | ") for line in table}) == 1 for table in tables)


def test_the_page_allows_no_network_and_names_none(tmp_path):
    html = written(THREE, tmp_path).read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert unescape(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\s\"'<>]*", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<link|<img|@import|url\(", html)


def old(record):
    """Make a record as early versions wrote it."""
    return replace(record, untrained=[], timings={}, memory={}, diagnostics=[], versions={}, bits=[])


@pytest.mark.parametrize("runs", [
    [made()], [made("joint", tasks=1)], [made(scores=[])], [old(made()), old(made("finetune"))],
    [Record("m", "s", 0, [[1.0]])],
    [made(bits=[[2.0, 2.0], [1.5, 1.25]])], [made(scores=[[None, None], [None, 0.5]])],
    [made(scores=[[0.5, None, None], [0.4, 0.6, None]], untrained=[])], [made(seed=1), made(seed=1, threads=2)],
    [made(diagnostics=[{"figures": {"penalty": None, "penalty / loss": None}, "layers": [{"name": "a", "share": None}]}])],
])  # fmt: skip
def test_records_of_all_ages_make_a_page(runs, tmp_path):
    html = written(runs, tmp_path).read_text()
    assert "None" not in re.sub(r"<style>.*</style>|<script>.*</script>", "", html, flags=re.S)
    assert "nan" not in html
    assert ("1.375" in html) == bool(runs[0].bits)


def sealed(path, text):
    """Write JSON content, with a right checksum where it can have one."""
    try:
        files.seal(path, json.loads(text))
    except (ValueError, TypeError):
        path.write_text(text)


@pytest.mark.parametrize("content", [
    "{", "[]", '{"method": 1}', '{"method": "m", "stream": "s", "seed": 0, "scores": [[0.1], [0.2]]}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "config": {"stream": 3}}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "config": {"strength": "x"}}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "untrained": [1, 1]}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "bits": [3]}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "timings": {"step_ms": "x"}}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "memory": {"model_bytes": 1%s}}' % ("0" * 400),
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "diagnostics": [{"layers": [{}]}]}',
    '{"method": "m", "stream": "s", "seed": 0, "scores": [[1]], "diagnostics": [3]}',
])  # fmt: skip
def test_files_that_are_no_records_are_named_and_left_out(content, tmp_path):
    sealed(tmp_path / "<b>.json", content)
    html = written([made()], tmp_path).read_text()
    assert "&lt;b&gt;.json" in html
    assert "Left out" in html
    (tmp_path / made().name).unlink()
    assert "0 comparisons, 0 runs" in report.write(tmp_path).read_text()


def test_many_runs_make_a_small_page():
    def twenty(method, seed, strength):
        matrix = [[round(0.9 - 0.01 * (k - j) + 0.001 * seed, 3) if j <= k else 0.1 for j in range(20)] for k in range(20)]
        layers = [{"name": f"layers.{i}.weight", "share": 1 / 16, "drift": 0.1 * i} for i in range(16)]
        figures = {"penalty": 0.1, "penalty / loss": 0.5 + seed, "windows beyond eps": 0.2, "penalty from score": 0.6}
        diagnostics = [{"figures": figures, "layers": layers} for _ in range(20)]
        config = made().config | {"strength": strength}
        return made(method, seed, scores=matrix, untrained=[0.1] * 20, config=config, diagnostics=diagnostics)

    fifty = [twenty(m, seed, s) for m in ("rwalk", "ewc") for s in (0.1, 1.0, 10.0, 100.0, 1000.0) for seed in range(5)]
    assert len(page.render(report.summarise(fifty)).encode()) < 1_000_000
    many = [twenty(f"m{i % 10}", i // 10, 1.0) for i in range(200)]
    assert len(page.render(report.summarise(many)).encode()) < 1_000_000


def test_the_markdown_is_a_table_of_methods(tmp_path):
    written(THREE, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    head = [cell.strip() for cell in next(line for line in lines if line.startswith("| method")).split("|")]
    mine = [cell.strip() for cell in next(line for line in lines if line.startswith("| RWalk")).split("|")]
    assert dict(zip(head, mine, strict=True))["Average accuracy"] == "**76.0 ± 0.0**"
    assert dict(zip(head, mine, strict=True))["Forgetting"] == "**18.0 ± 0.0**"
    assert "domain-incremental, softmax mask: all" in "\n".join(lines)


def test_the_command_writes_names_and_opens_the_page(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = ["run", "split-digits", "--methods", "finetune", "--seeds", "1", "--tasks", "2", "--hidden", "4"]
    assert main([*run, "--out", str(tmp_path / "a")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert not opened
    assert main([*run, "--out", str(tmp_path / "a"), "--open"]) == 0
    place = tmp_path / "b.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(place), "--open"]) == 0
    assert opened == [(tmp_path / "a" / "report.html").as_uri(), place.as_uri()]
    assert place.with_suffix(".md").read_text().startswith("### split-digits")
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize("package", ["jinja2", "vl_convert"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*Run: pip install 'rwalk\[bench\]'"):
        written(THREE, tmp_path)
    assert not list(tmp_path.glob("report.*"))


def test_the_page_opens_with_all_its_charts(visit, records):
    sheet = visit(records)
    sizes = sheet.eval_on_selector_all("svg.chart", "all => all.map(s => [...s.querySelectorAll('[data-tip]')].length)")
    assert len(sizes) == 7
    assert min(sizes) > 0
    drawn = sheet.eval_on_selector_all("svg.chart [data-tip]", "all => all.map(p => p.getBoundingClientRect().width)")
    assert min(drawn) > 3
    assert sheet.locator("nav li").count() == sheet.locator("section.part").count() == 2
    assert sheet.locator("table.methods tbody tr").count() == 10
    assert sheet.locator("table.shaded td").first.inner_text().isdigit()
    assert "near fine-tuning" in sheet.locator("aside").last.inner_text()


@pytest.mark.parametrize("script", [True, False])
def test_methods_are_switched_off_and_on(visit, script):
    sheet = visit(THREE, java_script_enabled=script)
    assert [box.is_checked() for box in sheet.locator(".switches input").all()] == [True] * 3
    mine = sheet.locator(".s1")
    assert mine.count() >= 3
    shown = [part.is_visible() for part in mine.all()]
    sheet.get_by_role("checkbox", name="RWalk").uncheck()
    assert not any(part.is_visible() for part in mine.all())
    assert sheet.locator("figure.s0").is_visible()
    sheet.get_by_role("checkbox", name="RWalk").check()
    assert [part.is_visible() for part in mine.all()] == shown


def test_values_are_shown_under_the_pointer_and_by_arrow_keys(visit):
    sheet = visit(THREE)
    point = sheet.locator('[data-tip="RWalk, tasks learned 2: 76.0 ± 0.0"]')
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    sheet.mouse.move(box["x"] + 9, box["y"] + 9)
    assert sheet.locator("#tip").inner_text() == "RWalk, tasks learned 2: 76.0 ± 0.0"
    sheet.mouse.move(2, 2)
    assert sheet.locator("#tip").is_hidden()
    sheet.locator("svg.chart").first.focus()
    for _ in range(2):
        sheet.keyboard.press("ArrowRight")
    assert sheet.locator("#tip").inner_text() == "fine-tuning, tasks learned 2: 62.5 ± 0.0"


def test_light_and_dark_by_system_and_by_choice_and_light_on_paper(visit):
    def background():
        return sheet.evaluate("getComputedStyle(document.body).backgroundColor")

    def line():
        return sheet.evaluate("getComputedStyle(document.querySelector('g.s1 path')).stroke")

    sheet = visit(THREE, scheme="dark")
    dark, drawn = background(), line()
    sheet.locator("#light").check(force=True)
    assert background() == "rgb(255, 255, 255)"
    assert line() not in (drawn, "none")
    sheet.locator("#dark").check(force=True)
    assert (background(), line()) == (dark, drawn)
    sheet.emulate_media(media="print")
    assert background() == "rgb(255, 255, 255)"
    assert sheet.pdf(prefer_css_page_size=True).startswith(b"%PDF")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_the_width(visit, records, width):
    sheet = visit([*records, *hostile()], width)
    scroll, client = sheet.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scroll <= client == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, records, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    sheet = visit(records[6:], scheme=scheme)
    sheet.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    found = [v for v in axe.Axe().run(sheet).response["violations"] if v["impact"] in ("serious", "critical")]
    assert not [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in found]


def test_hostile_records_do_nothing_in_a_browser(visit):
    sheet = visit(hostile())
    assert clean(HOSTILE) in sheet.locator("body").inner_text()
    assert sheet.locator("img").count() == 0
