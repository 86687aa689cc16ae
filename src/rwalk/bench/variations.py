"""Variations of a stream, each recorded in what it is made from: fewer examples, blurry boundaries, and another metric."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from rwalk.bench.imports import Source, function, path_of
from rwalk.bench.record import ACCURACY
from rwalk.bench.streams import Experience, Joined, Part, Score, check


def limit(stream: Sequence[Experience], examples: int) -> list[Experience]:
    """Keep a number of each task's training examples, and of its test examples, for quick tries.

    They are drawn at random, the same way each time; of each label one is among them, if there are enough.

    Args:
        stream: the tasks.
        examples: how many to keep at most of either.

    Raises:
        ValueError: if the number is below 1, or a task's training examples have more labels.
    """
    check(stream)
    if examples < 1:
        raise ValueError(f"A limit of {examples} examples keeps none; pass 1 or more.")
    about = stream[0].stream | {"limit": examples}
    for e in stream:
        if len(labels := _labels(e.train)) > examples:
            came = f"Task {e.task + 1} has training examples of {len(labels)} labels"
            raise ValueError(f"{came}, and a limit of {examples} would lose some; pass a higher one.")
    return [replace(e, stream=about, train=_few(e.train, examples), test=_few(e.test, examples)) for e in stream]


def _few(part: Part, count: int) -> Part:
    """Return examples at random: the first of each label, then others."""
    order, labels = torch.randperm(len(part), generator=torch.Generator().manual_seed(0), device="cpu"), part.labels()
    if labels.dim() == 1:
        found, place = labels[order].unique(return_inverse=True)
        first = torch.full_like(found, len(order)).scatter_reduce_(0, place, torch.arange(len(order)), "amin")
        others = torch.ones(len(order), dtype=torch.bool).index_fill(0, first, False)
        order = torch.cat([order[first], order[others]])
    return part if len(part) <= count else part.take(order[:count].sort().values)


def _labels(part: Part) -> set[int]:
    """Return the labels of examples; none for a regression, and none for characters, as any of them may come next."""
    labels = part.labels()
    return set(labels.tolist()) if labels.dim() == 1 else set()


def scored(stream: Sequence[Experience], metric: Source, higher: bool = True) -> list[Experience]:
    """Score a stream by a metric of one's own, in place of accuracy or R².

    Args:
        stream: the tasks.
        metric: a function of true and predicted labels or targets, NumPy arrays with an entry for each example, as those of
            `sklearn.metrics`; or its import path, such as "sklearn.metrics:balanced_accuracy_score".
        higher: whether a higher score is better.

    Raises:
        ValueError: if the path leads to no function, or a function of the name "accuracy" is said to be an error.
    """
    check(stream)
    path = metric if isinstance(metric, str) else path_of(metric)
    function(metric)
    score = Score(path.rpartition(":")[2], metric, higher)
    if score.name == ACCURACY and not higher:
        raise ValueError("`accuracy` means a fraction that should be high; give this one another name.")
    about = stream[0].stream | {"metric": path} | ({} if higher else {"higher": False})
    return [replace(e, stream=about, score=score) for e in stream]


def blurry(stream: Sequence[Experience], share: float, seed: int = 0) -> list[Experience]:
    """Let neighbouring tasks exchange training examples, so that no boundary between them is sharp; test examples stay.

    Half of the share crosses each boundary in either direction, so that of the examples of a task with two neighbours this
    share comes from them. The first and the last task have one neighbour, and half of it. Sizes stay as they are. Bang et al.,
    "Rainbow Memory: Continual learning with a memory of diverse samples" (CVPR 2021), call such streams blurry, and spread the
    share over all other tasks.

    Args:
        stream: the tasks, class-incremental or domain-incremental. A task's labels then include those that come from others.
        share: of the training examples, above 0 and at most 1; of two neighbours of different sizes, of the smaller one's.
        seed: seed of the choice.

    Raises:
        ValueError: for a task-incremental stream, which shuts the labels of other tasks, and if nothing would be exchanged.
    """
    check(stream)
    if stream[0].scenario == "task":
        raise ValueError(
            "A task-incremental stream shuts the labels of other tasks, which blurry boundaries bring; "
            "choose the scenario class or domain."
        )
    sizes = [len(e.train) for e in stream]
    counts = [int(share / 2 * min(pair)) if 0 < share <= 1 else 0 for pair in pairwise(sizes)]
    if not all(counts) or not counts:
        raise ValueError(
            f"With a share of {share} nothing crosses a boundary between tasks of {', '.join(map(str, sizes[:4]))} examples. "
            "Pass a larger share, at most 1, and two tasks or more."
        )
    generator = torch.Generator().manual_seed(seed)
    kept, before, after = zip(*map(partial(_dealt, generator=generator), stream, [0, *counts], [*counts, 0]), strict=True)
    trains = zip(kept, [None, *after[:-1]], [*before[1:], None], strict=True)
    about = stream[0].stream | {"blurry": {"share": share, "seed": seed}}
    return [_mixed(e, Joined(tuple(filter(None, parts))), about) for e, parts in zip(stream, trains, strict=True)]


def _dealt(e: Experience, before: int, after: int, generator: torch.Generator) -> tuple[Part, Part, Part]:
    """Divide a task's training examples at random: those that stay, go to the task before, and to the one after."""
    order = torch.randperm(len(e.train), generator=generator, device="cpu")
    some = order.split([len(order) - before - after, before, after])
    kept, left, right = (e.train.take(places.sort().values) for places in some)
    return kept, left, right


def _mixed(e: Experience, train: Joined, about: dict[str, Any]) -> Experience:
    """Return a task with other training examples, and with their labels."""
    return replace(e, stream=about, train=train, classes=tuple(sorted({*e.classes, *_labels(train)})))
