"""What tuning has chosen, as a JSON file that can be read without torch."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench.record import file_name, is_number

SUFFIX = ".tuned"


@dataclass(frozen=True)
class Tuned:
    """What tuning has chosen, and all trials.

    Args:
        method: name of the method.
        stream: name of the stream.
        strength, lr: the values whose accuracy on held-out examples is highest.
        accuracy: that accuracy, averaged over tasks and seeds, a fraction.
        tasks: how many of the stream's tasks were tried on; `later(stream, tasks)` are the others.
        trials: for each pair of values its accuracy (None if a run failed), the accuracies by seed, and causes of failures.
        config: every setting of the trials except the two values.
        edge: the values that lie at an end of what was tried, so that better ones may lie beyond.
    """

    method: str
    stream: str
    strength: float
    lr: float
    accuracy: float
    tasks: int
    trials: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    edge: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """File name: the same for the same method, stream and settings."""
        return tuned_name(self.stream, self.method, self.config)

    def save(self, folder: str | Path) -> Path:
        """Write a JSON file that `rwalk run --strength tuned` finds by the settings, and return its path."""
        path = Path(folder) / self.name
        files.folder(path.parent)
        files.seal(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Tuned":
        """Read a file of `save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, was changed, or is named like that of other settings.
        """
        try:
            content = files.unseal(path)
            if wrong := [key for key, holds in PARTS.items() if not holds(content.get(key))]:
                raise ValueError(f"its `{wrong[0]}` is missing or of another kind")
            found = cls(**{f.name: content[f.name] for f in fields(cls)})
            if NAMED.fullmatch(Path(path).name) and Path(path).name != found.name:
                raise ValueError(f"it is named like another one; its content is that of `{found.name}`")
        except ValueError as error:
            raise ValueError(printable(f"`{path}` holds no tuned strength: {error}. Tune again.")) from None
        return found


NAMED = re.compile(rf".*-[0-9a-f]{{10}}\{SUFFIX}", re.DOTALL)
"""Names that `tuned_name` gives."""


def tuned_name(stream: str, method: str, config: dict[str, Any]) -> str:
    """Name the file for settings, whatever the seed and the number of tasks; values that were tuned are no part of them."""
    about = {k: v for k, v in config["stream"].items() if k not in ("name", "seed", "tasks", "skipped", "validation")}
    training = {k: v for k, v in config["training"].items() if k != "lr"}
    fixed = {k: v for k, v in config.items() if k != "strength"} | {"stream": about, "training": training}
    return file_name(stream, method, 0, fixed).replace("-seed0-", "-").removesuffix(".json") + SUFFIX


def _known(value: Any) -> bool:
    return value is not None and is_number(value) and value >= 0


def _is_trial(trial: Any) -> bool:
    if not isinstance(trial, dict) or not {"strength", "lr", "accuracy", "seeds"} <= trial.keys():
        return False
    seeds = trial["seeds"]
    measured = isinstance(seeds, dict) and all(map(is_number, [trial["accuracy"], *seeds.values()]))
    return measured and _known(trial["strength"]) and _known(trial["lr"])


PARTS: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "stream": lambda value: isinstance(value, str),
    "strength": _known,
    "lr": _known,
    "accuracy": _known,
    "tasks": lambda value: type(value) is int,
    "trials": lambda value: isinstance(value, list) and all(map(_is_trial, value)),
    "config": lambda value: isinstance(value, dict) and all(isinstance(value.get(k), dict) for k in ("stream", "training")),
    "edge": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
"""What the parts have to be, so that readers may rely on it."""
