"""One task's data, and streams of tasks: split, permuted and rotated versions of a data set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rwalk._errors import explain
from rwalk.bench.data import DataSet, load

Scenario = Literal["task", "domain", "class"]
"""Task-incremental: the task is known at test time. Domain-incremental: all tasks share their labels. Class-incremental: the
task is not known and its labels compete with those of all tasks so far (van de Ven and Tolias, 2019)."""

MOST = 10_000
"""Tasks that a stream may have: each one holds its permutation."""


@dataclass(frozen=True, eq=False)
class Part:
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
        """Count the examples."""
        return len(self.y if self.rows is None else self.rows)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""
        x, y = (self.x, self.y) if self.rows is None else (self.x[self.rows], self.y[self.rows])
        return self.transform(x) if self.transform else x, self.relabel(y) if self.relabel else y


@dataclass(frozen=True, eq=False)
class Experience:
    """One task of a stream.

    Args:
        train, test: the task's data.
        task: position in the stream, from 0.
        classes: the labels that occur in this task.
        outputs: how many labels the whole stream has.
        scenario: what is known at test time: "task", "domain" or "class".
        stream: what the experience was made from, for records; `name` is the stream's name.
    """

    train: Part
    test: Part
    task: int
    classes: tuple[int, ...]
    outputs: int
    scenario: Scenario = "task"
    stream: dict[str, Any] = field(default_factory=lambda: {"name": "custom"})


def split(
    data: str | DataSet = "digits", tasks: int = 5, scenario: Scenario = "task", root: str | Path | None = None
) -> list[Experience]:
    """Divide the classes of a data set among tasks, in the order of the labels (split MNIST and the like).

    Args:
        data: a data set, or a name or folder for `rwalk.bench.data.load`.
        tasks: number of tasks; classes are spread as evenly as they can be.
        scenario: with "domain", every task's labels are counted from 0, so that all tasks share them.
        root: where folders of data sets lie.

    Raises:
        ValueError: if there are more tasks than classes, or "domain" tasks have different numbers of classes.
    """
    found = _found(data, root)
    count = len(found.classes)
    if not 1 <= tasks <= count:
        raise ValueError(
            explain(f"{tasks} tasks for {count} classes of `{found.name}`", f"1 to {count} tasks", "Pass fewer tasks.")
        )
    _refuse_scenario(scenario, get_args(Scenario))
    groups = [tuple(g.tolist()) for g in torch.arange(count).tensor_split(tasks)]
    if scenario == "domain" and len({len(g) for g in groups}) > 1:
        raise ValueError(
            explain(
                f"{count} classes in {tasks} domain-incremental tasks",
                "the same number of classes in each task",
                "Pass a number of tasks that divides the number of classes.",
            )
        )
    about = _about("split", found, tasks, scenario)
    return [_group(found, task, group, scenario, about) for task, group in enumerate(groups)]


def permuted(
    data: str | DataSet = "digits", tasks: int = 10, seed: int = 0, root: str | Path | None = None
) -> list[Experience]:
    """Shuffle the inputs' elements anew for each task (permuted MNIST); the first task is permuted too.

    Args:
        data: a data set, or a name or folder for `rwalk.bench.data.load`.
        tasks: number of tasks, domain-incremental.
        seed: seed of the permutations.
        root: where folders of data sets lie.
    """
    found = _found(data, root)
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(found.train_x.shape[1:])
    orders = [torch.randperm(size, generator=generator) for _ in range(_positive(tasks))]

    def transform(order: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.flatten(1)[:, order].view_as(x)

    about = _about("permuted", found, tasks, "domain", seed=seed)
    return [_domain(found, task, transform(order), about) for task, order in enumerate(orders)]


def rotated(
    data: str | DataSet = "digits", tasks: int = 5, degrees: float = 180.0, root: str | Path | None = None
) -> list[Experience]:
    """Rotate images by an angle that grows from task to task (rotated MNIST).

    Args:
        data: a data set of images, or a name or folder for `rwalk.bench.data.load`.
        tasks: number of tasks, domain-incremental; task k is rotated by k * degrees / tasks.
        degrees: the angle that the tasks divide evenly.
        root: where folders of data sets lie.

    Raises:
        ValueError: if the inputs are no images.
    """
    found = _found(data, root)
    if found.train_x.dim() != 4:
        raise ValueError(
            explain(
                f"inputs of shape {tuple(found.train_x.shape[1:])}",
                "images of shape (channels, height, width)",
                "Choose a split or permuted stream for this data set.",
            )
        )
    angles = [task * degrees / tasks for task in range(_positive(tasks))]
    about = _about("rotated", found, tasks, "domain", degrees=degrees)
    return [_domain(found, task, lambda x, a=angle: rotate(x, a), about) for task, angle in enumerate(angles)]  # type: ignore[misc]


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotate images counter-clockwise about their centre with bilinear interpolation; what comes from outside is 0."""
    angle = math.radians(degrees)
    height, width = x.shape[-2:]
    matrix = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle) * height / width, 0.0],
            [math.sin(angle) * width / height, math.cos(angle), 0.0],
        ]
    )
    grid = F.affine_grid(matrix[None].to(x.dtype), [1, 1, height, width], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


STREAMS: dict[str, Callable[..., list[Experience]]] = {"split": split, "permuted": permuted, "rotated": rotated}


def parse(name: str) -> tuple[str, str]:
    """Divide a stream's name, such as "split-mnist" or "permuted-./folder", into kind and data set."""
    kind = next((k for k in STREAMS if name.startswith((f"{k}-", f"{k}:"))), None)
    if kind is None or len(name) == len(kind) + 1:
        raise ValueError(
            explain(
                f"stream `{name}`",
                f"one of {', '.join(STREAMS)}, a hyphen, and a data set or folder",
                "For example: split-digits, permuted-mnist, rotated-./folder.",
            )
        )
    return kind, name[len(kind) + 1 :]


def make(kind: str, data: str | DataSet, seed: int = 0, scenario: Scenario | None = None, **options: Any) -> list[Experience]:
    """Make a stream of a kind; `seed` matters to permuted streams and `scenario` to split ones, None stands for a default."""
    options = {key: value for key, value in options.items() if value is not None}
    if kind == "permuted":
        options["seed"] = seed
    if kind == "split" and scenario is not None:
        options["scenario"] = scenario
    elif scenario is not None:
        _refuse_scenario(scenario, ("domain",))
    return STREAMS[kind](data, **options)


def check(stream: Sequence[Experience]) -> None:
    """Raise a ValueError unless `stream` has experiences, all of one scenario and number of outputs."""
    if not stream or len({(e.scenario, e.outputs) for e in stream}) > 1:
        came = "an empty stream" if not stream else "experiences of different scenarios or numbers of outputs"
        raise ValueError(explain(came, "experiences of one scenario and number of outputs", "Build the stream anew."))


def _found(data: str | DataSet, root: str | Path | None) -> DataSet:
    return data if isinstance(data, DataSet) else load(data, root)


def _positive(tasks: int) -> int:
    if not 1 <= tasks <= MOST:
        raise ValueError(explain(f"{tasks} tasks", f"1 to {MOST} tasks", "Pass such a number of tasks."))
    return tasks


def _refuse_scenario(scenario: str, allowed: tuple[str, ...]) -> None:
    if scenario not in allowed:
        raise ValueError(
            explain(f"scenario `{scenario}`", f"one of {', '.join(allowed)}", "Pass such a `scenario` for this stream.")
        )


def _about(kind: str, data: DataSet, tasks: int, scenario: Scenario, **more: Any) -> dict[str, Any]:
    rows = [len(data.train_y), len(data.test_y)]
    about = {"name": f"{kind}-{data.name}", "tasks": tasks, "scenario": scenario, "rows": rows, "data": data.digest()}
    return about | more


def _group(data: DataSet, task: int, group: tuple[int, ...], scenario: Scenario, about: dict[str, Any]) -> Experience:
    shift = group[0] if scenario == "domain" else 0
    rows = [(torch.isin(y, torch.tensor(group))).nonzero().squeeze(1) for y in (data.train_y, data.test_y)]
    if not all(map(len, rows)):
        names = ", ".join(data.classes[label] for label in group)
        raise ValueError(
            explain(f"no train or test example of the classes {names}", "examples of every task", "Pass fewer tasks.")
        )
    relabel = (lambda y: y - shift) if shift else None
    train, test = (
        Part(data.train_x, data.train_y, rows[0], relabel=relabel),
        Part(data.test_x, data.test_y, rows[1], relabel=relabel),
    )
    outputs = len(group) if scenario == "domain" else len(data.classes)
    return Experience(train, test, task, tuple(label - shift for label in group), outputs, scenario, about)


def _domain(data: DataSet, task: int, transform: Callable[[Tensor], Tensor], about: dict[str, Any]) -> Experience:
    train, test = (Part(x, y, transform=transform) for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)))
    return Experience(train, test, task, tuple(range(len(data.classes))), len(data.classes), "domain", about)
