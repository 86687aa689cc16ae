"""How every method of a comparison trains: optimiser, learning rate and its schedule, model, and the softmax mask."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rwalk.bench.streams import Scenario

Mask = Literal["auto", "task", "seen", "all"]
Schedule = Literal["constant", "cosine", "linear"]
OPTIMIZERS: dict[str, Callable[[Any, float, float], Optimizer]] = {
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr=lr, weight_decay=decay),
    "momentum": lambda parameters, lr, decay: SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay),
    "adam": lambda parameters, lr, decay: Adam(parameters, lr=lr, weight_decay=decay),
    "adamw": lambda parameters, lr, decay: AdamW(parameters, lr=lr, weight_decay=decay),
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
}
"""The learning rate of a step over that of the first, by the share of a task's steps that came before."""
LARGEST = 1e30
"""The largest learning rate and weight decay: beyond it products overflow in float32."""
WIDEST = 1_000_000
"""The most outputs that a hidden layer may have, as its matrix has to fit in memory."""
AUTO: dict[Scenario, Mask] = {"task": "task", "domain": "all", "class": "seen"}
LATER = ("weight_decay", "schedule")
"""Fields that earlier records lack: they are part of a configuration where they are used, so that records keep their names."""


def _whole(value: Any, most: int) -> bool:
    """Return whether a value is a whole number from 1 to another one."""
    return isinstance(value, Integral) and 1 <= int(value) <= most


@dataclass(frozen=True)
class Training:
    """How every method of a comparison trains.

    Args:
        epochs: Passes over each task's data.
        batch_size: Examples per step.
        lr: Learning rate.
        optimizer: Plain SGD, SGD with momentum 0.9, Adam, or AdamW; kept over all tasks.
        model: One of mlp, cnn, resnet, gpt and lstm; or package.module:name of a class or function that makes a network, and is
            given what its parameters ask for by name (task, shape, inputs, outputs, tokens); in Python also that class or
            function itself. By default (auto) cnn for colour images, lstm for characters and mlp otherwise.
        hidden: Widths of the MLP's hidden layers.
        mask: Labels that compete in the training softmax: those of the "task", those "seen" so far, "all", or "auto": task for
            task-incremental, seen for class-incremental and all for domain-incremental streams.
        weight_decay: The optimiser's own: added to the gradient, but a shrinkage of the weights under AdamW, for which 0.01 is
            usual.
        schedule: What becomes of the learning rate over the steps of each task, which begins anew with the next one: it stays,
            or falls to 0 along half a cosine or a line.
    """

    epochs: int = 1
    batch_size: int = 10
    lr: float = 0.1
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    model: str | Callable[..., nn.Module] = "auto"
    hidden: tuple[int, ...] = (256, 256)
    mask: Mask = "auto"
    weight_decay: float = 0.0
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        """Raise a ValueError for fields outside their range."""
        for name in ("epochs", "batch_size"):
            self._need(_whole(getattr(self, name), 2**63 - 1), name, "a whole number, 1 or more, below 2^63")
        self._need(0 <= self.lr <= LARGEST, "lr", f"a number from 0 to {LARGEST:g}")
        self._need(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        if isinstance(self.model, nn.Module):
            came = f"`model` is a network, a `{type(self.model).__name__}`, which runs would share"
            raise TypeError(f"{came}; pass its name, or the class or function that makes it.")
        widths = isinstance(self.hidden, Sequence) and all(_whole(width, WIDEST) for width in self.hidden)
        self._need(widths, "hidden", f"a tuple of widths from 1 to {WIDEST:,}")
        self._need(self.mask in get_args(Mask), "mask", f"one of {', '.join(get_args(Mask))}")
        self._need(0 <= self.weight_decay <= LARGEST, "weight_decay", f"a number from 0 to {LARGEST:g}")
        self._need(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"Training({name}={getattr(self, name)!r}) is out of range: `{name}` has to be {expected}.")

    def resolved_mask(self, scenario: Scenario) -> Mask:
        """Return the training softmax mask for a scenario."""
        return AUTO[scenario] if self.mask == "auto" else self.mask

    def settings(self) -> dict[str, Any]:
        """Return the fields as they are recorded; those of `LATER` only if they are not at their defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default or f.name not in LATER}

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Return the optimiser of some parameters."""
        return OPTIMIZERS[self.optimizer](parameters, self.lr, self.weight_decay)

    def rates(self, batches: int) -> Iterator[float]:
        """Yield the learning rate of each step of a task, which has this many in an epoch."""
        steps = self.epochs * batches
        return (self.lr * SCHEDULES[self.schedule](step / steps) for step in range(steps))
