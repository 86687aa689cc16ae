"""What tuning has chosen, as a JSON file that can be read without torch."""

import re
from dataclasses import dataclass, field
from typing import Any

from rwalk.bench.sealed import Sealed, file_name, fits, is_number

SUFFIX = ".tuned"


@dataclass(frozen=True)
class Tuned(Sealed):
    """What tuning has chosen, and all trials.

    Args:
        method: name of the method.
        stream: name of the stream.
        strength, lr: the values whose accuracy on held-out examples is highest.
        accuracy: that accuracy, averaged over tasks and seeds, a fraction; of regression streams R².
        tasks: how many of the stream's tasks were tried on; `later(stream, tasks)` are the others.
        trials: for each pair of values its accuracy (None if a run failed), the accuracies by seed, and causes of failures.
        config: every setting of the trials except the two values.
        metric: what the accuracies are.
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
    metric: str = "accuracy"

    REFUSAL = "holds no tuned strength", "Tune again."
    NAMED = re.compile(rf".*-[0-9a-f]{{10}}\{SUFFIX}", re.DOTALL)

    @property
    def name(self) -> str:
        """File name: the same for the same method, stream and settings."""
        return tuned_name(self.stream, self.method, self.config)

    def problem(self) -> str:
        """Return which part is not what readers rely on; empty if there is none."""
        known = {"strength": _is_known(self.strength), "lr": _is_known(self.lr), "accuracy": self.accuracy is not None}
        known["trials"] = all(map(_is_trial, self.trials))
        known["config"] = all(isinstance(self.config.get(key), dict) for key in ("stream", "training"))
        return next((f"its `{key}` is of another kind" for key, right in known.items() if not right), "")


def tuned_name(stream: str, method: str, config: dict[str, Any]) -> str:
    """Name the file for settings, whatever the seed and the number of tasks; values that were tuned are no part of them."""
    about = {k: v for k, v in config["stream"].items() if k not in ("name", "seed", "tasks", "skipped", "validation")}
    training = {k: v for k, v in config["training"].items() if k != "lr"}
    fixed = {k: v for k, v in config.items() if k != "strength"} | {"stream": about, "training": training}
    return file_name(stream, method, 0, fixed).replace("-seed0-", "-").removesuffix(".json") + SUFFIX


def _is_known(value: Any) -> bool:
    return value is not None and is_number(value) and value >= 0


def _is_trial(trial: dict[str, Any]) -> bool:
    known = all(_is_known(trial.get(key)) for key in ("strength", "lr"))
    return known and "accuracy" in trial and is_number(trial["accuracy"]) and fits(trial.get("seeds"), dict[str, float])
