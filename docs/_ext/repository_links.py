"""Links as the repository's pages have them, `../reproduce/README.md#permuted-mnist`, led to the pages of the site.

Markdown files are written to be read in the repository. Links between files in `docs/` work on the site as they are; this
module leads those to other files to the site's page of the same content, and shows the name of a file that is no page.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "/index.md",
    "CHANGELOG.md": "/changelog.md",
    "CONTRIBUTING.md": "/contributing.md",
    "LICENSE": "/licence.md",
    "reproduce/README.md": "/results/reproduced.md",
}
"""The pages that show a file from outside of `docs/`."""
PICTURE = re.compile(r'<picture>\s*<source[^>]*srcset="([^"]+)">\s*<img src="([^"]+)"[^>]*?alt="([^"]+)">\s*</picture>')
"""A picture with a dark variant, as GitHub shows it."""
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`)+)\]\(([^()\s:#]+)(#[^()\s]*)?\)")


def led(text: str, folder: str) -> str:
    """Return a page's text with links that the site can follow.

    Args:
        text: Markdown.
        folder: where its file lies, from the project's folder; links are relative to it.
    """
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)  # links in code are none
    parts[::2] = [PICTURE.sub(r"![\3](\2){.only-light}\n![\3](\1){.only-dark}\n", part) for part in parts[::2]]
    parts[::2] = [LINK.sub(lambda link: _link(*link.groups(default=""), folder=folder), part) for part in parts[::2]]
    return "".join(parts)


def _link(words: str, target: str, anchor: str, folder: str) -> str:
    path = os.path.normpath(os.path.join(folder, target))
    if path in PAGES:
        place = PAGES[path] + (anchor if path != "README.md" else "")
    elif path.startswith("examples/") and (ROOT / path).is_file():
        place = f"/examples.md#{Path(path).stem.replace('_', '-')}"
    elif path.startswith("docs/"):
        place = path.removeprefix("docs") + anchor
    elif (ROOT / path).is_file():
        return f"`{path}`"
    else:
        place = target + anchor  # Sphinx complains
    return f"[{words}]({place})"


def _read(_: Sphinx, name: str, content: list[str]) -> None:
    content[0] = led(content[0], f"docs/{name}".rpartition("/")[0])


def _included(_: Sphinx, path: Path, __: str, content: list[str]) -> None:
    if path.suffix == ".md":
        content[0] = led(content[0], os.path.normpath(f"docs/{path}").rpartition("/")[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Lead the links of every page that is read, and of every file that a page includes."""
    app.connect("source-read", _read)
    app.connect("include-read", _included)
    return {"parallel_read_safe": True}
