"""The Python of the pages about hosts runs, each section as a program of its own."""

import re
from pathlib import Path

import pytest
from test_examples import run

DOCS = Path(__file__).parents[2] / "docs"


def sections():
    """Each section of the two pages that has code: its heading, and its blocks joined; language_models.md is one program."""
    parts = re.split(r"^## ", (DOCS / "hosts.md").read_text(), flags=re.MULTILINE)
    parts.append("Language models\n" + (DOCS / "language_models.md").read_text())
    found = {part.partition("\n")[0]: "".join(re.findall(r"```python\n(.*?)```", part, re.S)) for part in parts}
    return {heading: code for heading, code in found.items() if code}


@pytest.mark.parametrize("heading", sections())
def test_the_python_of_a_section_runs(heading, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(sections()[heading])
    run(script, tmp_path)


def test_every_host_has_a_section():
    assert [*sections()] == ["Hugging Face", "Lightning", "Avalanche", "scikit-learn", "Language models"]
