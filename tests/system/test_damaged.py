"""Files that are damaged, and files with a right checksum around content of a wrong kind: a plain sentence, and no change."""

import io
import json
import warnings
from contextlib import suppress
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_durability import interrupted, measurement

from cases import same
from rwalk import SI, Anchor, Consolidator, Kronecker, RWalk, bench, report
from rwalk._io import files, states
from rwalk.bench import Record, Training
from rwalk.bench.checkpoint import scores_so_far
from rwalk.bench.tuned import Tuned
from rwalk.replay import Buffer
from rwalk.report import page, svg, terminal
from rwalk.report.markdown import markdown
from spoilt import mutations, refused, spoilt

QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DATA = [(torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]]), torch.tensor([[0.0], [1.0], [0.5]]))]
RULES = {"recipe": lambda: None, "RWalk": lambda: RWalk(alpha=0.1), "SI": SI,
         "Kronecker": lambda: Kronecker(labels="true")}  # fmt: skip


def memory_of(name):
    """A consolidator in the middle of its second task."""
    torch.manual_seed(3)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, RULES[name]()).attach(optimizer)
    train(memory, optimizer)
    memory.consolidate(DATA, loss=squares)
    train(memory, optimizer)
    return memory, optimizer


def squares(output, target):
    return (output - target).square().sum()


def train(memory, optimizer):
    for x, y in DATA * 3:
        optimizer.zero_grad()
        squares(memory.model(x), y).backward()
        optimizer.step()


def works(memory, optimizer):
    """Go on with what was loaded; numbers that make no sense may overflow, as they may anywhere."""
    with warnings.catch_warnings(action="ignore"):
        try:
            memory.summary()
            train(memory, optimizer)
            memory.consolidate(DATA, loss=squares)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            refusal = error
        else:
            return
    assert isinstance(refusal, ArithmeticError) or refused(refusal)


def goes_in(load, before, after):
    """Load; on a refusal in plain words demand that nothing has changed, and return False."""
    try:
        load()
    except ValueError as error:
        refusal = error
    else:
        return True
    assert refused(refusal)
    assert same(after(), before)
    return False


@settings(QUICK, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", RULES)
def test_a_sealed_state_of_a_wrong_kind_is_refused_or_works(tmp_path, name, data):
    memory, optimizer = memory_of(name)
    good = memory.state_dict()
    states.save(tmp_path / "f", "consolidator", data.draw(spoilt(good, tensors=True)))
    if goes_in(lambda: memory.load(tmp_path / "f"), good, memory.state_dict):
        works(memory, optimizer)


@settings(QUICK, max_examples=100)
@given(st.data())
@pytest.mark.parametrize("name", ["RWalk", "Kronecker"])
def test_a_sealed_anchor_of_a_wrong_kind_is_refused_or_works(tmp_path, name, data):
    memory, optimizer = memory_of(name)
    memory.consolidate(DATA, loss=squares)
    before = memory.state_dict()
    states.save(tmp_path / "f", "anchor", data.draw(spoilt(memory.anchor.content(), tensors=True)))
    adopted = []

    def load():
        anchor = Anchor.load(tmp_path / "f")
        anchor.largest()
        anchor.save(tmp_path / "again")
        with warnings.catch_warnings(action="ignore"):
            adopted.append(memory.adopt(anchor))

    if goes_in(load, before, memory.state_dict):
        str(adopted[0])
        works(memory, optimizer)


def filled(select, per):
    buffer = Buffer(4, per, select)
    buffer.add(None, [(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))])
    return buffer


@settings(QUICK, max_examples=100)
@given(st.data())
@pytest.mark.parametrize(("select", "per"), [("uniform", "total"), ("reservoir", "total"), ("reservoir", "class")])
def test_a_sealed_buffer_of_a_wrong_kind_is_refused_or_works(tmp_path, select, per, data):
    buffer = filled(select, per)
    before = buffer.state_dict()
    states.save(tmp_path / "f", "buffer", data.draw(spoilt(before, tensors=True)))
    if goes_in(lambda: buffer.load(tmp_path / "f"), before, buffer.state_dict):
        assert repr(buffer)
        assert len(buffer) == 0 or len(buffer.sample(2).y) == 2
        assert buffer.tasks >= 0
        with suppress(ValueError):  # examples of another form than those that were loaded, or of a class that is there already
            buffer.add(None, [(torch.ones(2, 2), torch.tensor([2, 3]))])
        assert buffer.nbytes


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A function that returns for a method a stream, how to train on it, and a checkpoint after its first task."""
    stream, found = bench.split("digits", tasks=2), {}
    training = Training(hidden=(4,), batch_size=200, optimizer="momentum")

    def of(method):
        if method not in found:
            place = tmp_path_factory.mktemp("stopped") / "c"
            interrupted(stream, method, place, 5, training)
            found[method] = states.load(place, "checkpoint")
        return stream, training, found[method]

    return of


@settings(QUICK, max_examples=25)
@given(st.data())
@pytest.mark.parametrize("method", ["finetune", "recipe", "lwf", "replay"])
def test_a_sealed_checkpoint_of_a_wrong_kind_starts_anew_or_works(tmp_path, stopped, method, data):
    stream, training, content = stopped(method)
    states.save(tmp_path / "c", "checkpoint", data.draw(spoilt(content, tensors=True)))
    assert scores_so_far(tmp_path / "c") is not None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        record = bench.run(stream, method, training=training, checkpoint=tmp_path / "c")
    assert Record.load(record.save(tmp_path))
    if any(f"`{tmp_path / 'c'}`" in str(one.message) for one in heard):
        assert measurement(record) == measurement(bench.run(stream, method, training=training))


def recorded(**changes):
    """A record with something everywhere."""
    config = {"stream": {"name": "split-x", "tasks": 2, "scenario": "class", "seed": 0, "rows": [5, 3]},
              "training": {"epochs": 1, "hidden": [4], "model": "mlp", "mask": "seen", "lr": 0.1}, "strength": 0.5,
              "rule": {"alpha": 0.9, "overlap": True}, "pull": "gradient", "average": "none",
              "replay": {"size": 4, "per": "total", "select": "uniform", "batch": None}}  # fmt: skip
    figures = {"penalty": 0.1, "penalty / loss": 0.5, "windows beyond eps": 0.2, "penalty from score": 0.6}
    diagnostics = [{"figures": figures, "layers": [{"name": "0", "share": 1.0, "drift": 0.1}]}] * 2
    parts = {"method": "rwalk+replay", "stream": "split-x", "seed": 0, "scores": [[0.5, None], [0.4, 0.6]],
             "untrained": [0.1, None], "bits": [[2.0, 2.0], [1.5, 1.0]], "config": config, "diagnostics": diagnostics,
             "timings": {"train_seconds": 1.0, "step_ms": 2.0}, "memory": {"model_bytes": 8, "state_bytes": 8},
             "versions": {"torch": "2", "kernels": "numba+blocked"}}  # fmt: skip
    return Record(**parts | changes)


@pytest.fixture(scope="module")
def undrawn():
    """Leave the drawing of charts out, which takes its time, but for what is to be drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svg, "draw", lambda chart: json.dumps(svg.spec(chart)))
        yield


@settings(QUICK, max_examples=40)
@given(st.data())
@pytest.mark.usefixtures("undrawn")
def test_a_sealed_record_of_a_wrong_kind_is_left_out_or_reported(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs")
    others = [recorded(seed=1), recorded(method="finetune"), recorded(method="joint", seed=3)]
    for other in others:
        other.save(folder)
    files.seal(folder / "odd.json", data.draw(spoilt(asdict(recorded()))))
    records, problems = report.read(folder)
    assert len(records) + len(problems) == 4
    assert all(f"`{folder / 'odd.json'}`" in p and p.endswith(".") for p in problems)
    shown(records)
    page.render(report.summarise(records))
    markdown(report.summarise(records))


def shown(records):
    """Print the tables of records, and a comparison with themselves."""
    console = Console(file=io.StringIO(), width=200)
    report.show(report.summarise(records), console)
    terminal.show_contrast(report.compare(records, records[:2]), "a", "b", console)


@settings(QUICK, max_examples=40)
@given(st.data())
@pytest.mark.usefixtures("undrawn")
def test_a_sealed_file_of_tuning_of_a_wrong_kind_is_named_or_works(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs")
    recorded().save(folder)
    trials = [{"strength": s, "lr": 0.1, "accuracy": s, "seeds": {"0": s}, "failures": []} for s in (0.5, 1.0)]
    good = Tuned("rwalk+replay", "split-x", 0.5, 0.1, 0.5, 2, trials, recorded().config, ["strength"])
    files.seal(folder / "odd.tuned", data.draw(spoilt(asdict(good))))
    records, problems = report.read(folder)
    assert len(records) == 1
    page.write(folder)
    if not problems:
        terminal.show_tuned(Tuned.load(folder / "odd.tuned"), "rwalk run", Console(file=io.StringIO()))
        return
    assert f"`{folder / 'odd.tuned'}`" in problems[0]
    assert problems[0].endswith(".")


def kinds(folder):
    """Yield a file of each kind with a function that reads it and returns what it holds."""
    memory, _ = memory_of("RWalk")
    memory.save(folder / "consolidator")
    yield folder / "consolidator", lambda: memory.load(folder / "consolidator")
    memory.anchor.save(folder / "anchor")
    yield folder / "anchor", lambda: Anchor.load(folder / "anchor")
    buffer = filled("uniform", "total")
    buffer.save(folder / "buffer")
    yield folder / "buffer", lambda: buffer.load(folder / "buffer")
    states.save(folder / "checkpoint", "checkpoint", {"run": {}, "learner": memory.state_dict()})
    yield folder / "checkpoint", lambda: states.load(folder / "checkpoint", "checkpoint")
    record = recorded().save(folder)
    yield record, lambda: Record.load(record)
    trials = [{"strength": 0.5, "lr": 1e-5, "accuracy": 0.5, "seeds": {"0": 0.5}, "failures": []}]
    chosen = Tuned("rwalk", "split-x", 0.5, 1e-5, 0.5, 2, trials, recorded().config).save(folder)
    yield chosen, lambda: Tuned.load(chosen)


def test_no_damaged_file_of_any_kind_is_believed(tmp_path):
    """JSON may be written in several ways: what reads as the same content is not damaged."""
    for path, load in kinds(tmp_path):
        raw, truth = path.read_bytes(), load()
        for spoiled in mutations(raw, 250):
            path.write_bytes(spoiled)
            if spoiled == raw:
                continue
            try:
                found = load()
            except ValueError as error:
                refusal = error
            else:
                assert isinstance(truth, Record | Tuned)
                assert found == truth
                continue
            assert f"`{path}`" in str(refusal)
            assert refused(refusal)
