"""A record is what one run measured, as a JSON file that can be read without the library."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from rwalk import _html
from rwalk.bench import metrics
from rwalk.bench.sealed import Sealed, file_name, fits, is_number

ACCURACY = "accuracy"
FORMAT = 2
"""In format 1 `scores` was called `accuracy`, as nothing else was measured."""


@dataclass(frozen=True, repr=False)
class Record(Sealed):
    """One run of one method on one stream with one seed.

    Args:
        method: what learned: "finetune", "joint" or the name of a rule.
        stream: name of the stream, for example "permuted-digits".
        seed: seed of initial weights, batch order and, for permuted and rotated streams, of the stream itself.
        scores: a[k][j], the score on task j after training task k, None where not evaluated; columns beyond the number of rows
            are of tasks that were evaluated and not yet trained.
        untrained: score of the model on each task before training, None where not evaluated.
        metric: what a score is; an "accuracy" is a fraction.
        higher: whether a higher score is better, as for accuracy; False for errors.
        tasks: names of the tasks, one for each column; empty where they have none.
        preserved: after each task, for models that come from elsewhere and may be pretrained: the figures of `rwalk.Snapshot`
            about what comes into the last linear layer, on the test inputs of all tasks, by name.
        bits: bits[k][j], for streams of characters: the mean over task j's characters, after training task k, of -log2 of the
            probability that the model gave to each.
        labels: for each task, how many different labels "occur" among its test examples, and how many "compete" for them.
        config: every setting: stream, training (with model, scenario and softmax mask), strength and fields of the rule.
        timings: seconds of training, CPU milliseconds per step, and examples that go forward and backward in a step on average.
        memory: bytes of the model's parameters and of the method's state, stored examples among it, and their number.
        diagnostics: for each task, at its end and before consolidation, a consolidator's figures and layers.
        versions: of Python, torch and the library, and the backend of its kernels.
        command: the command line that made it; empty for runs from Python, and in records of earlier versions.
        threads: CPU threads of the run.
        ranks: processes that trained the model together: 1, except in some records of earlier versions.
        device: kind of device that trained: cpu or cuda; `versions` name the GPU.
    """

    method: str
    stream: str
    seed: int
    scores: list[list[float | None]]
    untrained: list[float | None] = field(default_factory=list)
    metric: str = ACCURACY
    higher: bool = True
    tasks: list[str] = field(default_factory=list)
    preserved: list[dict[str, float]] = field(default_factory=list)
    bits: list[list[float]] = field(default_factory=list)
    labels: list[dict[str, int]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    threads: int = 1
    ranks: int = 1
    device: str = "cpu"
    format: int = FORMAT

    REFUSAL = "is no record of `rwalk run`", "Move the file away and run again."
    NAMED = re.compile(r".*-seed-?[0-9]+-[0-9a-f]{10}\.json", re.DOTALL)

    def __repr__(self) -> str:
        """Say what was run and how it ended."""
        average = "" if self.average is None else f": average {self.metric} {self._shown(self.average)}"
        return f"<record of {self.method} on {self.stream}, seed {self.seed}{average}>"

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, one for each column: their own, else their numbers from 1."""
        return self.tasks or [str(k + 1) for k in range(max(map(len, self.scores), default=0))]

    @property
    def average(self) -> float | None:
        """Mean score over all tasks after the last one: for accuracies the average accuracy."""
        return metrics.average(self.scores)

    @property
    def forgetting(self) -> float | None:
        """Mean loss on earlier tasks since their best score; positive where they became worse."""
        return metrics.forgetting(self._oriented)

    @property
    def forgotten(self) -> list[float | None]:
        """What `forgetting` averages: the loss on each earlier task."""
        return metrics.forgotten(self._oriented)

    @property
    def backward_transfer(self) -> float | None:
        """Mean change on earlier tasks since they were learned; positive where they became better."""
        return metrics.backward_transfer(self._oriented)

    @property
    def forward_transfer(self) -> float | None:
        """Mean gain on later tasks before they are learned; positive where they became better."""
        untrained = metrics.oriented([self.untrained], self.higher)[0]
        return metrics.forward_transfer(self._oriented, untrained) if self.untrained else None

    @property
    def kept(self) -> float | None:
        """Share of the best accuracies on earlier tasks that is left after the last one; None for other metrics."""
        return metrics.kept(self.scores) if self.metric == ACCURACY else None

    @property
    def learned(self) -> float | None:
        """Mean score on each task right after learning it."""
        return metrics.learned(self.scores)

    @property
    def final_bits(self) -> float | None:
        """Bits per character after the last task, mean over all tasks; None for streams of other things."""
        return metrics.mean(self.bits[-1]) if self.bits else None

    @property
    def neighbours(self) -> float | None:
        """Share of nearest neighbours among a pretrained model's features that is left after the last task."""
        return self.preserved[-1].get("neighbours") if self.preserved else None

    def intransigence(self, joint: "Record") -> float | None:
        """By how much joint training is better on the last task than this run."""
        return metrics.intransigence(self._oriented, joint._oriented)

    @property
    def _oriented(self) -> metrics.Matrix:
        return metrics.oriented(self.scores, self.higher)

    def plot(self) -> Any:
        """Draw the score on each task over the run, with the extra `bench`: notebooks show it, and `save` writes a file."""
        return import_module("rwalk.report").plot(self)  # reports see records, and not the other way round

    def _repr_html_(self) -> str:
        tasks = self.task_names
        shown = [
            [tasks[k], *("" if score is None else self._shown(score) for score in row)] for k, row in enumerate(self.scores)
        ]
        figures = {f"average {self.metric}": self.average, "forgetting": self.forgetting}
        known = ", ".join(f"{name} {self._shown(value)}" for name, value in figures.items() if value is not None)
        about = f"{self.method} on {self.stream}, seed {self.seed}" + (f": {known}" if known else "")
        return _html.table(["after ↓ on →", *tasks], shown, about)

    def _shown(self, score: float) -> str:
        return f"{100 * score:.1f} %" if self.metric == ACCURACY else f"{score:.4g}"

    @property
    def name(self) -> str:
        """File name: readable, and the same for the same method, stream, seed and configuration."""
        other = {} if self.metric == ACCURACY else {"metric": self.metric}
        return file_name(self.stream, self.method, self.seed, self.config | other)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Record":
        """Return the record that JSON content is, or raise a ValueError."""
        if "accuracy" in content and content.get("format", 1) == 1:
            content = content | {"scores": content["accuracy"], "format": FORMAT}
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        return super().from_json(content)

    def problem(self) -> str:
        """Return which part is not what readers rely on; empty if there is none."""
        return next((f"its `{key}` is not {what}" for key, (what, holds) in PARTS.items() if not holds(self)), "")


def is_matrix(rows: Any) -> bool:
    """Return whether JSON content is a matrix of scores: a row of numbers and nulls for each task learned."""
    return fits(rows, list[list[float]]) and all(len(row) == len(rows[0]) >= len(rows) for row in rows)


def _are_scores(record: Record, *rows: list[float | None]) -> bool:
    """Return whether numbers can be scores of a record: accuracies are fractions."""
    return record.metric != ACCURACY or all(value is None or 0 <= value <= 1 for row in rows for value in row)


def _differ(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _is_config(config: dict[str, Any]) -> bool:
    parts = all(isinstance(config.get(key, {}), dict) for key in ("stream", "training", "rule", "learner", "replay"))
    return parts and is_number(config.get("strength"))


def _is_diagnostic(task: dict[str, Any]) -> bool:
    """Return whether this has figures by name, and layers with a name, a share and a drift."""
    layers = task.get("layers", [])
    if not fits(layers, list[dict[str, Any]]) or not fits(task.get("figures", {}), dict[str, float]):
        return False
    return all(fits(one.get("name"), str) and is_number(one.get("share")) and is_number(one.get("drift")) for one in layers)


PARTS: dict[str, tuple[str, Callable[[Record], bool]]] = {
    "scores": (
        "a matrix of numbers and nulls (accuracies are fractions), with a column for each task",
        lambda r: is_matrix(r.scores) and _are_scores(r, *r.scores),
    ),
    "untrained": (
        "a score or null for each task",
        lambda r: _are_scores(r, r.untrained) and len(r.untrained) in (0, *map(len, r.scores)),
    ),
    "tasks": ("a name for each task, all different", lambda r: len(r.tasks) in (0, *map(len, r.scores)) and _differ(r.tasks)),
    "labels": (
        "whole numbers `occur` and `compete` for each task",
        lambda r: all(task.get(key, -1) >= 0 for task in r.labels for key in ("occur", "compete")),
    ),
    "config": ("settings by name, and `strength` a number", lambda r: _is_config(r.config)),
    "diagnostics": ("figures and layers for each task", lambda r: all(map(_is_diagnostic, r.diagnostics))),
}
"""What the parts of a record have to be, beyond their types, so that readers may rely on it."""
