"""The directive `cli-help`: what a command of `rwalk` prints for `--help`, asked when the site is built."""

import os
import subprocess
import sys

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PLAIN = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}


class CliHelp(SphinxDirective):
    """Show the help of one command, or of all without an argument."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the help as a block of text."""
        self.env.note_reread()  # whatever has changed in the library
        command = [sys.executable, "-m", "rwalk", *" ".join(self.arguments).split(), "--help"]
        done = subprocess.run(command, env=os.environ | PLAIN, capture_output=True, text=True, check=True)
        text = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
        return [nodes.literal_block(text, text, language="text", classes=["cli-help"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("cli-help", CliHelp)
    return {"parallel_read_safe": True}
