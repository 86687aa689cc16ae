"""The first tasks of a stream, on which settings are tuned by held-out training examples, and the later ones for the runs.

No test example is used for tuning: Chaudhry et al. chose so in "Efficient Lifelong Learning with A-GEM" (ICLR 2019).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from rwalk.bench.streams import Experience, Part, check, label_counts

VALIDATION = "-validation"
"""The ending of the name of a stream whose test examples are held out from training."""


def early(stream: Sequence[Experience], tasks: int = 3, validation: float = 0.2) -> list[Experience]:
    """Return the first tasks of a stream, with a share of their training examples in place of their test examples.

    Raises:
        ValueError: if the stream has fewer tasks, a task would be left without examples, or no label competes with another.
    """
    check(stream)
    _check_count(stream, tasks, 1, len(stream))
    about = stream[0].stream
    about = about | {"name": about["name"] + VALIDATION, "tasks": tasks, "validation": validation}
    parts = [divided(e.train, validation) for e in stream[:tasks]]
    found = [replace(e, stream=about, train=train, test=test) for e, (train, test) in zip(stream, parts, strict=False)]
    if not found[0].regression and all(task["compete"] == 1 for task in label_counts(found)):
        raise ValueError(
            "Each task to tune on has a single label to choose from, so every strength would be right. "
            "Take fewer tasks in the stream, or another scenario."
        )
    return found


def later(stream: Sequence[Experience], tasks: int = 3) -> list[Experience]:
    """Return the stream without its first tasks.

    Raises:
        ValueError: if nothing would be left.
    """
    _check_count(stream, tasks, 0, len(stream) - 1)
    if tasks == 0:
        return list(stream)
    about = stream[0].stream | {"tasks": len(stream) - tasks, "skipped": tasks}
    return [replace(e, task=k, stream=about) for k, e in enumerate(stream[tasks:])]


def _check_count(stream: Sequence[Experience], tasks: int, least: int, most: int) -> None:
    if not least <= tasks <= most:
        raise ValueError(f"{tasks} tasks cannot be taken from a stream of {len(stream)}; pass {least} to {most}.")


def divided(part: Part, share: float) -> tuple[Part, Part]:
    """Divide examples at random, the same way each time; the second part, a share of them, is held out."""
    count = round(share * len(part)) if 0 < share < 1 else 0
    if not 0 < count < len(part):
        raise ValueError(
            f"A share of {share} of {len(part)} examples cannot be held out; "
            "pass a share between 0 and 1 that leaves examples on both sides."
        )
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0), device="cpu")
    held, kept = order.split([count, len(part) - count])
    return part.take(kept.sort().values), part.take(held.sort().values)
