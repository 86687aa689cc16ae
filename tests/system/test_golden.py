"""Files that were written by earlier versions can be read for ever: one of each kind and format is kept in `golden`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rwalk import EWC, SI, Anchor, Consolidator, EWCpp, Kronecker, RWalk, TaskFisher, replay, report
from rwalk.bench import Record

GOLDEN = Path(__file__).parent / "golden"
RULES = {
    "rwalk": RWalk(delta_t=4),
    "si": SI(),
    "ewcpp": EWCpp(),
    "ewc": EWC(),
    "task-fisher": TaskFisher(),
    "kronecker": Kronecker(every=2),
}


def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("records-*/*.json")), ids=lambda path: path.name)
def test_records_of_every_format_load_with_all_that_they_hold(path):
    record, raw = Record.load(path), json.loads(path.read_text())
    fields = {field.name for field in dataclasses.fields(Record)}
    assert fields & raw.keys()
    for name in fields & raw.keys():
        assert json.loads(json.dumps(getattr(record, name))) == raw[name], name


def test_a_report_is_made_of_records_of_every_format(tmp_path):
    for folder in GOLDEN.glob("records-*"):
        records, problems = report.read(folder)
        assert len(records) == len(list(folder.glob("*.json")))
        assert not problems
        assert report.write(folder, tmp_path / f"{folder.name}.html").exists()


@pytest.mark.filterwarnings("ignore:.* replaces an adopted anchor")
@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("states-*")), ids=lambda path: path.name)
@pytest.mark.parametrize("name", RULES)
def test_states_and_anchors_load_and_continue(folder, name):
    model = network()
    memory = Consolidator(model, RULES[name])
    memory.load(folder / f"{name}.consolidator")
    anchor = Anchor.load(folder / f"{name}.anchor")
    assert (memory.tasks, memory.steps) == (2, 3)
    assert all(torch.equal(memory.anchor.omega[key], omega) for key, omega in anchor.omega.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    x, y = torch.randn(5, 4), torch.randint(2, (5,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    memory.consolidate([(x, y)])
    assert memory.tasks == 3
    other = Consolidator(network(), RULES[name])
    other.adopt(anchor)
    assert len(other.anchor) == 4


@pytest.mark.parametrize("name", ["ewc", "kronecker"])
def test_anchors_of_before_the_present_format_of_states_load(name):
    anchor = Anchor.load(GOLDEN / "anchors-1" / f"{name}.anchor")
    memory = Consolidator(network(), RULES[name])
    memory.adopt(anchor)
    assert float(memory.penalty()) > 0


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("states-*")), ids=lambda path: path.name)
def test_buffers_load(folder):
    buffer = replay.Buffer(6, select="herding")
    buffer.load(folder / "herding.buffer")
    assert len(buffer) == 6


def test_a_state_of_an_earlier_format_is_refused_in_words():
    memory = Consolidator(network(), RWalk())
    with pytest.raises(ValueError, match=r"The state has format 2, .* reads format 4\. States of earlier versions"):
        memory.load_state_dict({**memory.state_dict(), "format": 2})
