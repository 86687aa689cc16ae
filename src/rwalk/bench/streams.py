"""One task's data, and what holds for streams of tasks, which are lists of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from rwalk.bench.dataset import scaled
from rwalk.bench.record import ACCURACY

Scenario = Literal["task", "domain", "class"]
"""Task-incremental: the task is known at test time. Domain-incremental: all tasks share their labels. Class-incremental: the
task is not known and its labels compete with those of all tasks so far (van de Ven and Tolias, 2019)."""

Kind = Literal["table", "image", "text", "characters"]
R_SQUARED = "R²"


@dataclass(frozen=True, eq=False)
class Subset:
    """A part of a data set seen through a transform, made when it is read, so that tasks share their memory.

    Args:
        x, y: inputs and labels, first dimension examples.
        rows: the examples that belong to the part; all when None.
        transform: applied to a batch of inputs.
        relabel: applied to a batch of labels.
    """

    x: Tensor
    y: Tensor
    rows: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    relabel: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.y if self.rows is None else self.rows)

    def labels(self) -> Tensor:
        """Return the labels."""
        y = self.y if self.rows is None else self.y[self.rows]
        return self.relabel(y) if self.relabel else y

    def read(self) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""
        x = self.x if self.rows is None else self.x[self.rows]
        return self.transform(x) if self.transform else x, self.labels()

    def take(self, places: Tensor) -> Self:
        """Return some of the examples, by their places among these."""
        return replace(self, rows=places if self.rows is None else self.rows[places])


@dataclass(frozen=True, eq=False)
class Joined:
    """Parts one behind the other, each seen through its own transform."""

    parts: tuple["Part", ...]

    x = property(lambda self: self.parts[0].x, doc="Inputs of the first part's data set.")
    y = property(lambda self: self.parts[0].y, doc="Labels of the first part's data set.")

    def __len__(self) -> int:
        """Return the number of examples."""
        return sum(map(len, self.parts))

    def labels(self) -> Tensor:
        """Return the labels."""
        return torch.cat([part.labels() for part in self.parts])

    def read(self) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""
        x, y = (torch.cat(column) for column in zip(*(part.read() for part in self.parts), strict=True))
        return x, y

    def take(self, places: Tensor) -> Self:
        """Return some of the examples, by their places among these; they stay in the order of the parts."""
        found, first = list[Part](), 0
        for part in self.parts:
            found.append(part.take(places[(places >= first) & (places < first + len(part))] - first))
            first += len(part)
        return replace(self, parts=tuple(found))


Part = Subset | Joined


@dataclass(frozen=True)
class Score:
    """A metric of one's own: its name, the function or its import path, and whether a higher score is better."""

    name: str
    source: str | Callable[..., Any]
    higher: bool


@dataclass(frozen=True, eq=False, repr=False)
class Experience:
    """One task of a stream.

    Args:
        train, test: the task's data.
        task: position in the stream, from 0.
        classes: the labels that occur in this task; none for a regression.
        outputs: how many labels the whole stream has, or targets each example.
        scenario: what is known at test time: "task", "domain" or "class".
        stream: what the experience was made from, for records; `name` is the stream's name.
        tokens: for inputs that number words or characters, how many numbers there are; 0 for other inputs.
        score: a metric in place of accuracy or R².
    """

    train: Part
    test: Part
    task: int
    classes: tuple[int, ...]
    outputs: int
    scenario: Scenario = "task"
    stream: dict[str, Any] = field(default_factory=lambda: {"name": "custom"})
    tokens: int = 0
    score: Score | None = None

    def __repr__(self) -> str:
        """Say how large the task is, without its data."""
        some = [*map(str, self.classes[:12]), *["..."] * (len(self.classes) > 12)]
        labels = f", labels {', '.join(some)}" if some else ""
        sizes = f"{len(self.train)} training and {len(self.test)} test examples"
        return f"<task {self.task + 1} of {self.stream['name']}: {sizes} of shape {self.shape}{labels}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to be met, floating-point of shape (examples, targets), and not classes."""
        return bool(self.train.y.is_floating_point())

    @property
    def labelled(self) -> bool:
        """Whether each example has one label, a class."""
        return self.train.y.dim() == 1

    @property
    def metric(self) -> str:
        """What a score on the task is: accuracy, R² for a regression, or one's own metric."""
        return self.score.name if self.score else R_SQUARED if self.regression else ACCURACY

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return self.score is None or self.score.higher

    @property
    def kind(self) -> Kind:
        """What one input is: with "characters", each one has a label."""
        if self.tokens:
            return "characters" if self.train.y.dim() == 2 and not self.regression else "text"
        return "image" if len(self.shape) == 3 else "table"


def with_scaled_targets(stream: Sequence[Experience]) -> list[Experience]:
    """Give the targets of a regression mean 0 and standard deviation 1 over the training examples of the first task.

    A strength, a learning rate and a loss then mean the same in any unit of the targets, and R² stays as it is. Streams of
    labels are returned unchanged.
    """
    if not stream[0].regression:
        return list(stream)
    scale = scaled(stream[0].train.labels())
    return [replace(e, **{key: replace(getattr(e, key), relabel=scale) for key in ("train", "test")}) for e in stream]


def check(stream: Sequence[Experience]) -> None:
    """Raise a ValueError or TypeError unless `stream` has experiences, all of one scenario and number of outputs."""
    if other := [e for e in stream if not isinstance(e, Experience)]:
        came = f"A stream is a list of tasks, and in this one is an object of type {type(other[0]).__name__}"
        raise TypeError(f"{came}. Make tasks of your own data by `bench.stream([(x, y), ...])`.")
    if not stream or len({(e.scenario, e.outputs, not e.classes) for e in stream}) > 1:
        raise ValueError("A stream needs at least one experience, and all of one scenario and number of outputs.")
    if stream[0].regression and stream[0].scenario != "domain":
        raise ValueError(f"A regression has no labels, and no scenario `{stream[0].scenario}`; choose domain.")
    if stream[0].regression and stream[0].train.y.dim() != 2:
        raise ValueError(f"Targets of shape {tuple(stream[0].train.y.shape)} came; pass a row of them for each example.")
    short = [e.task + 1 for e in stream if not e.classes and len(e.test) < 2]
    if short:
        raise ValueError(f"Task {short[0]} has a single test example, but R² needs two or more; take fewer tasks.")


def task_names(stream: Sequence[Experience]) -> list[str]:
    """Return the names of a stream's tasks, where they have names."""
    about = stream[0].stream
    first = about.get("skipped", 0)
    return [*about.get("names", about.get("domains", []))][first : first + len(stream)]


def label_counts(stream: Sequence[Experience]) -> list[dict[str, int]]:
    """Count for each task the labels that "occur" among its test examples, and those that "compete" for them at the end.

    A regression has neither.
    """
    seen = {label for e in stream for label in e.classes}
    return [
        {"occur": len(e.test.labels().unique()), "compete": len(seen if e.scenario == "class" else set(e.classes))}
        for e in stream
        if not e.regression
    ]
