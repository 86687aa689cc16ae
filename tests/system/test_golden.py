"""Files that were written by earlier versions can be read for ever: one of each kind and format is kept in `golden`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rwalk import EWC, SI, Anchor, Consolidator, EWCpp, Kronecker, RWalk, TaskFisher, replay, report
from rwalk._io import states
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
EARLIER = Kronecker(every=2, measure="data", share=1.0, rank=None)
"""What `Kronecker` was up to format 4."""


def rule_of(name, folder):
    return EARLIER if name == "kronecker" and folder in ("states-3", "states-4", "anchors-1") else RULES[name]


def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("records-*/*.json")), ids=lambda path: path.name)
def test_records_of_every_format_load_with_all_that_they_hold(path):
    record, raw = Record.load(path), json.loads(path.read_text())
    if path.parent.name == "records-1":
        raw |= {"scores": raw.pop("accuracy"), "format": 2}
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
    model, rule = network(), rule_of(name, folder.name)
    memory = Consolidator(model, rule)
    memory.load(folder / f"{name}.consolidator")
    anchor = Anchor.load(folder / f"{name}.anchor")
    assert (memory.tasks, memory.steps) == (2, 3)
    assert anchor.point.keys() == memory.anchor.point.keys()
    for key, importance in anchor.importance().items():
        rtol = 0.02 if importance.dtype is torch.bfloat16 else 1e-6
        assert torch.allclose(memory.anchor.importance()[key], importance.float(), rtol=rtol)
    assert float(sum(o.sum() for o in anchor.importance().values())) > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    x, y = torch.randn(5, 4), torch.randint(2, (5,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    memory.consolidate([(x, y)])
    assert memory.tasks == 3
    other = Consolidator(network(), rule)
    other.adopt(anchor)
    assert len(other.anchor) == 4


@pytest.mark.parametrize("name", ["ewc", "kronecker"])
def test_anchors_of_before_the_present_format_of_states_load(name):
    anchor = Anchor.load(GOLDEN / "anchors-1" / f"{name}.anchor")
    memory = Consolidator(network(), rule_of(name, "anchors-1"))
    memory.adopt(anchor)
    assert float(memory.penalty()) > 0


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("states-*")), ids=lambda path: path.name)
def test_buffers_load(folder):
    buffer = replay.Buffer(6, select="herding")
    buffer.load(folder / "herding.buffer")
    assert len(buffer) == 6


def test_a_state_of_an_earlier_format_is_refused_in_words():
    memory = Consolidator(network(), RWalk())
    with pytest.raises(ValueError, match=r"The state has format 2, .* reads format 5\. States of earlier versions"):
        memory.load_state_dict({**memory.state_dict(), "format": 2})


@pytest.mark.parametrize("folder", ["states-3", "states-4"])
def test_layers_of_earlier_versions_keep_their_penalty_and_their_place_in_a_turn(folder):
    """Truth: what the file holds, both matrices multiplied out by hand."""
    raw = states.load(GOLDEN / folder / "kronecker.consolidator", "consolidator")
    memory = Consolidator(network(), EARLIER)
    memory.load(GOLDEN / folder / "kronecker.consolidator")
    model = memory.model
    truth = 0.0
    for weight, layer in raw["anchor"]["layers"].items():
        sides = [
            basis.float() @ torch.diag(values.float()) @ basis.float().T
            for basis, values in (layer["outputs"], layer["inputs"])
        ]
        theta, point = dict(model.named_parameters()), raw["anchor"]["point"]
        d = [theta[name].detach() - point[name].float() for name in (layer["bias"], weight)]
        d = torch.cat([d[0].unsqueeze(1), d[1]], 1)
        truth += float((sides[0] @ d * (d @ sides[1])).sum())
    assert float(memory.penalty()) == pytest.approx(raw["strength"] * truth, rel=1e-4)
    deferred = next(layer["deferred"] if "deferred" in layer else layer["owed"] for layer in raw["anchor"]["layers"].values())
    turns = memory.state_dict()["turns"]
    assert turns["since"] == deferred[1] == 1
    assert turns["lengths"]["0.weight"] * 0.015 == pytest.approx(deferred[0])
