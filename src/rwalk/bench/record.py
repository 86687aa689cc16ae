"""A record is what one run measured, as a JSON file that can be read without the library."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwalk._errors import printable
from rwalk._io import files
from rwalk.bench import metrics

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One run of one method on one stream with one seed.

    Args:
        method: what learned: "finetune", "joint" or the name of a rule.
        stream: name of the stream, for example "permuted-digits".
        seed: seed of initial weights, batch order and, for permuted and rotated streams, of the stream itself.
        accuracy: a[k][j], accuracy on task j after training task k, fractions, None where not evaluated.
        untrained: accuracy of the model on each task before training, None where not evaluated.
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
    accuracy: list[list[float | None]]
    untrained: list[float | None] = field(default_factory=list)
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

    @property
    def average_accuracy(self) -> float | None:
        """Mean accuracy over all tasks after the last one."""
        return metrics.average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float | None:
        """Mean loss of accuracy on earlier tasks since their best."""
        return metrics.forgetting(self.accuracy)

    @property
    def backward_transfer(self) -> float | None:
        """Mean change of accuracy on earlier tasks since they were learned."""
        return metrics.backward_transfer(self.accuracy)

    @property
    def forward_transfer(self) -> float | None:
        """Mean gain of accuracy on later tasks before they are learned."""
        return metrics.forward_transfer(self.accuracy, self.untrained) if self.untrained else None

    @property
    def kept(self) -> float | None:
        """Share of the best accuracies on earlier tasks that is left after the last one."""
        return metrics.kept(self.accuracy)

    @property
    def learned(self) -> float | None:
        """Mean accuracy on each task right after learning it."""
        return metrics.learned(self.accuracy)

    @property
    def final_bits(self) -> float | None:
        """Bits per character after the last task, mean over all tasks; None for streams of other things."""
        return metrics.mean(self.bits[-1]) if self.bits else None

    def intransigence(self, joint: "Record") -> float | None:
        """Accuracy on the last task that joint training reaches and this run does not."""
        return metrics.intransigence(self.accuracy, joint.accuracy)

    @property
    def name(self) -> str:
        """File name: readable, and the same for the same method, stream, seed and configuration."""
        return file_name(self.stream, self.method, self.seed, self.config)

    def save(self, folder: str | Path) -> Path:
        """Write the record into a folder, whole or not at all, and return the file's path."""
        path = Path(folder) / self.name
        files.folder(path.parent)
        files.seal(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path, *, exact: bool = False) -> "Record":
        """Read a record.

        Args:
            path: the file. If its name is one of those that `save` gives, it has to name this record's stream, method and seed.
            exact: whether it has to name the configuration, too.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a record of this format, or is named like another one.
        """
        try:
            content = files.unseal(path)
        except ValueError as error:
            raise ValueError(_unreadable(path, str(error))) from None
        if wrong := problem(content):
            raise ValueError(_unreadable(path, wrong))
        record = cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
        name, right = Path(path).name, record.name
        if NAMED.fullmatch(name) and name != right and (exact or name.rpartition("-")[0] != right.rpartition("-")[0]):
            raise ValueError(_unreadable(path, f"it is named like another run; its content is that of `{right}`"))
        return record


NAMED = re.compile(r".*-seed-?[0-9]+-[0-9a-f]{10}\.json", re.DOTALL)
"""Names that `file_name` gives."""


def file_name(stream: str, method: str, seed: int, config: dict[str, Any]) -> str:
    """Name the file of a run; equal configurations give equal names, and no name leaves its folder or is too long for it."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{stream}-{method}")[:150]
    return f"{words}-seed{int(seed)}-{files.digest(files.as_json([stream, method, seed, config]))[:10]}.json"


def _unreadable(path: str | Path, problem: str) -> str:
    return printable(f"`{path}` is no record of `rwalk run`: {problem}. Move the file away and run again.")


def problem(content: dict[str, Any]) -> str:
    """Return why a JSON object is no record; empty if it is one."""
    missing = {"method", "stream", "seed", "accuracy"} - content.keys()
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    if content.get("format", FORMAT) != FORMAT:
        return f"its format is {content['format']}, not {FORMAT}"
    wrong = [key for key, kind in KINDS.items() if key in content and type(content[key]) is not kind]
    if wrong:
        return f"its `{wrong[0]}` is not of type {KINDS[wrong[0]].__name__}"
    return next((f"its `{key}` is not {what}" for key, (what, holds) in PARTS.items() if not holds(content)), "")


KINDS = {"method": str, "stream": str, "seed": int, "accuracy": list, "untrained": list, "bits": list, "labels": list,
         "config": dict, "timings": dict, "memory": dict, "diagnostics": list, "versions": dict, "threads": int, "ranks": int,
         "device": str, "command": str}  # fmt: skip
"""The type of each part of a record."""


def is_number(value: Any) -> bool:
    """Return whether JSON content is a number, or null, as NaN and infinities are written."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) < 1e300)


def _fraction(value: Any) -> bool:
    return is_number(value) and (value is None or 0 <= value <= 1)


def is_matrix(rows: Any) -> bool:
    """Return whether JSON content is an accuracy matrix: a row of fractions and nulls for each task learned."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    return all(len(row) == len(rows[0]) >= len(rows) and all(map(_fraction, row)) for row in rows)


def _are_counts(task: Any) -> bool:
    return isinstance(task, dict) and all(type(task.get(key)) is int and task[key] >= 0 for key in ("occur", "compete"))


def _is_config(config: dict[str, Any]) -> bool:
    parts = all(isinstance(config.get(key, {}), dict) for key in ("stream", "training", "rule", "replay"))
    return parts and is_number(config.get("strength"))


def _diagnostic(task: Any) -> bool:
    """Whether this has figures by name, and layers with a name, a share and a drift."""
    if not isinstance(task, dict):
        return False
    figures, layers = task.get("figures", {}), task.get("layers", [])
    named = isinstance(layers, list) and all(isinstance(layer, dict) and isinstance(layer.get("name"), str) for layer in layers)
    measured = named and all(is_number(layer.get(key)) for layer in layers for key in ("share", "drift"))
    return measured and isinstance(figures, dict) and all(map(is_number, figures.values()))


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "accuracy": ("a matrix of fractions and nulls, with a column for each task", lambda c: is_matrix(c["accuracy"])),
    "untrained": (
        "a fraction or null for each task",
        lambda c: all(map(_fraction, c.get("untrained", []))) and len(c.get("untrained", [])) in (0, *map(len, c["accuracy"])),
    ),
    "bits": (
        "a matrix of numbers",
        lambda c: all(isinstance(row, list) and all(map(is_number, row)) for row in c.get("bits", [])),
    ),
    "labels": ("whole numbers `occur` and `compete` for each task", lambda c: all(map(_are_counts, c.get("labels", [])))),
    "config": ("settings by name, and `strength` a number", lambda c: _is_config(c.get("config", {}))),
    "timings": ("numbers by name", lambda c: all(map(is_number, c.get("timings", {}).values()))),
    "memory": ("numbers by name", lambda c: all(map(is_number, c.get("memory", {}).values()))),
    "versions": ("text by name", lambda c: all(isinstance(value, str) for value in c.get("versions", {}).values())),
    "diagnostics": ("figures and layers for each task", lambda c: all(map(_diagnostic, c.get("diagnostics", [])))),
}
"""What the parts of a record have to be, beyond their types, so that readers may rely on it."""
