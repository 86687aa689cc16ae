"""Training and evaluation: one loop for all methods, to which each adds a memory, a store of examples or a term of the loss."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk.bench.models import has_batchnorm
from rwalk.bench.optimisation import Training
from rwalk.bench.outputs import competing
from rwalk.bench.streams import Experience
from rwalk.consolidation.consolidator import Consolidator
from rwalk.consolidation.settings import Settings
from rwalk.gradients.likelihood import gaussian_loss


class CustomLearner(Protocol):
    """A method of one's own; with the methods of `Resumable` too, it can also continue after an interruption."""

    def fit(self, experience: Experience) -> None:
        """Learn one task."""

    def predict(self, x: Tensor, seen: Collection[int]) -> Tensor:
        """Return labels for inputs, chosen among the labels of `seen`; of a regression, which has none, its targets."""


@runtime_checkable
class Resumable(Protocol):
    """A learner whose whole state between two tasks can be saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the tasks to come depend on: tensors, numbers and text, in dictionaries, lists and tuples."""

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""


class Batch(NamedTuple):
    """Examples of one step; `shut` marks for each the outputs that do not compete, and is None where all do."""

    x: Tensor
    y: Tensor
    shut: Tensor | None


class Addition:
    """What a method adds to the loop of `Learner`. This one adds nothing; those of `rwalk.bench.baselines` override a part."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0

    @property
    def stored(self) -> int:
        """Examples of earlier tasks that are kept."""
        return 0

    def check(self, learner: "Learner", stream: Sequence[Experience]) -> None:
        """Raise a ValueError if the tasks of a stream cannot be learned."""

    def begin(self, learner: "Learner", experience: Experience) -> list[Experience]:  # noqa: ARG002
        """Begin a task, and return the tasks to train on."""
        return [experience]

    def gradient(self, learner: "Learner", batch: Batch) -> None:
        """Leave the gradient of a step on a batch of these tasks."""
        learner.backward(batch)

    def loss(self, loss: Tensor, x: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch with a term added."""
        return loss

    def end(self, learner: "Learner", experience: Experience) -> None:
        """Keep what later tasks need of one that has been learned."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the tasks to come depend on."""
        return {}

    def resume(self, learner: "Learner", state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict` of the learner; `past` are the tasks learned so far."""


class Learner:
    """The loop that all methods share. Without additions it is fine-tuning: plain training on one task after another.

    Args:
        build: makes the model, on the device to train on.
        training: epochs, batch size, optimiser and softmax mask.
        seed: seed of the batch order.
        tick: called after each step.
        memory: rule, strength, pull and averaging of a consolidator.
        addition: what a baseline adds: stored examples, a term of the loss, or the data of earlier tasks.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        training: Training,
        seed: int = 0,
        tick: Callable[[], None] = lambda: None,
        *,
        memory: Settings | None = None,
        addition: Addition | None = None,
    ) -> None:
        self.build, self.training, self.tick, self.addition = build, training, tick, addition or Addition()
        self.generator = torch.Generator().manual_seed(seed)
        self.step_seconds: list[float] = []
        self.examples_seen, self.seen, self.loss = 0, set[int](), torch.zeros(())
        self.diagnostics: list[dict[str, Any]] = []
        self.start()
        self.memory = (
            None if memory is None else Consolidator(self.model, *memory[:2], pull=memory.pull, average=memory.average)
        )
        if self.memory is not None:
            self.memory.attach(self.optimizer)

    def start(self) -> None:
        """Make a new model and its optimiser."""
        self.model = self.build()
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.joined = has_batchnorm(self.model)
        self.optimizer = self.training.make_optimizer(self.model.parameters())

    def check(self, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if the tasks of a stream cannot be learned."""
        if self.joined:
            check_batches(stream, self.training)
        self.addition.check(self, stream)

    def fit(self, experience: Experience) -> None:
        """Train on one task, and let each addition keep what it needs of it."""
        self.seen |= set(experience.classes)
        self.train(self.addition.begin(self, experience))
        if self.memory is not None:
            summary = self.summary = self.memory.summary(self.loss)
            self.diagnostics.append({"figures": summary.figures, "layers": [asdict(layer) for layer in summary.layers]})
            self.consolidate(self.memory, experience)
        self.addition.end(self, experience)

    def train(self, tasks: Sequence[Experience]) -> None:
        """Run the epochs over some tasks at once; each example competes as its own task does."""
        data = [self.data(e) for e in tasks]
        x, y = data[0] if len(data) == 1 else (torch.cat(column) for column in zip(*data, strict=True))
        task = torch.cat([torch.full((len(labels),), i, device=self.device) for i, (_, labels) in enumerate(data)])
        table = torch.stack([self.allowed(e) for e in tasks])
        shut = None if table.all() else ~table
        rates = self.training.rates(len(batches(y, self.training.batch_size, self.joined)))
        for _ in range(self.training.epochs):
            order = torch.randperm(len(y), generator=self.generator, device="cpu").to(y.device)
            for rows in batches(order, self.training.batch_size, self.joined):
                batch = Batch(x[rows], y[rows], None if shut is None else shut[task[rows]])
                self.set_rate(next(rates))
                before = time.process_time()
                self.addition.gradient(self, batch)
                self.optimizer.step()
                self.step_seconds.append(time.process_time() - before)
                self.tick()

        self.set_rate(self.training.lr)

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, batch: Batch) -> None:
        """Leave the gradient of the loss of a batch."""
        self.optimizer.zero_grad()
        loss = self.batch_loss(batch)
        loss.backward()
        self.loss = loss.detach()
        self.examples_seen += len(batch.y)

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy over the outputs that compete, or a regression's mean square, with the addition's term."""
        logits = self.model(batch.x)
        if batch.y.is_floating_point():
            return self.addition.loss(F.mse_loss(logits, batch.y), batch.x, logits)
        masked = logits if batch.shut is None else logits.masked_fill(batch.shut, -math.inf)
        return self.addition.loss(F.cross_entropy(masked, batch.y), batch.x, logits)

    def consolidate(self, memory: Consolidator, experience: Experience) -> None:
        """End a task of the memory, over the outputs that compete in the training softmax."""
        labels = self.allowed(experience).nonzero().squeeze(1)
        x, y = self.data(experience)
        y = y if experience.regression else torch.searchsorted(labels, y)
        data = list(zip(*(batches(column, 256, self.joined) for column in (x, y)), strict=True))
        if experience.regression:
            memory.consolidate(data, loss=gaussian_loss(memory.rule))
        else:
            memory.consolidate(data, logits=partial(competing, labels=labels))

    def data(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return a task's training data on the model's device."""
        x, y = experience.train.read()
        return x.to(self.device), y.to(self.device)

    def allowed(self, experience: Experience) -> Tensor:
        """Return which outputs compete in the training softmax, as a boolean vector."""
        mask = self.training.resolved_mask(experience.scenario)
        labels = {"task": experience.classes, "seen": sorted(self.seen), "all": range(experience.outputs)}[mask]
        allowed = torch.zeros(experience.outputs, dtype=torch.bool)
        allowed[list(labels)] = True
        return allowed.to(self.device)

    def predict(self, x: Tensor, seen: Collection[int]) -> Tensor:
        """Return the most likely label of each input among those of `seen`; the outputs of a regression, which has none."""
        if not seen:
            return self._read(lambda outputs: outputs, x)
        labels = torch.tensor(sorted(seen), device=self.device)
        return self._read(lambda scores: labels[scores[:, labels].argmax(1)], x)

    def bits(self, x: Tensor, y: Tensor) -> float:
        """Return the mean over labels of -log2 of the probability that the model gives to each, among all outputs."""
        return self._read(partial(F.cross_entropy, reduction="none"), x, y).double().mean().item() / math.log(2)

    def _read(self, read: Callable[..., Tensor], x: Tensor, *targets: Tensor) -> Tensor:
        """Return a function of the model's scores, in parts, as those of characters need much memory."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                parts = zip(*(batches(column, 512, self.joined) for column in (x, *targets)), strict=True)
                here = ([column.to(self.device) for column in part] for part in parts)
                return torch.cat([read(self.model(part), *target) for part, *target in here]).to(x.device)
        finally:
            self.model.train(training)

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimiser, order of batches, additions and what was measured so far."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            "passed": self.examples_seen,
            "seen": sorted(self.seen),
            "loss": self.loss,
            "diagnostics": self.diagnostics,
        }
        memory = {} if self.memory is None else {"memory": self.memory.state_dict()}
        return state | self.addition.state_dict() | memory

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step_seconds, self.examples_seen = state["step_seconds"].tolist(), state["passed"]
        self.seen, self.loss, self.diagnostics = set(state["seen"]), state["loss"], state["diagnostics"]
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
        self.addition.resume(self, state, past)
        for _ in self.step_seconds:
            self.tick()

    def scalars(self) -> dict[str, float]:
        """Return the loss at the last step of the last task, and the memory's figures there, before it was consolidated."""
        loss = {"train/loss": float(self.loss)}
        return loss if self.memory is None or not self.diagnostics else loss | self.summary.scalars()

    def memory_sizes(self) -> dict[str, float]:
        """Return the bytes of the model, those held beside it and the optimiser, and the number of stored examples."""
        model = sum(p.numel() * p.element_size() for p in self.model.parameters())
        state = self.addition.nbytes + (0 if self.memory is None else self.memory.state_bytes)
        return {"model_bytes": model, "state_bytes": state, "stored_examples": self.addition.stored}

    def timings(self) -> dict[str, float]:
        """Return the median CPU milliseconds of a step, without waiting for a GPU, and its mean number of examples."""
        seconds = self.step_seconds or [0.0]
        return {"step_ms": median(seconds) * 1e3, "examples_per_step": self.examples_seen / len(seconds)}


def batches(column: Tensor, size: int, joined: bool) -> tuple[Tensor, ...]:
    """Cut a tensor into batches; if `joined`, a last one of a single example is added to the one before."""
    full, rest = divmod(len(column), size)
    sizes = [*[size] * (full - 1), size + 1] if joined and full and rest == 1 else size
    parts: tuple[Tensor, ...] = column.split(sizes)
    return parts


def check_batches(stream: Sequence[Experience], training: Training) -> None:
    """Raise a ValueError if a model with BatchNorm would be trained on one example at once."""
    single = [e.task + 1 for e in stream if len(e.train) == 1]
    if single:
        raise ValueError(f"Task {single[0]} has a single training example, but BatchNorm needs two or more; take fewer tasks.")
    if training.batch_size == 1:
        raise ValueError("The model's BatchNorm needs two or more examples in a batch; increase the batch size from 1.")
