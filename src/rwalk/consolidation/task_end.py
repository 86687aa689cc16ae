"""The end of a task: what was observed, or is measured on data, becomes the anchor of the next tasks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwalk import gradients
from rwalk._errors import warn
from rwalk.anchors.base import Anchor
from rwalk.anchors.kronecker import held_names
from rwalk.consolidation.batchnorm import renew_statistics
from rwalk.consolidation.ended_weights import ended
from rwalk.consolidation.memory import Memory
from rwalk.consolidation.merged import note_bases
from rwalk.consolidation.moves import Moves
from rwalk.consolidation.repeats import LastEnd, SummedData
from rwalk.distributed import ranks, wrappers
from rwalk.rules.base import Factors, Gradients, Rule, TaskEnd, no_data, no_factors


def end_task(memory: Memory, data: Iterable[Any] | None, loss: Any, logits: Any, estimating: bool = False) -> None:
    """End a task; see `Consolidator.consolidate` for the arguments. If it fails, nothing changes."""
    wrappers.reshard_fsdp(memory.model)
    on_data = estimating or memory.rule.measures == "data"
    if memory.rule.measures == "steps" and not estimating:
        memory.follow_replaced()
    else:
        memory.widen(() if memory.protected.theta else memory.scope.trainable(memory.model))
    theta = memory.theta()
    if memory.moments is None:  # in a copy of a consolidator that was not attached again
        memory.collect_moments(memory.protected, [])
    if data is not None and on_data and not isinstance(data, Iterator):
        data = SummedData(data)
    last = _unmoved_since(memory, theta)
    if last and last.observed:
        return _warn_of_repeat()
    with ended(memory) as raw:
        if memory.tail.known:
            renew_statistics(memory.model, data, gradients.forward)
        anchor, state = _concluded(memory, _task_end(memory, raw, data if on_data else None, loss, logits))
        sums = _sums(memory, data)
        end = _last_end(memory, theta, sums) if on_data else None
        moves, moments = Moves.from_now(theta), memory.next_moments(anchor)
    if last and last.same_data(sums):
        return _warn_of_repeat()
    return memory.end_task(anchor, state, end, moves, moments)


def refuse_data(data: Any, rule: Rule[Any] | None = None, estimating: bool = False) -> None:
    """Refuse data that yields no batches, and missing data under a rule that measures on it."""
    tensors = isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    if tensors or isinstance(data, Tensor | Dataset):
        came = "a tuple of tensors" if tensors else f"a `{type(data).__name__}`"
        raise TypeError(
            f"`data` must yield batches `(inputs, labels)`, but is {came}. Pass a DataLoader, or a list such as `[(x, y)]`."
        )
    needed = rule is not None and (rule.measures == "data" or (estimating and rule.measures != "nothing"))
    if data is None and needed:
        no_data("true", torch.square)


def refuse_estimate(rule: Rule[Any], steps: int) -> None:
    """Refuse to estimate under a rule that measures during training, and in the middle of a task."""
    if not rule.estimates:
        raise RuntimeError(
            f"{type(rule).__name__} measures during training, so it cannot estimate. Protect a pretrained model with EWC() or "
            "MAS() and a loader, or with L2()."
        )
    if steps:
        raise RuntimeError(f"`estimate` was called {steps} steps into a task. Call `consolidate` to end the task.")


def _unmoved_since(memory: Memory, theta: Mapping[str, Tensor]) -> LastEnd | None:
    """Return how the last task ended, if a rule that measures on data would measure on the same weights again."""
    last = memory.last_end
    return last if last and not memory.steps and last.unmoved(theta, memory.protected.shard_group) else None


def _last_end(memory: Memory, theta: Mapping[str, Tensor], sums: list[float]) -> LastEnd:
    """Return what identifies an end at which data was measured on."""
    return LastEnd.of(theta, memory.protected.shard_group, sums, memory.steps > 0)


def _warn_of_repeat() -> None:
    warn(
        "`consolidate()` was called again without any training since the last time. Nothing was changed, so that no task "
        "counts twice. To protect what other data needs too, call `estimate(loader)`."
    )


def _task_end(memory: Memory, raw: Mapping[str, Tensor], data: Any, loss: Any, logits: Any) -> TaskEnd:
    """Return what the rule sees when a task ends; `raw` is where the optimiser left the parameters."""
    theta, parameters = memory.protected.theta, memory.protected.parameters
    measured: Gradients = no_data
    factors: Factors = no_factors
    squares = None
    if data is None and memory.moments is not None:
        moments = memory.moments
        if memory.steps and not moments.examples:
            warn(
                "No step of this task was measured, so nothing of it is held. Attach before the task's first forward pass, or "
                "choose a smaller `m`."
            )
        factors, squares = lambda *_: moments.moments(), moments.means()
    if data is not None and memory.rule.measures != "nothing":
        measured = gradients.per_example_over(memory.model, parameters, data, loss=loss, logits=logits)
        prepared = gradients.moments(memory.model, parameters, data, loss=loss, logits=logits)
        factors = partial(prepared, held=held_names(memory.anchor))
    anchor = memory.anchor.align(theta)
    return TaskEnd(raw, theta, anchor, measured, memory.protected.shard_group, factors, squares)


def _concluded(memory: Memory, end: TaskEnd) -> tuple[Anchor, Any]:
    """Return the anchor and the state after a task, offloaded."""
    state = memory.offload.fetch(memory.rule, memory.state, list(end.point.values()))
    anchor, state = _checked(memory.rule, memory.rule.conclude(state, end), state)
    anchor = replace(note_bases(anchor, memory.model), origin=type(memory.rule).__name__)
    return memory.offload.keep_anchor(anchor), memory.offload.keep(memory.rule, state)


def _checked(rule: Rule[Any], concluded: Any, before: Any) -> tuple[Anchor, Any]:
    """Return what a rule, perhaps the user's own, has concluded, or refuse what would spoil the next steps."""
    name = f"`{type(rule).__name__}.conclude`"
    if not (isinstance(concluded, tuple) and len(concluded) == 2 and isinstance(concluded[0], Anchor)):
        raise TypeError(f"{name} must return an anchor and the state for the next task, but returned {_form(concluded)}.")
    anchor, state = concluded
    if _form(state) != _form(before):
        raise ValueError(f"{name} must return a state like that of `init`, {_form(before)}, but returned {_form(state)}.")
    try:
        anchor.refuse_odd_importance()
    except ValueError as error:
        raise ValueError(f"{name} returned an anchor that cannot be used. {error}") from None
    return anchor, state


def _form(value: Any) -> str:
    """Describe a tuple by how long those of its fields are that are lists."""
    if not isinstance(value, tuple):
        return f"`{type(value).__name__}`"
    fields = [f"a list of {len(field)}" if isinstance(field, list) else "a value" for field in value]
    return f"`{type(value).__name__}` of ({', '.join(fields)})"


def _sums(memory: Memory, data: Any) -> list[float]:
    """Return sums over the data of all ranks, which identify it; none where the data could not be watched."""
    if not isinstance(data, SummedData):
        return []
    device = next(iter(memory.protected.theta.values())).device
    return ranks.Ranks.of(memory.model, warn=False).sums(data.sums, device)
