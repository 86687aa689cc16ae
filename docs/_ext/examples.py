"""Writes the page of examples: each script of `examples/` with its docstring, which is Markdown, as a section's text."""

import ast
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path(__file__).parents[2] / "examples"


def section(script: Path) -> str:
    """Return a script as Markdown, under a label with its name."""
    code = script.read_text()
    first = ast.parse(code).body[0]
    text = str(ast.literal_eval(first.value)).strip().removeprefix("# ")  # type: ignore[attr-defined]
    title, _, words = text.partition("\n")
    rest = "\n".join(code.splitlines()[first.end_lineno :]).strip()
    return f"({script.stem.replace('_', '-')})=\n## {title}\n\n`examples/{script.name}`\n{words}\n\n````py\n{rest}\n````\n"


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    if name == "examples":
        scripts = sorted(FOLDER.glob("*.py"))
        content[0] += "\n" + "\n".join(map(section, scripts))
        for script in scripts:
            app.env.note_dependency(str(script))


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the page when it is read, before its links are followed."""
    app.connect("source-read", _read, priority=400)
    return {"parallel_read_safe": True}
