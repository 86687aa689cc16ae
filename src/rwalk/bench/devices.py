"""The device that a run trains on: where its model and data are, and what chance has drawn there."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rwalk._errors import explain


def chosen(name: str | torch.device) -> torch.device:
    """Return the device of a name: "cpu", "cuda" or "cuda:1". Of several ranks on a machine each one gets a GPU, in turn.

    Raises:
        ValueError: if it is another kind, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(explain(f"device `{name}`", "cpu, cuda or a GPU's number such as cuda:1", "Pass such a name."))
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1) if device.index is None else device.index
    if index >= count:
        came = f"device `{name}` on a machine where PyTorch {torch.__version__} sees {count} GPUs"
        raise ValueError(explain(came, "one that is there", 'Pass "cpu", or install PyTorch for CUDA and look at nvidia-smi.'))
    return torch.device("cuda", index)


def about(device: torch.device) -> dict[str, str]:
    """Return the name of a GPU, for a record."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Work on a device by default, and leave chance outside of the block as it was."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if gpu else []), torch.cuda.device(device) if gpu else nullcontext():
        yield


def chance(device: torch.device) -> list[Tensor]:
    """Return where the random numbers of the CPU and of a device stand."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_chance(device: torch.device, states: Sequence[Tensor]) -> None:
    """Go on with random numbers from what `chance` has returned for the same kind of device."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
