"""What published baselines add to the training loop: stored examples, earlier answers, or the data of all tasks so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from rwalk.bench.outputs import competing
from rwalk.bench.streams import Experience
from rwalk.bench.training import Addition, Batch, Learner, batches
from rwalk.finetuning.distillation import frozen_copy
from rwalk.replay import Buffer, project_
from rwalk.replay.buffer import Per
from rwalk.rules import Kronecker, TaskFisher
from rwalk.rules.base import Rule


@dataclass(frozen=True)
class Rehearsal:
    """Which examples of earlier tasks are kept, and how many of them join each step.

    Args:
        size: How many examples are kept.
        per: In total, shared by all classes, or for each class.
        select: How they are selected; see `rwalk.replay.Buffer`.
        batch: How many of them join each step; None for as many as the task's own batch has.
    """

    size: int = 200
    per: Per = "total"
    select: str = "uniform"
    batch: int | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError for fields outside their range."""
        self.buffer(0)
        if self.batch is not None and not 1 <= self.batch < 2**63:
            raise ValueError(
                f"Rehearsal(batch={self.batch!r}) is out of range: `batch` has to be 1 or more, below 2^63, or None."
            )

    def buffer(self, seed: int) -> Buffer:
        """Return an empty buffer."""
        return Buffer(self.size, self.per, self.select, seed)

    def check(self, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if a stream has more classes than the budget has examples, or none that a selection needs."""
        if not stream[0].labelled and (self.per != "total" or self.select not in ("uniform", "reservoir")):
            raise ValueError(
                f'A stream without a label for each example has no classes, which per="{self.per}" with select="{self.select}" '
                "needs; keep examples uniformly or by a reservoir, in total."
            )
        classes = sum(len(e.classes) for e in stream) if stream[0].labelled else len(stream)
        if self.per == "total" and self.select != "reservoir" and self.size < classes:
            raise ValueError(
                f"{self.size} examples in total are too few for {classes} classes, counted task by task: each class needs one. "
                'Keep more examples, or use `per="class"` or a reservoir.'
            )


class Past(Addition):
    """Training on the data of all tasks so far.

    Args:
        anew: whether each task begins with a new model (joint training), or with the last weights (cumulative training).
    """

    def __init__(self, anew: bool) -> None:
        self.anew = anew
        self.tasks: list[Experience] = []

    @property
    def stored(self) -> int:
        """Examples that are kept: all of them."""
        return sum(len(e.train) for e in self.tasks)

    def begin(self, learner: Learner, experience: Experience) -> list[Experience]:
        """Return all tasks up to this one."""
        if self.anew:
            learner.start()
        self.tasks.append(experience)
        return self.tasks

    def resume(self, learner: Learner, state: Mapping[str, Any], past: Sequence[Experience]) -> None:  # noqa: ARG002
        """Keep the tasks learned so far."""
        self.tasks = list(past)


class Replay(Addition):
    """Experience replay: examples of earlier tasks join each batch, and the loss is the mean over both (ER).

    As in Chaudhry et al., "On tiny episodic memories in continual learning", 2019, with any way of choosing the examples.
    Each stored example competes in the softmax as its task's data do: under the mask "seen" with all labels seen by now. Beside
    a rule the mixed batch's loss is the task's loss: its gradient is what the rule observes.

    Args:
        rehearsal: which examples are kept, and how many join.
        seed: seed of the run.
    """

    def __init__(self, rehearsal: Rehearsal, seed: int) -> None:
        self.rehearsal = rehearsal
        self.buffer = rehearsal.buffer(seed + 1)  # with the run's own seed it would draw as the order of batches does
        self.tasks: list[Experience] = []
        self._shut = torch.zeros(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored examples."""
        return self.buffer.nbytes

    @property
    def stored(self) -> int:
        """Examples that are kept."""
        return len(self.buffer)

    def begin(self, learner: Learner, experience: Experience) -> list[Experience]:
        """Look up which outputs compete for the stored examples."""
        if self.tasks:
            self._shut = ~torch.stack([learner.allowed(e) for e in self.tasks])
        return [experience]

    def gradient(self, learner: Learner, batch: Batch) -> None:
        """Leave the gradient of the mean loss over a batch and stored examples."""
        if len(self.buffer):
            x, y, old = self.recall(learner, len(batch.y))
            own = torch.zeros(len(batch.y), old.shape[1], dtype=torch.bool, device=learner.device)
            shut = torch.cat([own if batch.shut is None else batch.shut, old])
            all_compete = batch.shut is None and not old.any()
            batch = Batch(torch.cat([batch.x, x]), torch.cat([batch.y, y]), None if all_compete else shut)
        learner.backward(batch)

    def recall(self, learner: Learner, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw stored examples beside a batch of `count`: inputs, labels and outputs shut, on the model's device."""
        x, y, task = (column.to(learner.device) for column in self.buffer.sample(self.rehearsal.batch or count))
        return x, y, self._shut[task]

    def end(self, learner: Learner, experience: Experience) -> None:
        """Store some examples of a task that has been learned."""
        self.keep(learner, experience)
        self.tasks.append(experience)

    def keep(self, learner: Learner, experience: Experience) -> None:
        """Let the buffer choose among a task's examples."""
        labels = learner.allowed(experience).nonzero().squeeze(1)
        data = zip(*(batches(column, 2048, learner.joined) for column in learner.data(experience)), strict=True)
        self.buffer.add(learner.model, data, task=len(self.tasks), logits=partial(competing, labels=labels))

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer's state."""
        return {"buffer": self.buffer.state_dict()}

    def resume(self, learner: Learner, state: Mapping[str, Any], past: Sequence[Experience]) -> None:  # noqa: ARG002
        """Restore the buffer, and keep the tasks learned so far."""
        self.buffer.load_state_dict(state["buffer"])
        self.tasks = list(past)


class AGEM(Replay):
    """A-GEM: a step's gradient may not point against that of the loss on stored examples (Chaudhry et al. 2019)."""

    def check(self, learner: Learner, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if stored examples would pass BatchNorm one by one."""
        kept = self.rehearsal.size * (len(stream[0].classes) if self.rehearsal.per == "class" else 1)
        if learner.joined and 1 in (kept, self.rehearsal.batch):
            raise ValueError(
                "A-GEM passes its stored examples through the model by themselves, and the model's BatchNorm needs two or "
                "more. Keep or replay more than a single stored example."
            )

    def gradient(self, learner: Learner, batch: Batch) -> None:
        """Leave the gradient of a batch, projected where it points against that of stored examples."""
        reference: dict[Tensor, Tensor] = {}
        if len(self.buffer):
            learner.backward(Batch(*self.recall(learner, len(batch.y))))
            reference = {p: p.grad for p in learner.model.parameters() if p.grad is not None}
        learner.backward(batch)
        if reference:
            project_([_gradient(p) for p in reference], list(reference.values()))


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, made of zeros where the loss did not depend on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class LwF(Addition):
    """Learning without forgetting: answers like the model before the task, on the task's own inputs (Li and Hoiem 2016).

    The loss gains strength * sum over tasks of the cross-entropy from softmax(z_old/2) to softmax(z/2), over the outputs that
    competed in each earlier task; where these are nested or the same, as under the masks "seen" and "all", over the last ones.
    The paper's warm-up of a new head by itself is left out. In a regression, which the paper does not treat, the term is the
    mean square of z - z_old.

    Args:
        strength: weight of the earlier answers; 1 in the paper.
    """

    TEMPERATURE = 2.0

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.old: list[Tensor] = []
        self.teacher: nn.Module | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the old model."""
        return 0 if self.teacher is None else sum(t.numel() * t.element_size() for t in self.teacher.state_dict().values())

    def loss(self, loss: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """Add how far the answers are from those of the old model."""
        if self.teacher is None or not self.strength:
            return loss
        with torch.no_grad():
            before = self.teacher(x)
        if not self.old:
            return loss + self.strength * mse_loss(logits, before)
        for allowed in self.old:
            answer = (before / self.TEMPERATURE)[:, allowed].softmax(1)
            loss = loss + self.strength * cross_entropy(logits[:, allowed] / self.TEMPERATURE, answer)
        return loss

    def end(self, learner: Learner, experience: Experience) -> None:
        """Remember the model as it is after a task, and the outputs that competed; in a regression none do."""
        if not experience.regression:
            allowed = learner.allowed(experience)
            nested = learner.training.resolved_mask(experience.scenario) != "task"
            self.old = [allowed] if nested else [o for o in self.old if not torch.equal(o, allowed)] + [allowed]
        self._remember(learner)

    def state_dict(self) -> dict[str, Any]:
        """Return the outputs of earlier tasks; between tasks the old model is the model."""
        return {"old": self.old}

    def resume(self, learner: Learner, state: Mapping[str, Any], past: Sequence[Experience]) -> None:  # noqa: ARG002
        """Restore the outputs of earlier tasks, and remember the model."""
        self.old = [allowed.to(learner.device) for allowed in state["old"]]
        self._remember(learner)

    def _remember(self, learner: Learner) -> None:
        self.teacher = frozen_copy(learner.model)


BASELINES = {
    "finetune": "Plain training on one task after another.",
    "joint": "A new model for each task, trained on the data of all tasks so far: the upper reference.",
    "cumulative": "Training on the data of all tasks so far from the last weights: replay of everything.",
    "replay": "Experience replay: stored examples join each batch, and the loss is the mean over both (Chaudhry et al. 2019).",
    "agem": "A-GEM: a step may not raise the loss on stored examples (Chaudhry et al. 2019).",
    "lwf": "Learning without forgetting: answers like the model before the task, on its own inputs (Li and Hoiem 2016).",
}
"""What each method does that has no rule."""

RECIPES: dict[str, Callable[[], Rule[Any]]] = {"default": Kronecker, "recipe": TaskFisher}
"""Methods that are a rule with all that is recommended beside it, by the names that they have here."""
RECIPES_ABOUT = {
    "default": "What we recommend, `Consolidator(model)`: Kronecker factors of each layer, proximal pull, tail averaging.",
    "recipe": "The diagonal recipe, `TaskFisher()`: mean squared gradients of each weight, proximal pull, tail averaging.",
}
"""What each of them does."""


def addition(method: str, rehearsal: Rehearsal | None, strength: float, seed: int) -> Addition:
    """Return what a method adds to the loop; a rule adds replay if there is a rehearsal."""
    if method in ("joint", "cumulative"):
        return Past(anew=method == "joint")
    if method == "lwf":
        return LwF(strength)
    if rehearsal is None:
        return Addition()
    return AGEM(rehearsal, seed) if method == "agem" else Replay(rehearsal, seed)
