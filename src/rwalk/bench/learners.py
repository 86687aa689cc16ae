"""Learners: anything with `fit(experience)` and `predict(x, seen)`; here fine-tuning, any rule, and training on all data."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from rwalk._errors import explain
from rwalk.bench import ranks
from rwalk.bench.experience import Experience, Scenario
from rwalk.bench.models import normalises
from rwalk.consolidator import Consolidator, Settings

Mask = Literal["auto", "task", "seen", "all"]
OPTIMIZERS: dict[str, Callable[[Any, float], Optimizer]] = {
    "sgd": lambda parameters, lr: SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: Adam(parameters, lr=lr),
}
AUTO: dict[Scenario, Mask] = {"task": "task", "domain": "all", "class": "seen"}


@dataclass(frozen=True)
class Training:
    """How every method of a comparison trains.

    Args:
        epochs: Passes over each task's data.
        batch_size: Examples per step.
        lr: Learning rate.
        optimizer: Plain SGD, SGD with momentum 0.9, or Adam; kept over all tasks.
        model: One of mlp, cnn, resnet, gpt and lstm; or package.module:factory, a function that takes a stream's first task and
            makes a network; "auto" is cnn for colour images, lstm for characters and mlp for all else.
        hidden: Widths of the MLP's hidden layers.
        mask: Labels that compete in the training softmax: those of the "task", those "seen" so far, "all", or "auto": task for
            task-incremental, seen for class-incremental and all for domain-incremental streams.
    """

    epochs: int = 1
    batch_size: int = 10
    lr: float = 0.1
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    model: str = "auto"
    hidden: tuple[int, ...] = (256, 256)
    mask: Mask = "auto"

    def __post_init__(self) -> None:
        """Refuse fields outside their range."""
        self._need(self.epochs >= 1, "epochs", "1 or more")
        self._need(1 <= self.batch_size < 2**63, "batch_size", "1 or more, below 2^63")
        self._need(0 <= self.lr < math.inf, "lr", "a finite number, 0 or more")
        self._need(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        self._need(all(width >= 1 for width in self.hidden), "hidden", "positive widths")
        self._need(self.mask in get_args(Mask), "mask", f"one of {', '.join(get_args(Mask))}")

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(
                explain(f"Training({name}={getattr(self, name)!r})", f"`{name}` to be {expected}", "Pass such a value.")
            )

    def resolved_mask(self, scenario: Scenario) -> Mask:
        """Return the training softmax mask for a scenario."""
        return AUTO[scenario] if self.mask == "auto" else self.mask


def refuse_single(model: nn.Module, stream: Sequence[Experience], training: Training) -> None:
    """Raise a ValueError if a model with BatchNorm would be trained on one example at once."""
    single = [e.task for e in stream if len(e.train) == 1]
    if normalises(model) and (single or training.batch_size == 1):
        came = f"a single training example in task {single[0] + 1}" if single else "a batch size of 1"
        remedy = "Give that task more examples, or take fewer tasks." if single else "Take larger batches."
        expected = "two examples or more, as the model has BatchNorm"
        raise ValueError(explain(came, expected, remedy))


def batches(column: Tensor, size: int, joined: bool) -> tuple[Tensor, ...]:
    """Cut a tensor into batches; if `joined`, a last one of a single example is added to the one before."""
    full, rest = divmod(len(column), size)
    sizes = [*[size] * (full - 1), size + 1] if joined and full and rest == 1 else size
    parts: tuple[Tensor, ...] = column.split(sizes)
    return parts


class Learner(Protocol):
    """What `rwalk.bench.run` can evaluate; with the methods of `Resumable` too, it can also go on after an interruption."""

    def fit(self, experience: Experience) -> None:
        """Learn one task."""

    def predict(self, x: Tensor, seen: Collection[int]) -> Tensor:
        """Return labels for inputs, chosen among the labels of `seen`."""


@runtime_checkable
class Resumable(Protocol):
    """A learner whose whole state between two tasks can be had and given back."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the tasks to come depend on: tensors, numbers and text, in dictionaries, lists and tuples."""

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""


class FineTune:
    """Plain training on one task after another; also the loop that the other learners share.

    Args:
        build: makes the model, on the device where all is to be done.
        training: epochs, batch size, optimiser and softmax mask.
        seed: seed of the batch order.
        tick: called after each step.
    """

    def __init__(
        self, build: Callable[[], nn.Module], training: Training, seed: int = 0, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.build = build
        self.training = training
        self.tick = tick
        self.generator = torch.Generator().manual_seed(seed)
        self.step_seconds: list[float] = []
        self.passed = 0
        self.seen: set[int] = set()
        self.loss = torch.zeros(())
        self.diagnostics: list[dict[str, Any]] = []
        self._start()

    def _start(self) -> None:
        self.model = self.build()
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.joined = normalises(self.model)
        self.network = ranks.joined(self.model)
        self.optimizer = OPTIMIZERS[self.training.optimizer](self.model.parameters(), self.training.lr)

    def refuse(self, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if the tasks of a stream cannot be learned."""
        refuse_single(self.model, stream, self.training)

    def fit(self, experience: Experience) -> None:
        """Train on one task."""
        self.seen |= set(experience.classes)
        x, y = self._data(experience)
        self._train(x, y, [self._allowed(experience)], torch.zeros_like(y))

    def predict(self, x: Tensor, seen: Collection[int]) -> Tensor:
        """Return the most likely label of each input among the labels of `seen`."""
        labels = torch.tensor(sorted(seen), device=self.device)
        return self._read(lambda scores: labels[scores[:, labels].argmax(1)], x)

    def bits(self, x: Tensor, y: Tensor) -> float:
        """Return the mean over labels of -log2 of the probability that the model gives to each, among all outputs."""
        return self._read(partial(F.cross_entropy, reduction="none"), x, y).double().mean().item() / math.log(2)

    def _read(self, read: Callable[..., Tensor], x: Tensor, *targets: Tensor) -> Tensor:
        """Return what is read from the model's scores, in parts, as those of characters need much memory."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                parts = zip(*(batches(column, 512, self.joined) for column in (x, *targets)), strict=True)
                there = ([column.to(self.device) for column in part] for part in parts)
                return torch.cat([read(self.model(part), *target) for part, *target in there]).to(x.device)
        finally:
            self.model.train(training)

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimiser, order of batches and what was measured so far."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            "passed": self.passed,
            "seen": sorted(self.seen),
            "loss": self.loss,
            "diagnostics": self.diagnostics,
        }

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:  # noqa: ARG002
        """Continue from a `state_dict`; `past` are the tasks learned so far."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step_seconds, self.passed = state["step_seconds"].tolist(), state["passed"]
        self.seen, self.loss, self.diagnostics = set(state["seen"]), state["loss"], state["diagnostics"]
        for _ in self.step_seconds:
            self.tick()

    def scalars(self) -> dict[str, float]:
        """Return figures of the last task's training: the loss at its last step."""
        return {"train/loss": float(self.loss)}

    def state_bytes(self) -> int:
        """Bytes held beside model and optimiser."""
        return 0

    def stored_examples(self) -> int:
        """Count the examples of earlier tasks that are kept."""
        return 0

    def step_milliseconds(self) -> float:
        """Median CPU time of a step: forward, backward and optimiser, with all that hangs on it; a GPU is not waited for."""
        return median(self.step_seconds) * 1e3 if self.step_seconds else 0.0

    def examples_per_step(self) -> float:
        """Mean number of examples that go forward and backward in a step, those of earlier tasks among them."""
        return self.passed / len(self.step_seconds) if self.step_seconds else 0.0

    def _data(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return a task's training data on the model's device."""
        x, y = experience.train.read()
        return x.to(self.device), y.to(self.device)

    def _allowed(self, experience: Experience) -> Tensor:
        """Return which outputs compete in the training softmax, as a boolean vector."""
        mask = self.training.resolved_mask(experience.scenario)
        labels = {"task": experience.classes, "seen": sorted(self.seen), "all": range(experience.outputs)}[mask]
        allowed = torch.zeros(experience.outputs, dtype=torch.bool)
        allowed[list(labels)] = True
        return allowed.to(self.device)

    def _train(self, x: Tensor, y: Tensor, allowed: list[Tensor], origin: Tensor) -> None:
        """Run the epochs; `origin` says for each example which of the `allowed` vectors holds."""
        table = torch.stack(allowed)
        shut = None if table.all() else ~table
        for _ in range(self.training.epochs):
            order = torch.randperm(len(y), generator=self.generator, device="cpu").to(y.device)
            for rows in batches(order, self.training.batch_size, self.joined):
                mine = ranks.share(rows)
                batch, labels, closed = x[mine], y[mine], None if shut is None else shut[origin[mine]]
                before = time.process_time()
                self._step(batch, labels, closed, len(rows))
                self.step_seconds.append(time.process_time() - before)
                self.tick()
        self.loss = ranks.mean(self.loss)

    def _step(self, x: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> None:
        self._backward(x, y, closed, whole)
        self.optimizer.step()

    def _backward(self, x: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> None:
        """Leave the gradient of the loss, of this rank's part of a batch of `whole` examples."""
        self.optimizer.zero_grad()
        loss = self._loss(x, self.network(x), y, closed, whole)
        loss.backward()
        self.loss = loss.detach()
        self.passed += whole

    def _loss(self, x: Tensor, logits: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> Tensor:  # noqa: ARG002
        if closed is not None:
            logits = logits.masked_fill(closed, -math.inf)
        return ranks.mean_loss(logits, y, whole)


def competing(output: Tensor, labels: Tensor) -> Tensor:
    """Return a row of logits for each label that belongs to an example, over the outputs of `labels`.

    A single one comes beside another that is shut, as a row of one logit would mean a chance of 0 or 1.
    """
    scores = output[:, labels]
    scores = scores.movedim(1, -1).flatten(0, -2) if scores.dim() > 2 else scores
    return F.pad(scores, (0, 1), value=-math.inf) if len(labels) == 1 else scores


class Protected(FineTune):
    """Fine-tuning under a rule: the same loop with a consolidator attached.

    Args:
        settings: rule, strength, pull and averaging.
    """

    def __init__(self, settings: Settings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = Consolidator(self.network, *settings[:2], pull=settings.pull, average=settings.average)
        self.memory.attach(self.optimizer)

    def fit(self, experience: Experience) -> None:
        """Train on one task and consolidate, over the outputs that compete in the training softmax."""
        super().fit(experience)
        summary = self.summary = self.memory.summary(self.loss)
        self.diagnostics.append({"figures": summary.figures, "layers": [asdict(layer) for layer in summary.layers]})
        self._consolidate(experience)

    def _consolidate(self, experience: Experience) -> None:
        """End a task."""
        labels = self._allowed(experience).nonzero().squeeze(1)
        x, y = (ranks.share(column) for column in self._data(experience))
        columns = x, torch.searchsorted(labels, y)
        data = list(zip(*(batches(column, 256, self.joined) for column in columns), strict=True))
        self.memory.consolidate(data, logits=partial(competing, labels=labels))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of plain training and that of the consolidator."""
        return super().state_dict() | {"memory": self.memory.state_dict()}

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""
        super().resume(state, past)
        self.memory.load_state_dict(state["memory"])

    def scalars(self) -> dict[str, float]:
        """Return the loss at the last task's last step, and the memory's figures there, before it was consolidated."""
        return super().scalars() | self.summary.scalars()

    def state_bytes(self) -> int:
        """Bytes held by rule, anchor and average."""
        return self.memory.state_bytes


class Cumulative(FineTune):
    """Training on the data of all tasks so far, going on from the last weights: replay of everything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._past: list[Experience] = []

    def fit(self, experience: Experience) -> None:
        """Train on all tasks up to this one."""
        self._past.append(experience)
        self.seen |= set(experience.classes)
        data = [self._data(e) for e in self._past]
        origin = torch.cat([torch.full((len(y),), i, device=self.device) for i, (_, y) in enumerate(data)])
        x, y = (torch.cat(column) for column in zip(*data, strict=True))
        self._train(x, y, [self._allowed(e) for e in self._past], origin)

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far, which it keeps."""
        super().resume(state, past)
        self._past = list(past)

    def stored_examples(self) -> int:
        """Count the examples kept: all of them."""
        return sum(len(e.train) for e in self._past)


class Joint(Cumulative):
    """A new model for each task, trained on the data of all tasks so far: the upper reference, and a* of intransigence."""

    def fit(self, experience: Experience) -> None:
        """Train a new model on all tasks up to this one."""
        self._start()
        super().fit(experience)
