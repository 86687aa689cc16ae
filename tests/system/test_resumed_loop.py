"""The loop of docs/own_loop.md continues after an interruption with the same result to the bit."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from cases import assert_same_state, same

PAGE = (Path(__file__).parents[2] / "docs" / "own_loop.md").read_text()
LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
SHORT = LOOP.replace("EPOCHS, PATIENCE, FILE = 8", "EPOCHS, PATIENCE, FILE = 3").replace("tasks=3", "tasks=2")


def ran():
    scope = {}
    exec(compile(SHORT, "own_loop.md", "exec"), scope)
    return scope


def stopped_at(place, call):
    """Run the loop, and stop it as Ctrl-C does at one call of a function."""
    function, calls = getattr(*place), []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with mock.patch.object(*place, stopping), pytest.raises(KeyboardInterrupt):
        ran()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return ran()


@pytest.mark.parametrize(
    ("place", "call"),
    [((torch, "save"), 1), ((torch, "save"), 3), ((torch.optim.SGD, "zero_grad"), 150), ((torch.optim.SGD, "zero_grad"), 200)],
    ids=["first save", "third save", "the third epoch", "the second task"],
)
def test_an_interrupted_run_ends_as_a_whole_one(whole, place, call, tmp_path, monkeypatch):
    assert SHORT.count("= 3") == SHORT.count("tasks=2") == 1
    monkeypatch.chdir(tmp_path)
    stopped_at(place, call)
    continued = ran()
    assert continued["memory"].tasks == 2
    assert same(dict(continued["model"].state_dict()), dict(whole["model"].state_dict()))
    assert_same_state(continued["memory"], whole["memory"])
