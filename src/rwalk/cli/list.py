"""The list command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.padding import Padding

from rwalk.bench import contents, data
from rwalk.bench.baselines import BASELINES, RECIPES_ABOUT
from rwalk.bench.builtin import STREAMS
from rwalk.bench.dataset import HUB
from rwalk.bench.models import MODELS
from rwalk.cli.options import UNSET
from rwalk.report.plain import shown
from rwalk.rules import rules


@dataclass(frozen=True)
class List:
    """List streams, data sets, models and methods.

    Of the data sets in a folder it reads how many rows they have and what their columns are, not the rows:
      rwalk list
      rwalk list --data ./my-data-sets
    """

    data: Annotated[Path | None, UNSET, tyro.conf.DisallowNone] = None
    """Folder in which folders of data sets lie; default: the environment variable RWALK_DATA."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Print what the other commands know."""
        root = data.folder(self.data)
        found = {"digits": "1,433 + 364 images of handwritten digits, 8 x 8: split, permuted, rotated"} | contents.about(root)
        others = ", ".join(name for name in HUB if name not in found)
        more = {"FOLDER": "Parquet files in the Hugging Face schema.", others: "Downloaded from the Hugging Face hub.",
                "OWNER/NAME": "Any other data set of that hub."}  # fmt: skip
        _entries(console, "Streams (STREAM is a kind, a hyphen, and a data set)", {k: f.__doc__ for k, f in STREAMS.items()})
        where = "--data or RWALK_DATA names no folder" if root is None else f"those in {root} with their streams"
        _entries(console, f"Data sets ({where})", found | {name: text for name, text in more.items() if name})
        _entries(console, "Models", {name: model.about for name, model in MODELS.items()})
        methods = BASELINES | {name: kind.__doc__ for name, kind in rules().items()} | RECIPES_ABOUT
        _entries(console, "Methods", methods)
        return 0


def _entries(console: Console, title: str, entries: Mapping[str, str | None]) -> None:
    """Print names, each with the first line of its description."""
    console.print(shown(console, f"{title}:", "bold"))
    for name, text in entries.items():
        about = (text or "").strip().splitlines()[0]
        line = shown(console, f"{name}  ", "bold").append_text(shown(console, about, "not bold"))
        console.print(Padding(line, (0, 0, 0, 2), expand=False))
    console.print()
