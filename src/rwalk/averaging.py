"""Averaging of each task's later iterates, which become both model and anchor when the task ends."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rwalk._errors import explain
from rwalk.gradients import Kept
from rwalk.kernels import After
from rwalk.parallel import Ranks, gathered
from rwalk.parameters import bare, carry, copy

ETA = 3
"""Order of the polynomial average: larger forgets the start of a task sooner (Shamir and Zhang 2013, arXiv 1212.1824)."""


class Tail:
    """A running average of parameters, restarted with each task; needs no knowledge of the task's length.

    After n steps avg <- avg + (eta + 1) / (n + eta) * (theta - avg), so that later iterates weigh more.

    Attributes:
        average: the average of each parameter, by name, in state precision.
        count: how many steps went into it.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def followed(self, theta: Mapping[str, Tensor], lost: Collection[str] = ()) -> "Tail":
        """Return what is known of these parameters, by leading block where they grew, without that of those in `lost`."""
        known = {name: average for name, average in self.average.items() if name not in lost}
        tail = Tail()
        tail.average = {name: carry(known.get(name), now, copy) for name, now in theta.items()}
        tail.count = {name: self.count[name] if name in known else 0 for name in theta}
        return tail

    def averaged(self, rows: Mapping[str, After]) -> dict[str, After]:
        """Count an optimiser step for some parameters, and have their visits take them into the average."""
        for name in rows:
            self.count[name] += 1
        return {
            name: After(*row[:4], self.average[name], *row[5:8], (ETA + 1) / (self.count[name] + ETA), row.made)
            for name, row in rows.items()
        }

    def take_back(self, names: Iterable[str]) -> None:
        """Uncount a step that turned out not to count; its visits wrote nothing."""
        for name in names:
            self.count[name] -= 1

    @contextmanager
    def swapped(self, theta: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Put averages in the place of parameters, for good unless an error comes; yield where the parameters were."""
        raw: dict[str, Tensor] = {}
        try:
            for name in [name for name in theta if self.count.get(name)]:
                raw[name] = theta[name].detach().clone()
                theta[name].detach().copy_(self.average[name])
            yield {**theta, **raw}
        except BaseException:
            for name, value in raw.items():
                theta[name].detach().copy_(value)
            raise

    def restart(self) -> None:
        """Begin a new task."""
        self.count = dict.fromkeys(self.count, 0)


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """List the modules of a model that keep running statistics, but those that its user keeps in eval mode during training."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    return [m for m in norms if m.training or not model.training]


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put the running statistics of a model back if an error comes."""
    kept = [(buffer, buffer.clone()) for norm in batch_norms(model) for buffer in norm.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, value in kept:
            buffer.copy_(value)
        raise


def renew_statistics(model: nn.Module, data: Iterable[Any] | None, forward: Callable[[nn.Module, Any], Any]) -> None:
    """Bring running statistics in line with averaged weights, or warn that they are not; see `refresh_batch_norms`."""
    if not batch_norms(model):
        return
    if data is not None:
        refresh_batch_norms(model, data, forward)
        return
    warnings.warn(
        explain(
            "`consolidate()` without data for a model with BatchNorm under tail averaging",
            "a loader, to recompute the running statistics for the averaged weights",
            'Call `consolidate(loader)`, or build the consolidator with `average="none"`.',
        ),
        stacklevel=4,
    )


@torch.no_grad()
def refresh_batch_norms(model: nn.Module, data: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    """Recompute running statistics over data, as plain means over its batches; modes and momenta are restored.

    Args:
        model: the model with its new weights.
        data: batches; one that is too small for a variance, such as a last batch of one example, is passed over. Where
            several ranks train the model, each passes its own share, and the means are over the batches of all.
        forward: calls the model on a batch.

    Raises:
        ValueError: if there is no batch, or none of more than one example.
    """
    norms, ranks = batch_norms(model), Ranks.of(model)
    for norm in norms:
        norm.reset_running_stats()
    with gathered(model), _only_training(model, norms) as kept, torch.random.fork_rng():
        used = sum(_normalised(bare(model), batch, forward, kept) for batch in data)
    if not _joined(norms, used, ranks):
        raise ValueError(
            explain(
                "no batch of more than one example to recompute the statistics of BatchNorm from",
                "data that can be gone through again, in batches of several examples",
                "Pass a DataLoader with a larger `batch_size`, or a list of batches.",
            )
        )


def _joined(norms: list[_NormBase], used: int, ranks: Ranks) -> int:
    """Average statistics over the batches of all ranks; return how many batches there were."""
    if not ranks.groups:
        return used
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    packed = torch.cat([*(b.double().flatten() for b in buffers), torch.ones_like(buffers[0][:1]).double()])
    *means, count = ranks.sum_(packed.nan_to_num_() * used).split([*(b.numel() for b in buffers), 1])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_((mean / count.clamp(min=1)).view_as(buffer))
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(count.squeeze(0))
    return int(count)


def _normalised(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], kept: Kept) -> bool:
    """Call the model on a batch; return False where the batch is too small for a variance."""
    try:
        kept.call(forward, model, batch)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


@contextmanager
def _only_training(model: nn.Module, norms: list[_NormBase]) -> Iterator[Kept]:
    """Put everything but some norms into eval mode, and let those average without forgetting; all else stays as it is."""
    modes, momenta = [(m, m.training) for m in model.modules()], [n.momentum for n in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
        kept = Kept(bare(model), changing=norms)
        try:
            yield kept
        finally:
            kept.restore(surely=True)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
