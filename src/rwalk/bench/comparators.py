"""What readers expect beside a rule: experience replay, A-GEM and learning without forgetting, in the bench's own loop."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwalk._errors import explain
from rwalk.bench import ranks
from rwalk.bench.experience import Experience
from rwalk.bench.learners import FineTune, Protected, batches, competing
from rwalk.replay import Buffer, project_
from rwalk.replay.buffer import Per


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
        """Refuse fields outside their range."""
        self.buffer(0)
        if self.batch is not None and not 1 <= self.batch < 2**63:
            came = f"Rehearsal(batch={self.batch!r})"
            raise ValueError(explain(came, "`batch` to be 1 or more, below 2^63", "Pass such a value, or None."))

    def buffer(self, seed: int) -> Buffer:
        """Return an empty buffer."""
        return Buffer(self.size, self.per, self.select, seed)

    def check(self, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if a stream has more classes than the budget has examples."""
        classes = sum(len(e.classes) for e in stream)
        if self.per == "total" and self.select != "reservoir" and self.size < classes:
            came = f"{self.size} examples in total for {classes} classes, each task's counted"
            remedy = 'Keep more examples, or `per="class"`, or a reservoir.'
            raise ValueError(explain(came, "an example for each", remedy))


class Replay(FineTune):
    """Experience replay: examples of earlier tasks join each batch, and the loss is the mean over both (ER).

    As in Chaudhry et al., "On tiny episodic memories in continual learning", 2019, with any way of choosing the examples.
    Each stored example competes in the softmax as its task's data do: under the mask "seen" with all labels seen by now. Beside
    a rule the mixed batch's loss is the task's loss: its gradient is what the rule observes.

    Args:
        rehearsal: which examples are kept, and how many join.
    """

    def __init__(self, rehearsal: Rehearsal, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rehearsal = rehearsal
        self.buffer = rehearsal.buffer(self.generator.initial_seed() + 1)  # else it would draw as the order of batches does
        self._past: list[Experience] = []
        self._shut = torch.zeros(0)

    def fit(self, experience: Experience) -> None:
        """Train on one task and on stored examples, and then store some of it."""
        self.seen |= set(experience.classes)
        if self._past:
            self._shut = ~torch.stack([self._allowed(e) for e in self._past])
        super().fit(experience)
        self._keep(experience)
        self._past.append(experience)

    def _keep(self, experience: Experience) -> None:
        """Store some of a task that has been learned."""
        labels = self._allowed(experience).nonzero().squeeze(1)
        data = zip(*(batches(column, 2048, self.joined) for column in self._data(experience)), strict=True)
        self.buffer.add(self.model, data, task=len(self._past), logits=partial(competing, labels=labels))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of training and the buffer's."""
        return super().state_dict() | {"buffer": self.buffer.state_dict()}

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""
        super().resume(state, past)
        self.buffer.load_state_dict(state["buffer"])
        self._past = list(past)

    def state_bytes(self) -> int:
        """Bytes held beside model and optimiser, stored examples among them."""
        return super().state_bytes() + self.buffer.nbytes

    def stored_examples(self) -> int:
        """Count the examples that are kept."""
        return len(self.buffer)

    def _recall(self, whole: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Draw stored examples beside a batch of `whole`: this rank's part, the outputs shut, and how many in all."""
        drawn = self.buffer.sample(self.rehearsal.batch or whole)
        x, y, task = (ranks.share(column).to(self.device) for column in drawn)
        return x, y, self._shut[task], len(drawn.y)

    def _step(self, x: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> None:
        if len(self.buffer):
            old_x, old_y, shut, count = self._recall(whole)
            own = torch.zeros(len(y), shut.shape[1], dtype=torch.bool, device=self.device) if closed is None else closed
            closed = torch.cat([own, shut]) if closed is not None or shut.any() else None
            x, y, whole = torch.cat([x, old_x]), torch.cat([y, old_y]), whole + count
        super()._step(x, y, closed, whole)


class ProtectedReplay(Replay, Protected):
    """A rule beside experience replay; what is stored is chosen by the consolidated model.

    Args:
        rehearsal: which examples are kept, and how many join.
        settings: rule, strength, pull and averaging.
    """


class AGEM(Replay):
    """A-GEM: a step's gradient may not point against that of the loss on stored examples (Chaudhry et al. 2019)."""

    def refuse(self, stream: Sequence[Experience]) -> None:
        """Raise a ValueError if the tasks of a stream cannot be learned, or stored examples would pass BatchNorm one by one."""
        super().refuse(stream)
        kept = self.rehearsal.size * (len(stream[0].classes) if self.rehearsal.per == "class" else 1)
        if self.joined and 1 in (kept, self.rehearsal.batch):
            came = "one stored example at each step of A-GEM, which passes through the model by itself"
            expected = "two or more, as the model has BatchNorm"
            raise ValueError(explain(came, expected, "Keep or replay more examples."))

    def _step(self, x: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> None:
        reference: dict[Tensor, Tensor] = {}
        if len(self.buffer):
            self._backward(*self._recall(whole))
            # copies: under DistributedDataParallel gradients are views that the next backward fills
            reference = {p: p.grad.clone() for p in self.model.parameters() if p.grad is not None}
        self._backward(x, y, closed, whole)
        if reference:
            project_([_gradient(p) for p in reference], list(reference.values()))
        self.optimizer.step()


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, made of zeros where the loss did not depend on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class LwF(FineTune):
    """Learning without forgetting: answers like the model before the task, on the task's own inputs (Li and Hoiem 2016).

    The loss gains strength * sum over tasks of the cross-entropy from softmax(z_old/2) to softmax(z/2), over the outputs that
    competed in each earlier task; where these are nested or the same, as under the masks "seen" and "all", over the last ones.
    The paper's warm-up of a new head by itself is left out.

    Args:
        strength: weight of the earlier answers; 1 in the paper.
    """

    TEMPERATURE = 2.0

    def __init__(self, strength: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength = strength
        self.old: list[Tensor] = []
        self.teacher = copy.deepcopy(self.model)

    def fit(self, experience: Experience) -> None:
        """Train on one task, and remember the model as it is then."""
        super().fit(experience)
        allowed = self._allowed(experience)
        nested = self.training.resolved_mask(experience.scenario) != "task"
        self.old = [allowed] if nested else [o for o in self.old if not torch.equal(o, allowed)] + [allowed]
        self._remember()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of training and the outputs of earlier tasks; between tasks the old model is the model."""
        return super().state_dict() | {"old": self.old}

    def resume(self, state: Mapping[str, Any], past: Sequence[Experience]) -> None:
        """Continue from a `state_dict`; `past` are the tasks learned so far."""
        super().resume(state, past)
        self.old = [allowed.to(self.device) for allowed in state["old"]]
        self._remember()

    def state_bytes(self) -> int:
        """Bytes of the old model."""
        return sum(t.numel() * t.element_size() for t in self.teacher.state_dict().values())

    def _remember(self) -> None:
        self.teacher.load_state_dict(self.model.state_dict())
        self.teacher.eval()

    def _loss(self, x: Tensor, logits: Tensor, y: Tensor, closed: Tensor | None, whole: int) -> Tensor:
        loss = super()._loss(x, logits, y, closed, whole)
        if self.old and self.strength:
            with torch.no_grad():
                before = self.teacher(x) / self.TEMPERATURE
            for allowed in self.old:
                answer = before[:, allowed].softmax(1)
                loss = loss + self.strength * ranks.mean_loss(logits[:, allowed] / self.TEMPERATURE, answer, whole)
        return loss
