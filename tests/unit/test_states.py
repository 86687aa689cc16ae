"""State files: what is saved comes back as it was, and nothing else is ever taken for it."""

import copy
import hashlib
import io
import json
import math
import os
import struct
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as serialise

from cases import assert_same_state, batches, mlp, same, train
from rwalk import EWC, L2, Anchor, Consolidator, Kronecker, RWalk
from rwalk._io import states
from rwalk.rules import rules

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
THREE = r"`[^`]*` is .*\. (Copy it again|Update the library), or pass another file that `Consolidator\.save` wrote\."


def small(rule=None, steps=5, strength=0.1):
    """A consolidator of two weights and a bias, one task and some steps old, and its model."""
    torch.manual_seed(3)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, rule or RWalk(), strength=strength).attach(optimizer)
    for _ in range(2):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 2)).square().mean().backward()
            optimizer.step()
        if memory.tasks == 0:
            memory.consolidate()
    return model, memory


shapes = st.lists(st.integers(0, 3), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
tensors = st.builds(lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype), shapes, dtypes)
keys = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["$tensor", "__metadata__", "a/b", "sha256"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5)
trees = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@QUICK
@given(st.dictionaries(keys, trees, max_size=3))
def test_what_is_saved_comes_back_in_value_and_type(tmp_path, content):
    states.save(tmp_path / "f", "checkpoint", content)
    assert same(states.load(tmp_path / "f", "checkpoint"), content)


def test_numbers_of_numpy_come_back_as_pythons_and_memory_order_is_kept(tmp_path):
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    both = torch.zeros(4)
    content = {"w": weight, "n": np.int64(5), "x": np.float32(0.5), "views": [both[:2], both[2:], both], "empty": both[:0]}
    states.save(tmp_path / "f", "checkpoint", content)
    loaded = states.load(tmp_path / "f", "checkpoint")
    assert same(loaded, content | {"n": 5, "x": 0.5})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j])
def test_what_a_file_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=rf"there is a `{type(value).__name__}` at `/a/0`\. Convert it"):
        states.save(tmp_path / "f", "checkpoint", {"a": [value]})
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The gradient pull overshoots")
@pytest.mark.parametrize("name", [*sorted(rules()), "recipe"])
def test_a_file_in_the_middle_of_a_task_continues_bit_for_bit(tmp_path, name):
    """Truth: the same training without a file in between."""
    model = mlp()
    memory = Consolidator(model, rules()[name]() if name in rules() else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)

    def finish(memory, optimizer):
        train(memory.model, optimizer, batches(2, 9))
        memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(2, 3)])

    train(model, optimizer, batches(0, 13))
    memory.consolidate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 3)])
    train(model, optimizer, batches(1, 7))
    memory.save(tmp_path / "memory.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]
    other = copy.deepcopy(model)
    second = Consolidator(other, memory.rule, pull=memory.pull, average=memory.average)
    second.load(tmp_path / "memory.safetensors")
    assert same(second.state_dict(), memory.state_dict())
    assert type(second._memory.state) is type(memory._memory.state)
    again = torch.optim.SGD(other.parameters(), lr=0.1)
    second.attach(again)
    finish(memory, optimizer)
    finish(second, again)
    assert_same_state(memory, second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_torchs_own_files_take_a_state_too_under_numpys_numbers():
    model, memory = small(RWalk(alpha=np.float32(0.5), delta_t=np.int64(3)))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = Consolidator(model, RWalk(alpha=np.float32(0.5), delta_t=np.int64(3)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other.state_dict(), memory.state_dict())


class Victim:
    """A consolidator that nothing damaged may change, and the bytes of a file for it."""

    def __init__(self, folder):
        self.model, self.memory = small(L2(), strength=0.3)
        self.path = folder / "f"
        small(L2())[1].save(self.path)
        self.raw = self.path.read_bytes()
        self.before = self.memory.state_dict()
        self.anchor = self.memory.anchor

    def refuses(self, raw, pattern=THREE):
        self.path.write_bytes(raw)
        with pytest.raises(ValueError, match=pattern):
            self.memory.load(self.path)
        assert self.memory.anchor is self.anchor
        assert self.memory.strength == 0.3


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    victim = Victim(tmp_path)
    for i in range(len(victim.raw)):
        for bit in range(8):
            flipped = bytearray(victim.raw)
            flipped[i] ^= 1 << bit
            victim.refuses(bytes(flipped))
        victim.refuses(victim.raw[:i])
    assert same(victim.memory.state_dict(), victim.before)
    victim.path.write_bytes(victim.raw)
    victim.memory.load(victim.path)
    assert victim.memory.strength == 0.1


@settings(QUICK, max_examples=300)
@given(st.data())
def test_garbage_and_spliced_files_are_noticed(tmp_path, data):
    victim = Victim(tmp_path)
    raw = victim.raw
    kind = data.draw(st.sampled_from(["random", "longer", "spliced", "header", "claim"]))
    some = data.draw(st.binary(max_size=200))
    at = data.draw(st.integers(0, len(raw)))
    until = data.draw(st.integers(at, len(raw)))
    spoilt = {
        "random": some,
        "longer": raw + b"x" + some,
        "spliced": raw[:at] + some + raw[until:],
        "header": struct.pack("<Q", len(some)) + some,
        "claim": struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + raw[8:],
    }[kind]
    if spoilt != raw:
        victim.refuses(spoilt)
        assert same(victim.memory.state_dict(), victim.before)


@pytest.mark.parametrize("metadata", [
    None, {}, {"format": "pt"}, {"format": "rwalk-consolidator-1"}, {"format": "rwalk-consolidator-1", "content": "{}"},
    {"format": "rwalk-consolidator-1", "content": "{}", "sha256": "0" * 64}, {"format": "rwalk-consolidator-" + "9" * 30},
    {"format": "rwalk-consolidator-1", "content": "[" * 100_000, "sha256": "0" * 64},
], ids=lambda m: str(m)[:60])  # fmt: skip
def test_other_safetensors_files_are_foreign(tmp_path, metadata):
    Victim(tmp_path).refuses(serialise({"weight": torch.zeros(2)}, metadata))


@pytest.mark.parametrize("content", [
    "[]", "1", "NaN", '{"a": NaN}', "[" * 100_000, "{", '{"a": {"$tensor": "absent"}}', '{"a": {"$tensor": []}}',
    '{"a": {"$float": "x"}}', '{"a": {"$tuple": 3}}', '{"a": {"$items": [[{}, 1]]}}', '{"a": {"$items": [[[], 1]]}}',
    '{"a": {"$tensor": "w", "layout": "x"}}', '{"a": {"$tensor": "w", "layout": "channels_last"}}', '{"$tuple": []}',
], ids=lambda c: c[:40])  # fmt: skip
def test_crafted_content_under_a_right_checksum_is_refused(tmp_path, content):
    raw = serialise({"w": torch.zeros(2)}, {"format": "rwalk-consolidator-1", "content": content, "sha256": "0" * 64})
    digest = hashlib.sha256(raw).hexdigest().encode()  # of the file with zeros where the digest stands
    victim = Victim(tmp_path)
    victim.refuses(raw.replace(b"0" * 64, digest), "` is (of content that cannot be read|no dictionary)")


def leaves(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ():
        yield from leaves(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        return {k: replaced(v, path[1:], new) if k == path[0] else v for k, v in value.items()}
    return type(value)(replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value))


@settings(QUICK, max_examples=300)
@given(st.data())
def test_a_crafted_state_fits_or_changes_nothing(tmp_path, data):
    model, memory = small()
    good = memory.state_dict()
    place = data.draw(st.sampled_from([p for p in leaves(good) if p]))
    states.save(tmp_path / "f", "consolidator", replaced(good, place, data.draw(trees)))
    second = Consolidator(model, memory.rule, strength=2.0)
    before = second.state_dict()
    problem = None
    try:
        second.load(tmp_path / "f")
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        assert problem.endswith(".")
        assert same(second.state_dict(), before)


def test_newer_formats_other_kinds_other_rules_and_other_models_are_named(tmp_path, monkeypatch):
    victim = Victim(tmp_path)
    monkeypatch.setattr(states, "FORMAT", 2)
    victim.memory.save(victim.path)
    monkeypatch.undo()
    victim.refuses(victim.path.read_bytes(), r"of the newer format 2\. Update the library")
    victim.memory.anchor.save(victim.path)
    victim.refuses(victim.path.read_bytes(), "another kind of state, anchor")
    victim.path.write_bytes(victim.raw)
    with pytest.raises(ValueError, match=r"another kind of state, consolidator.*`Anchor\.save` wrote"):
        Anchor.load(victim.path)
    with pytest.raises(ValueError, match=r"The state was saved with rule .*'L2'.* has .*'EWC'"):
        Consolidator(victim.model, EWC()).load(victim.path)
    with pytest.raises(ValueError, match=r"The state is of another model: `weight`"):
        Consolidator(torch.nn.Linear(3, 1), L2()).load(victim.path)
    with pytest.raises(FileNotFoundError):
        victim.memory.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="` is no file"):
        victim.memory.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="` is no file"):
        victim.memory.load(tmp_path / "pipe")
    assert same(victim.memory.state_dict(), victim.before)


def test_others_can_read_the_tensors(tmp_path):
    from safetensors import safe_open

    _, memory = small()
    memory.save(tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("anchor/omega/weight"), memory.anchor.omega["weight"])
        assert json.loads(file.metadata()["content"])["rule"]["name"] == "RWalk"


def as_format_3(state, memory, last_gradient=None):
    """Return a state in the middle of a task as format 3 had it: with an open window, and where the last step ended.

    With the gradient of the last step, as it was where nobody had seen that step end: the path lacks its last part.
    """
    walk = dict(state["state"])
    walk["previous"], walk["resting"] = walk.pop("last"), last_gradient is None
    if last_gradient is not None:
        walk["path"] = [
            p + g * (now - mark)
            for p, g, now, mark in zip(walk["path"], last_gradient, memory.model.parameters(), walk["mark"], strict=True)
        ]
        walk["previous"] = last_gradient
    return {**state, "format": 3, "state": walk}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("delta_t", [3, 4])
def test_a_state_of_format_3_goes_on_as_if_it_had_not_been_saved(delta_t, seen):
    """In format 3 a window of three steps is open after three steps; today it has been ended."""

    def trained(delta_t, steps):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory = Consolidator(model, RWalk(delta_t=delta_t), 0.0).attach(optimizer)
        train(model, optimizer, batches(0, 5))
        memory.consolidate()
        train(model, optimizer, batches(1, steps))
        return model, optimizer, memory

    model, _, memory = trained(4, 3)
    gradients = None if seen else [p.grad.clone() for p in model.parameters()]
    old = as_format_3(memory.state_dict(), memory, gradients)
    old["rule"] = {**old["rule"], "delta_t": delta_t}
    fresh = Consolidator(model, RWalk(delta_t=delta_t), 0.0)
    memory.detach()
    fresh.load_state_dict(old)
    _, _, truth = trained(delta_t, 3)
    truth.detach()
    ours, expected = fresh.state_dict()["state"], truth.state_dict()["state"]
    if delta_t == 4:
        assert ours["windows"] == expected["windows"]
    for key in ("path", "score", "mark", "last"):
        for a, b in zip(ours[key], expected[key], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("rule", [RWalk(), Kronecker()], ids=repr)
def test_a_memory_that_was_loaded_without_its_weights_is_noticed_at_the_first_step(rule):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = Consolidator(model, rule).attach(optimizer)
    train(model, optimizer, batches(0, 8))
    memory.consolidate()
    saved, weights = memory.state_dict(), model.state_dict()
    for name in ("both", "memory alone"):
        torch.manual_seed(7)
        other = mlp()
        for p in other.parameters():
            torch.nn.init.normal_(p)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
        memory = Consolidator(other, rule)
        memory.load_state_dict(saved)
        if name == "both":
            other.load_state_dict(weights)  # after the memory, which is as good
        memory.attach(optimizer)
        with nullcontext() if name == "both" else pytest.warns(UserWarning, match="Load the weights that were saved with"):
            train(other, optimizer, batches(1, 2))


def test_a_models_state_is_not_taken_for_a_memorys():
    model = mlp()
    with pytest.raises(ValueError, match="This is no state of a consolidator, but perhaps a model's"):
        Consolidator(model, RWalk()).load_state_dict(model.state_dict())
