"""The Python of pages that need hosts runs, one block after the other."""

import re
import warnings
from pathlib import Path

import pytest

import hosts

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [path.name for path in sorted(DOCS.glob("*.md")) if path.stem in ("hosts", "language_models")]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_pages_runs(page, tmp_path, monkeypatch):
    for name in ("lightning", "peft", "sklearn", "transformers"):
        pytest.importorskip(name, reason=f"needs {name}: make test-integrations")
    hosts.avalanche()
    monkeypatch.chdir(tmp_path)
    scope = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what hosts say of loggers, workers and versions
        for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S):
            exec(compile(block, page, "exec"), scope)
    assert "callback" in scope
