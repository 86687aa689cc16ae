"""The list command."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from rwalk.bench.baselines import BASELINES, RECIPES_ABOUT
from rwalk.bench.builtin import STREAMS
from rwalk.bench.dataset import HUB
from rwalk.bench.models import MODELS
from rwalk.report.plain import shown
from rwalk.rules import rules


@dataclass(frozen=True)
class List:
    """List streams, data sets, models and methods."""

    def do(self, words: Sequence[str], console: Console) -> int:  # noqa: ARG002
        """Print what the other commands know."""
        console.print("Streams (STREAM is a kind, a hyphen, and a data set):", style="bold")
        _entries(console, {kind: function.__doc__ for kind, function in STREAMS.items()})
        console.print("\nData sets:", style="bold")
        _entries(console, {"digits": "Handwritten digits, 8 x 8.", "FOLDER": "Parquet files in the Hugging Face schema.",
                           ", ".join(HUB): "A folder of that name below --data or RWALK_DATA, else a download."})  # fmt: skip
        console.print("\nModels:", style="bold")
        _entries(console, {name: model.about for name, model in MODELS.items()})
        console.print("\nMethods:", style="bold")
        _entries(console, BASELINES | {name: kind.__doc__ for name, kind in rules().items()} | RECIPES_ABOUT)
        return 0


def _entries(console: Console, entries: dict[str, str | None] | dict[str, str]) -> None:
    for name, text in entries.items():
        about = (text or "").strip().splitlines()[0]
        console.print(shown(console, f"  {name}  ", "bold").append_text(shown(console, about, "not bold")))
