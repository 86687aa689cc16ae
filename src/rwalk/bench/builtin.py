"""Streams made of a data set: by classes, by domains, by time, or in permuted and rotated versions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rwalk._errors import printable, suggestion
from rwalk.bench.data import load
from rwalk.bench.dataset import DataSet, scaled
from rwalk.bench.streams import Experience, Scenario, Subset, with_scaled_targets

MOST = 10_000
"""Tasks that a stream may have: each one holds its permutation."""


def split(
    data: str | DataSet = "digits",
    tasks: int = 5,
    scenario: Scenario = "task",
    root: str | Path | None = None,
    *,
    order: int | Sequence[int] | None = None,
) -> list[Experience]:
    """Divide the classes of a data set among tasks, in the order of the labels or another (split MNIST and the like).

    Args:
        data: a data set, or a name or folder for `rwalk.bench.data.load`.
        tasks: number of tasks; classes are spread as evenly as they can be.
        scenario: with "domain", every task's labels are counted from 0, so that all tasks share them.
        root: where folders of data sets lie.
        order: the classes in the order in which they come, by their numbers from 0 on; or a seed, which draws one.

    Raises:
        ValueError: if there are more tasks than classes, "domain" tasks have different numbers of classes, or an order does not
            name each class once.
    """
    found = _found(data, root)
    _labelled(found)
    count = len(found.classes)
    if not 1 <= tasks <= count:
        raise ValueError(
            printable(f"{tasks} tasks cannot share the {count} classes of `{found.name}`; pass 1 to {count} tasks.")
        )
    refuse_scenario(scenario, get_args(Scenario))
    classes = _ordered(count, order)
    groups = [tuple(g.tolist()) for g in torch.tensor(classes).tensor_split(tasks)]
    if scenario == "domain" and len({len(g) for g in groups}) > 1:
        raise ValueError(f"Domain-incremental tasks need equally many classes; {tasks} tasks do not divide {count} classes.")
    about = _about("split", found, tasks, scenario, **({} if order is None else {"order": classes}))
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
    if found.tokens:
        raise ValueError(printable(f"The texts of `{found.name}` cannot be permuted; choose a split or domain stream."))
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(found.train_x.shape[1:])
    orders = [torch.randperm(size, generator=generator, device="cpu") for _ in range(_positive(tasks))]

    def transform(order: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.flatten(1)[:, order].view_as(x)

    about = _about("permuted", found, tasks, "domain", seed=seed)
    return with_scaled_targets([_domain(found, task, transform(order), about) for task, order in enumerate(orders)])


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
        shape = tuple(found.train_x.shape[1:])
        raise ValueError(f"Inputs of shape {shape} are no images (channels, height, width); choose a split or permuted stream.")
    angles = [task * degrees / tasks for task in range(_positive(tasks))]
    about = _about("rotated", found, tasks, "domain", degrees=degrees)
    turned = [lambda x, a=angle: rotate(x, a) for angle in angles]
    return with_scaled_targets([_domain(found, task, turn, about) for task, turn in enumerate(turned)])


def domain(
    data: str | DataSet,
    tasks: int | None = None,
    scenario: Scenario = "domain",
    by: str = "domain",
    root: str | Path | None = None,
) -> list[Experience]:
    """Make a task of each domain of a data set: of each value of a column, or of each folder, in their sorted order.

    Args:
        data: a data set with domains, or a name or folder for `rwalk.bench.data.load`.
        tasks: how many domains, from the first on; all when None.
        scenario: with "domain", all labels compete in every task; else a task's labels are those that occur in it.
        by: the column, or "folder", if each domain is a folder in the data set's; for a name or folder.
        root: where folders of data sets lie.

    Raises:
        ValueError: if there are fewer domains, or a task has no train or no test example.
    """
    found = _found(data, root, by)
    if found.train_domain is None or found.test_domain is None:
        raise ValueError(printable(f"`{found.name}` has no domains; load it `by` the column that holds them."))
    refuse_scenario(scenario, get_args(Scenario))
    if scenario != "domain":
        _labelled(found)
    most = len(found.domains)
    if not 1 <= (most if tasks is None else tasks) <= most:
        raise ValueError(
            printable(f"`{found.name}` has {most} domains, one for each task; pass 1 to {most} tasks, not {tasks}.")
        )
    names = found.domains[:tasks]
    about = _about("domain", found, len(names), scenario, by=by, domains=list(names))
    where = found.train_domain, found.test_domain
    rows = [[(at == d).nonzero().squeeze(1) for at in where] for d in range(len(names))]
    made = [_task(found, d, mine, scenario, about, f"the domain {names[d]}") for d, mine in enumerate(rows)]
    return with_scaled_targets(made)


def drift(data: str | DataSet, tasks: int = 10, root: str | Path | None = None) -> list[Experience]:
    """Cut the rows of a data set, in their order, into stretches of the same length, so that tasks change as the data drift.

    Tables get mean 0 and standard deviation 1 over the training rows of the first stretch, since later rows are not known yet.

    Args:
        data: a data set whose rows are in order, or a name or folder for `rwalk.bench.data.load`.
        tasks: number of stretches, domain-incremental.
        root: where folders of data sets lie.

    Raises:
        ValueError: if there are fewer rows than tasks.
    """
    found = _found(data, root)
    rows = [torch.arange(len(y)).tensor_split(_positive(tasks)) for y in (found.train_y, found.test_y)]
    about = _about("drift", found, tasks, "domain")
    table = found.train_x.dim() != 4 and not found.tokens
    first = scaled(found.train_x[rows[0][0]]) if table else None
    stretches = enumerate(zip(*rows, strict=True))
    made = [_task(found, k, mine, "domain", about, f"stretch {k + 1}", transform=first) for k, mine in stretches]
    return with_scaled_targets(made)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotate images counter-clockwise about their centre with bilinear interpolation; pixels from outside are 0."""
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


STREAMS: dict[str, Callable[..., list[Experience]]] = {
    "split": split, "permuted": permuted, "rotated": rotated, "domain": domain, "drift": drift,
}  # fmt: skip


def parse(name: str) -> tuple[str, str]:
    """Return kind and data set of a stream's name, such as "split-mnist" or "permuted-./folder"."""
    kind = next((k for k in STREAMS if name.startswith((f"{k}-", f"{k}:"))), None)
    if kind is None or len(name) == len(kind) + 1:
        form = f"one of {', '.join(STREAMS)}, a hyphen, and a data set or folder, such as split-digits or rotated-./folder"
        data = name[len(kind) if kind else name.find("-") + 1 :].lstrip("-:")
        whole = [f"{k}-{data}" for k in STREAMS] if data else []
        raise ValueError(printable(f"There is no stream `{name}`.{suggestion(name, whole)} A stream is {form}."))
    return kind, name[len(kind) + 1 :]


def make(kind: str, data: str | DataSet, seed: int = 0, scenario: Scenario | None = None, **options: Any) -> list[Experience]:
    """Make a stream of a kind, with `seed` and `scenario` where its function has them; None is the default."""
    options = {key: value for key, value in options.items() if value is not None}
    if takes(kind, "seed"):
        options["seed"] = seed
    if takes(kind, "scenario") and scenario is not None:
        options["scenario"] = scenario
    elif scenario is not None:
        refuse_scenario(scenario, ("domain",))
    return STREAMS[kind](data, **options)


def takes(kind: str, option: str) -> bool:
    """Return whether the function of a kind of stream has an argument of a name."""
    return option in signature(STREAMS[kind]).parameters


def _found(data: str | DataSet, root: str | Path | None, by: str | None = None) -> DataSet:
    if not isinstance(data, str | Path | DataSet):
        came = f"The data set is a `{type(data).__name__}`, and has to be a name, a folder or a `DataSet`"
        raise TypeError(f"{came}. `rwalk.bench.stream` makes a stream of arrays.")
    return data if isinstance(data, DataSet) else load(str(data), root, by=by)


def _positive(tasks: int) -> int:
    if not 1 <= tasks <= MOST:
        raise ValueError(f"A stream has 1 to {MOST:,} tasks, not {tasks}.")
    return tasks


def refuse_scenario(scenario: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError for a scenario that a stream does not have."""
    if scenario not in allowed:
        raise ValueError(printable(f"This stream has no scenario `{scenario}`; choose one of {', '.join(allowed)}."))


def _about(kind: str, data: DataSet, tasks: int, scenario: Scenario, **more: Any) -> dict[str, Any]:
    rows = [len(data.train_y), len(data.test_y)]
    about = {"name": f"{kind}-{data.name}", "tasks": tasks, "scenario": scenario, "rows": rows, "data": data.digest()}
    return about | ({"target": data.target} if data.target else {}) | more


def _labelled(data: DataSet) -> None:
    if data.target:
        came = f"`{data.name}` has a target, the numbers in `{data.target}`, and no classes"
        raise ValueError(printable(f"{came}; choose a domain, drift, permuted or rotated stream and its scenario `domain`."))
    if data.train_y.dim() > 1:
        came = f"`{data.name}` is a text to be continued, without a label for each example"
        raise ValueError(printable(f"{came}; choose a domain stream and its scenario `domain`."))


def _ordered(count: int, order: int | Sequence[int] | None) -> list[int]:
    """Return the classes in an order that is given, or drawn by a seed."""
    if isinstance(order, int):
        drawn: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(order), device="cpu").tolist()
        return drawn
    classes = list(range(count) if order is None else map(int, order))
    if sorted(classes) != list(range(count)):
        raise ValueError(f"The order {classes} does not have each number from 0 to {count - 1} once, one for each class.")
    return classes


def _group(data: DataSet, task: int, group: tuple[int, ...], scenario: Scenario, about: dict[str, Any]) -> Experience:
    """Make a task of some classes."""
    rows = [(torch.isin(y, torch.tensor(group))).nonzero().squeeze(1) for y in (data.train_y, data.test_y)]
    what = f"the classes {', '.join(data.classes[label] for label in group)}"
    if scenario != "domain":
        return replace(_task(data, task, rows, scenario, about, what), classes=tuple(sorted(group)))
    place = torch.zeros(len(data.classes), dtype=torch.long).scatter_(0, torch.tensor(group), torch.arange(len(group)))
    made = _task(data, task, rows, scenario, about, what, relabel=lambda y: place[y])
    return replace(made, classes=tuple(range(len(group))), outputs=len(group))


def _domain(data: DataSet, task: int, transform: Callable[[Tensor], Tensor], about: dict[str, Any]) -> Experience:
    """Make a task of all examples, changed."""
    return _task(data, task, None, "domain", about, transform=transform)


def _task(
    data: DataSet,
    task: int,
    rows: Sequence[Tensor] | None,
    scenario: Scenario,
    about: dict[str, Any],
    what: str = "",
    **seen: Any,
) -> Experience:
    """Make a task of some rows of train and test, or all; `what` names them, `seen` holds transform and relabel."""
    if rows and not all(map(len, rows)):
        raise ValueError(printable(f"There is no train or test example of {what}. Pass fewer tasks."))
    train_rows, test_rows = rows or (None, None)
    train, test = Subset(data.train_x, data.train_y, train_rows, **seen), Subset(data.test_x, data.test_y, test_rows, **seen)
    outputs = len(data.classes) or data.train_y.shape[1]
    labels = range(len(data.classes)) if scenario == "domain" else _occurring(data, train_rows, test_rows)
    return Experience(train, test, task, tuple(labels), outputs, scenario, about, data.tokens)


def _occurring(data: DataSet, train: Tensor | None, test: Tensor | None) -> list[int]:
    labels: list[int] = torch.cat([data.train_y[train], data.test_y[test]]).unique().tolist()
    return labels
