"""A buffer keeps a few examples of each task and gives them back during later ones."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rwalk._errors import printable
from rwalk._io import states
from rwalk.consolidation.settings import check_choice
from rwalk.consolidation.task_end import refuse_data
from rwalk.replay.features import evaluate
from rwalk.replay.selections import SELECTIONS, Candidates, Selection

Per = Literal["total", "class"]
FORMAT = 1
"""Version of `Buffer.state_dict`."""


class Sample(NamedTuple):
    """Examples, and for each the task that it comes from, shape (examples,), int64."""

    x: Tensor
    y: Tensor
    task: Tensor


class Buffer:
    """A few examples of earlier tasks, in any training loop: `add` at a task's end, `mix` in each step.

    A class is a label of a task: the same label in another task is another class, with examples of its own. Where labels are
    other than one whole number for each example, as in a regression, a task is one class. If all classes share one budget, new
    classes reduce the share of each; the example that was chosen last is dropped first.

    Beside a consolidator, examples that are mixed into a batch belong to the task's loss: its rule sees the gradient of the
    mixed batch's mean loss, and the pull is added to it.

    Args:
        size: how many examples are kept.
        per: "total", all classes share `size`, each one has size // classes examples; or "class", `size` for each class.
        select: which examples: "uniform", "plane" (near the decision boundary), "entropy" (where the model is least sure),
            "herding" (whose mean feature is close to the class's), see `rwalk.replay.selections`; "reservoir", a uniform sample
            of a stream, for which `add` may be called at any time and tasks need not be known; or a function like those.
        seed: seed of the selection and of `sample`.

    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(self, size: int, per: Per = "total", select: str | Selection = "uniform", seed: int = 0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**63:
            raise ValueError(printable(f"size={size!r} is no number of examples; pass a whole number from 1 on, below 2^63."))
        check_choice("per", per, get_args(Per))
        if not callable(select):
            check_choice("select", select, tuple(SELECTIONS))
        self.size, self.per = size, per
        self.select = select if isinstance(select, str) else getattr(select, "__qualname__", type(select).__name__)
        self._selection = SELECTIONS[select] if isinstance(select, str) else select
        self._stream = select == "reservoir"
        self._generator = torch.Generator().manual_seed(seed)
        self._held: Sample | None = None
        self._keys = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._keys)

    def __bool__(self) -> bool:
        """Return True: an empty buffer is one; its length is 0."""
        return True

    def __repr__(self) -> str:
        """Return the settings and the number of examples."""
        return f"Buffer({self.size}, per={self.per!r}, select={self.select!r}): {len(self)} examples of {self.tasks} tasks"

    @property
    def counts(self) -> dict[tuple[int, int], int]:
        """How many examples there are of each class, by task and label."""
        if self._held is None or not _are_classes(self._held.y):
            return {}
        classes, counts = _classes(self._held.task, self._held.y).unique(dim=0, return_counts=True)
        return {(task, label): count for (task, label), count in zip(classes.tolist(), counts.tolist(), strict=True)}

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer holds."""
        return sum(t.numel() * t.element_size() for t in (*(self._held or ()), self._keys))

    @property
    def tasks(self) -> int:
        """Number of tasks so far: one more than the highest task with examples."""
        return 0 if self._held is None else int(self._held.task.max()) + 1

    @torch.inference_mode(False)
    def add(
        self,
        model: nn.Module | None,
        data: Iterable[Any],
        *,
        task: int | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        logits: Callable[..., Tensor] | None = None,
    ) -> None:
        """Keep examples of a task that has been learned; a reservoir also accepts parts of one. On an error nothing changes.

        Args:
            model: the network after the task; None for selections that do not use it (uniform and reservoir).
            data: batches `(inputs, labels)` of tensors, all of the task at once; all of them are held in memory meanwhile.
                Labels are whole numbers of shape (examples,); "uniform" and "reservoir" with per="total" accept any.
            task: number of the task; the next one when None, for a reservoir 0.
            features: called with a batch of inputs, returns their features, shape (examples, d). Otherwise features are the
                input of the linear layer that the model calls last.
            logits: how to read logits of shape (examples, classes) from the model's output.

        Raises:
            ValueError: if the task's classes are there already, are more than the budget has examples, or cannot be told apart
                by the selection; if inputs differ in form from those that are kept.
            TypeError: if the data are no pairs of tensors.
        """
        batches = _pairs(data)
        x, y = (torch.cat(column) for column in zip(*batches, strict=True))
        came = Sample(x, y, torch.full((len(y),), self._next if task is None else task))
        self._refuse(came)
        seen = Candidates(x, y)
        if self._selection is not SELECTIONS["uniform"]:
            seen = Candidates(x, y, *evaluate(model, [x for x, _ in batches], features, logits))
        held = came if self._held is None else _joined(self._held, came)
        groups, limit = self._groups(held)
        generator = self._generator.clone_state()
        keys = torch.cat([self._keys, self._new_keys(seen, groups[len(self) :], limit, generator)])
        rows = _smallest(keys, groups, limit)
        self._held, self._keys = Sample(*(column[rows.to(column.device)] for column in held)), keys[rows]
        self._generator = generator

    @torch.inference_mode(False)
    def sample(self, count: int) -> Sample:
        """Draw examples, all different: `count` of them, or as many as there are.

        Raises:
            ValueError: if the buffer is empty.
        """
        if self._held is None:
            raise ValueError("The buffer is empty; call `add` first.")
        rows = torch.randperm(len(self), generator=self._generator, device="cpu")[:count]
        return Sample(*(column[rows.to(column.device)] for column in self._held))

    @torch.inference_mode(False)
    def mix(self, x: Tensor, y: Tensor, count: int | None = None, *, task: int | None = None) -> Sample:
        """Append examples to a batch, on its device: `count` of them, or as many as the batch has.

        Args:
            x: inputs of the batch.
            y: its labels.
            count: how many examples to append; fewer, or none, come from a buffer that has fewer.
            task: the batch's own task, for models that need to know it; the next one when None.

        Raises:
            ValueError: if the batch differs in form from what is kept.
        """
        batch = Sample(x, y, torch.full((len(y),), self._next if task is None else task, device=y.device))
        if self._held is None:
            return batch
        self._refuse_form(batch)
        drawn = self.sample(len(y) if count is None else count)
        return _joined(batch, drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue: the examples and the state of the random numbers."""
        held = {} if self._held is None else self._held._asdict() | {"key": self._keys}
        about = {"format": FORMAT, "size": self.size, "per": self.per, "select": self.select}
        return about | {"held": held, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a buffer with the same budget and selection; on an error nothing changes.

        Raises:
            ValueError: if the state is of another format, budget or selection, or damaged.
        """
        mine = self.state_dict()
        for name in ("format", "size", "per", "select"):
            theirs = state_dict.get(name)
            if type(theirs) is not type(mine[name]) or theirs != mine[name]:
                came = f"The state is of a buffer of {name} {theirs!r}, this one has {mine[name]!r}"
                raise ValueError(printable(f"{came}. Make the buffer as it was when the state was saved."))
        try:
            held, generator = state_dict["held"], torch.Generator()
            generator.set_state(state_dict["generator"])
            sample = Sample(*(held[name] for name in Sample._fields)) if held else None
            keys = held["key"] if held else self._keys[:0]
            sound = isinstance(held, Mapping) and (sample is None or (len(held) == 4 and self._sound(sample, keys)))
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(_damaged(str(error))) from None
        if not sound:
            raise ValueError(_damaged("columns that do not belong together"))
        self._held, self._keys, self._generator = sample, keys, generator

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all, with a checksum and without pickle."""
        states.save(path, "buffer", self.state_dict())

    @torch.inference_mode(False)
    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote; on an error nothing changes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else, or of another budget or selection.
        """
        self.load_state_dict(states.load(path, "buffer"))

    @property
    def _next(self) -> int:
        return 0 if self._stream else self.tasks

    def _groups(self, held: Sample) -> tuple[Tensor, int]:
        """Return the group of each example, and how many examples each group may keep."""
        if self._stream:
            labels = held.y.cpu() if self.per == "class" else torch.zeros(len(held.y))
            return labels.unique(return_inverse=True)[1], self.size
        classes, groups = _classes(held.task, held.y).unique(dim=0, return_inverse=True)
        limit = self.size if self.per == "class" else self.size // len(classes)
        if not limit:
            full = f"A buffer of {self.size} examples in total has no room for {len(classes)} classes"
            raise ValueError(f'{full}. Make it larger, or per="class".')
        return groups, limit

    def _new_keys(self, seen: Candidates, groups: Tensor, limit: int, generator: torch.Generator) -> Tensor:
        """Return the keys of new examples, from a selection in each group."""
        keys = torch.empty(len(groups), dtype=torch.float64)
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            x, y = (column[rows.to(column.device)] for column in seen[:2])
            phi, out = (None if column is None else column[rows] for column in (seen.features, seen.logits))
            found = self._selection(Candidates(x, y, phi, out, seen.weight), limit, generator)
            if found.shape != rows.shape or found.isnan().any():
                came = "NaN among its keys" if found.shape == rows.shape else f"keys of shape {tuple(found.shape)}"
                needed = "it needs a number for each example; look for NaN in the data and the model"
                raise ValueError(printable(f"The selection `{self.select}` has returned {came}, but {needed}."))
            keys[rows] = found.cpu().double()
        return keys

    def _sound(self, held: Sample, keys: Tensor) -> bool:
        """Return whether columns are as `add` makes them."""
        columns = (*held, keys)
        if not all(isinstance(column, Tensor) and column.dim() and len(column) == len(keys) > 0 for column in columns):
            return False
        one = held.task.dim() == keys.dim() == 1 and (held.task.dtype, keys.dtype) == (torch.int64, torch.float64)
        return one and self._takes(held.y) and bool((held.task >= 0).all()) and not keys.isnan().any()

    def _takes(self, y: Tensor) -> bool:
        """Return whether examples can be kept by these labels: whole numbers, unless classes do not matter."""
        return _are_classes(y) or (self._selection is SELECTIONS["uniform"] and self.per == "total")

    def _refuse(self, came: Sample) -> None:
        """Raise an error for examples that cannot be kept beside the others."""
        if not self._takes(came.y):
            kind = f"labels of shape {tuple(came.y.shape)} and type {came.y.dtype}"
            raise ValueError(
                f'The data have {kind}; only "uniform" and "reservoir" in total keep other than one whole number each.'
            )
        self._refuse_form(came)
        again = [] if self._stream or self._held is None else sorted(_pairs_of(self._held) & _pairs_of(came))
        if again:
            task, label = again[0]
            what = f"label {label} of task {task}" if _are_classes(came.y) else f"task {task}"
            known = f"Examples of {what} are in the buffer already"
            raise ValueError(f'{known}. Pass all of a task\'s data at once and each task once, or use a "reservoir" for parts.')

    def _refuse_form(self, came: Sample) -> None:
        for name, new, old in zip(("inputs", "labels"), came, self._held or (), strict=False):
            if (new.shape[1:], new.dtype) != (old.shape[1:], old.dtype):
                forms = [f"{name} of shape {tuple(t.shape[1:])} and type {t.dtype}" for t in (new, old)]
                raise ValueError(f"The examples have {forms[0]}, those in the buffer {forms[1]}. Convert them to one form.")


def _joined(first: Sample, second: Sample) -> Sample:
    """Append examples to others, on their device."""
    return Sample(*(torch.cat([a, b.to(a.device)]) for a, b in zip(first, second, strict=True)))


def _pairs(data: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of tensors; raise a TypeError that describes anything else."""
    refuse_data(data)
    batches = [tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in data]
    for batch in batches:
        if not (len(batch) == 2 and all(isinstance(part, Tensor) for part in batch) and len(batch[0]) == len(batch[1])):
            came = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in batch)
            raise TypeError(f"A batch of {came} came; batches are pairs of input and label tensors of one length.")
    if not any(len(y) for _, y in batches):
        raise ValueError("The data hold no examples.")
    return [(x.detach(), y) for x, y in batches]


def _are_classes(y: Tensor) -> bool:
    """Return whether labels are one whole number for each example."""
    return y.dim() == 1 and not y.is_floating_point() and not y.is_complex()


def _classes(task: Tensor, y: Tensor) -> Tensor:
    """Return the class of each example as task and label, the label 0 where labels are no classes; (examples, 2)."""
    task = task.cpu()
    return torch.stack([task, y.cpu() if _are_classes(y) else torch.zeros_like(task)], dim=1)


def _pairs_of(sample: Sample) -> set[tuple[int, ...]]:
    return set(map(tuple, _classes(sample.task, sample.y).unique(dim=0).tolist()))


def _smallest(keys: Tensor, groups: Tensor, limit: int) -> Tensor:
    """Return the rows with the `limit` smallest keys of each group, group by group, in the order of their keys."""
    order = keys.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = groups.bincount()
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[groups[order]]
    return order[place < limit]


def _damaged(problem: str) -> str:
    return printable(f"The state of the buffer is damaged ({problem}). Copy it again from where it was saved.")
