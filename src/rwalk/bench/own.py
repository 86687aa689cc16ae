"""A stream of one's own data, task by task."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwalk._errors import printable
from rwalk.bench.builtin import STREAMS, refuse_scenario
from rwalk.bench.dataset import fingerprint
from rwalk.bench.examples import Examples, read
from rwalk.bench.holdout import divided
from rwalk.bench.streams import Experience, Part, Scenario, Subset, check, with_scaled_targets


def stream(
    tasks: Sequence[Any],
    scenario: Scenario = "domain",
    *,
    test: float | None = None,
    names: Sequence[str] | None = None,
    name: str = "custom",
    tokens: int = 0,
) -> list[Experience]:
    """Make a stream of one's own data.

    Training and test data are each a pair of arrays, tensors, lists or tables, `(x, y)`; a data set with a length, whose items
    are such pairs; or a `DataLoader`: all its examples are read in the order of its data set, whether it shuffles or not.
    They are read once, with their transforms: what these draw with PyTorch's random numbers is the same each time. Inputs
    become float32 and are not standardised; bytes (uint8), as images have them, are divided by 255.

    Whole numbers and names are labels, numbered from 0 on in their sorted order over the training examples of all tasks.
    Floating-point numbers are targets of a regression, one for each example or a row of them. They get mean 0 and standard
    deviation 1 over the training examples of the first task.

    Args:
        tasks: for each task a pair `(train, test)` or a mapping with these keys; with a share `test` its training data alone.
        scenario: with "domain" all labels compete in every task; else a task's labels are those that occur in it.
        test: which share of each task's examples to hold out for testing, at random, the same ones each time.
        names: of the tasks, for records.
        name: of the stream.
        tokens: for inputs that number words or characters, how many numbers there are, 0 being what comes after a text's end.

    Raises:
        ValueError: if examples are missing or have values that are missing or infinite, tasks differ in form, or a test label
            occurs in no training example.
    """
    refuse_scenario(scenario, get_args(Scenario))
    _check_names(name, names, tasks)
    pairs = [_pair(task, f"task {k + 1}", test, tokens) for k, task in enumerate(tasks)]
    sides = [side for pair in pairs for side in pair]
    _refuse_forms(sides)
    labels, known = _numbered(sides)
    parts = [Subset(side.x, y) for side, y in zip(sides, labels, strict=True)]
    both = list(zip(parts[::2], parts[1::2], strict=True)) if test is None else [divided(part, test) for part in parts]
    rows = [sum(map(len, column)) for column in zip(*both, strict=True)]
    about: dict[str, Any] = {"name": name, "tasks": len(both), "scenario": scenario, "rows": rows, "data": _digest(parts)}
    about |= {} if test is None else {"test": test}
    about |= {} if names is None else {"names": list(names)}
    classes = _classes(both, scenario, known) if known else [()] * len(both)
    outputs = len(known) or parts[0].y.shape[1]
    made = [Experience(*division, k, classes[k], outputs, scenario, about, tokens) for k, division in enumerate(both)]
    check(made)
    return with_scaled_targets(made)


def _digest(parts: Sequence[Subset]) -> str:
    """Return a short fingerprint of all tasks, and of where one ends."""
    return fingerprint((tensor for part in parts for tensor in (part.x, part.y)), str([tuple(part.x.shape) for part in parts]))


def _check_names(name: str, names: Sequence[str] | None, tasks: Sequence[Any]) -> None:
    """Raise a ValueError for no tasks, or names that do not fit."""
    if isinstance(tasks, Mapping) or not isinstance(tasks, Sequence) or not tasks:
        came = "none" if isinstance(tasks, Sequence) else f"a `{type(tasks).__name__}`"
        raise ValueError(f"`tasks` is {came}; pass a list with the training and test data of each task.")
    if names is not None and not len(set(names)) == len(names) == len(tasks):
        raise ValueError(f"There are {len(set(names))} different names for {len(tasks)} tasks; pass one for each.")
    if not name or name.startswith(tuple(f"{kind}-" for kind in STREAMS)):
        raise ValueError(
            printable(f"A stream of one's own cannot be named `{name}`: choose a name unlike {', '.join(STREAMS)}-...")
        )


def _pair(task: Any, what: str, test: float | None, tokens: int) -> list[Examples]:
    """Read the training and test data of a task; the training data alone if a share of them is held out."""
    wanted = ("train", "test") if test is None else ("train",)
    if isinstance(task, Mapping):
        if set(task) != set(wanted):
            needed = " and ".join(f"`{key}`" for key in wanted)
            raise ValueError(printable(f"The data of {what} have the keys {', '.join(map(str, task))}; {needed} belong there."))
        sides = [task[key] for key in wanted]
    elif test is None:
        if not isinstance(task, tuple | list) or len(task) != 2 or any(hasattr(part, "shape") for part in task):
            raise ValueError(
                f"The data of {what} are no pair of training and test data. Pass `((x, y), (test_x, test_y))`, or a share "
                "`test=0.2` to hold out of `(x, y)`."
            )
        sides = list(task)
    else:
        sides = [task]
        if isinstance(task, tuple) and any(isinstance(part, tuple | Dataset | DataLoader) for part in task):
            raise ValueError(f"There are test data of {what}, and `test={test}` asks to hold them out. Leave one of them away.")
    return [read(side, f"{what}'s {word} data", tokens) for side, word in zip(sides, ("training", "test"), strict=False)]


def _refuse_forms(sides: Sequence[Examples]) -> None:
    """Raise a ValueError if tasks differ in the shape of their inputs or the form of their labels."""
    for name, forms in (("inputs", [f"of shape {tuple(s.x.shape[1:])}" for s in sides]), ("labels", [s.form for s in sides])):
        other = next((k for k, form in enumerate(forms) if form != forms[0]), None)
        if other is not None:
            came = f"{sides[0].what} has {name} {forms[0]}, and {sides[other].what} {forms[other]}"
            raise ValueError(f"{came[0].upper()}{came[1:]}. Give all tasks one form.")


def _numbered(sides: Sequence[Examples]) -> tuple[list[Tensor], list[Any]]:
    """Number labels from 0 on in their sorted order; return the numbers and the labels; a regression has no labels."""
    names = [side.y for side in sides if isinstance(side.y, list)]
    if names:
        known: list[Any] = sorted(set(chain.from_iterable(names)))
        places = {label: place for place, label in enumerate(known)}
        return [torch.tensor([places[label] for label in y]) for y in names], known
    numbers = [side.y for side in sides if isinstance(side.y, Tensor)]
    if numbers[0].is_floating_point():
        return numbers, []
    values = torch.cat(numbers).unique()
    return [torch.searchsorted(values, y) for y in numbers], values.tolist()


def _classes(both: Sequence[tuple[Part, Part]], scenario: Scenario, known: Sequence[Any]) -> list[tuple[int, ...]]:
    """Return the labels of each task, or refuse one that occurs in test data alone."""
    trained = [set(train.labels().tolist()) for train, _ in both]
    classes = [set().union(*trained)] * len(both) if scenario == "domain" else trained
    for k, (labels, (_, test)) in enumerate(zip(classes, both, strict=True)):
        if lacking := sorted(set(test.labels().tolist()) - labels):
            came = f"The test data of task {k + 1} have the label {known[lacking[0]]!r}"
            where = "no training data have" if scenario == "domain" else "its training data lack"
            raise ValueError(printable(f"{came}, which {where}. Add training examples of it, or drop it."))
    return [tuple(sorted(labels)) for labels in classes]
