"""The device that a run trains on, and its random numbers."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import rwalk
from rwalk import kernels
from rwalk._errors import printable


def chosen(name: str | torch.device) -> torch.device:
    """Return the device of a name: "cpu", "cuda" or one GPU such as "cuda:1".

    Raises:
        ValueError: if it is of another kind, or absent.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"There is no device `{printable(str(name), '')}`; pass cpu, cuda or one GPU such as cuda:1.")
    if device.type == "cpu":
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        raise ValueError(
            f"Device `{name}` is absent: PyTorch {torch.__version__} sees {count} GPUs. "
            "Pass cpu, or install PyTorch for CUDA and look at nvidia-smi."
        )
    return torch.device("cuda", index)


def about(device: torch.device) -> dict[str, str]:
    """Return the name of a GPU, for a record's versions."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


@contextmanager
def isolated_device(device: torch.device) -> Iterator[None]:
    """Make a device the default, and restore the random state at the end."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if gpu else []), torch.cuda.device(device) if gpu else nullcontext():
        yield


def rng_state(device: torch.device) -> list[Tensor]:
    """Return the random states of the CPU and of a device."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Continue from what `rng_state` has returned for the same kind of device."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a run depends on beside its configuration and seed, by the names of a record's fields."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "rwalk": rwalk.__version__}
    versions |= {"kernels": kernels.current()} | about(device)
    return {"versions": versions, "threads": torch.get_num_threads(), "ranks": 1, "device": device.type}
