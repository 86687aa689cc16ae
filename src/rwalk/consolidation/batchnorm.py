"""Running statistics of BatchNorm, recomputed for averaged weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rwalk._errors import warn
from rwalk._parameters import bare
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.wrappers import full_parameters
from rwalk.gradients import ModelSnapshot

UNLIKE = 4.0
"""Where half of a norm's variances are this many times larger or smaller than in training, its inputs are others."""
BEGINNING = 1e-4
"""Running statistics have settled once less than this share of them is what they began with."""
TINY = 1e-12
"""A channel with a smaller variance is dead."""

_resting: WeakSet[nn.Module] = WeakSet()
"""Modules that were in eval mode in the first step of the last task."""


def note_modes(model: nn.Module) -> None:
    """Note which norms rest during training: after it a model is often in eval mode as a whole."""
    for norm in _norms(model):
        (_resting.discard if norm.training else _resting.add)(norm)


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """List the modules of a model that keep running statistics, but those that its user keeps in eval mode during training."""
    return [m for m in _norms(model) if m.training or not (model.training or m in _resting)]


def _norms(model: nn.Module) -> list[_NormBase]:
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """List the running statistics of these modules, and their counts of batches."""
    return [buffer for norm in batch_norms(model) for buffer in norm.buffers(recurse=False)]


def renew_statistics(
    model: nn.Module, data: Iterable[Any] | None, forward: Callable[[nn.Module, Any], Any], near: bool = True
) -> None:
    """Bring running statistics in line with new weights, or warn that they are not; see `refresh_batch_norms`.

    Where the weights are `near` those of training, statistics tell inputs that are not like those of training.
    """
    norms = batch_norms(model)
    if not norms:
        return
    if data is not None:
        settled = [norm for norm in norms if near and _has_settled(norm)]
        known = {norm: norm.running_var.clone() for norm in settled if norm.running_var is not None}
        refresh_batch_norms(model, data, forward)
        _warn_of_other_inputs(known)
        return
    warn(
        "The model has BatchNorm, whose running statistics do not fit the averaged weights. To recompute them, pass "
        "batches of the task: `consolidate(loader)`, `averaged(loader)`, or `data=loader` in `blend` and `path`. Or build the "
        'consolidator with `average="none"`.'
    )


def _has_settled(norm: _NormBase) -> bool:
    """Return whether running statistics are of data, and hardly any longer of what they began with."""
    count = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    return count > 0 and (norm.momentum is None or (1 - norm.momentum) ** count < BEGINNING)


def _warn_of_other_inputs(known: Mapping[_NormBase, Tensor]) -> None:
    """Warn where variances differ from those of training as no change of weights makes them differ."""
    for norm, before in known.items():
        ratio = (norm.running_var.double().clamp(min=TINY) / before.double().clamp(min=TINY)).log()  # type: ignore[union-attr]
        if float(ratio.abs().median()) > math.log(UNLIKE):
            warn(
                f"On the data that was passed, what a BatchNorm gets has {float(ratio.median().exp()):.2g} times the variance "
                "that it had in training. Pass batches as the model gets them in training, normalised and cropped alike."
            )
            return


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
    with full_parameters(model), _only_training(model, norms) as kept, torch.random.fork_rng():
        used = sum(_normalised(bare(model), batch, forward, kept) for batch in data)
    if not _joined(norms, used, ranks):
        raise ValueError(
            "No batch has more than one example, so the statistics of BatchNorm cannot be recomputed. Pass a DataLoader with "
            "a larger `batch_size`, or a list of batches that can be read again."
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


def _normalised(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], kept: ModelSnapshot) -> bool:
    """Call the model on a batch; return False where the batch is too small for a variance."""
    try:
        kept.call(forward, model, batch)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


@contextmanager
def _only_training(model: nn.Module, norms: list[_NormBase]) -> Iterator[ModelSnapshot]:
    """Put everything but some norms into eval mode, and let those average without forgetting; all else stays as it is."""
    modes, momenta = [(m, m.training) for m in model.modules()], [n.momentum for n in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
        kept = ModelSnapshot(bare(model), changing=norms)
        try:
            yield kept
        finally:
            kept.restore(all_buffers=True)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
