"""Memory: each variant trains in a fresh process, and the operating system says how much more it takes than plain training.

`python -m benchmarks.memory MODEL VARIANT SEED` is such a process; it prints its figures in bytes as JSON. Everything is done
once with a tiny network first, so that what packages take for themselves, however large the network, is not counted.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks import child
from benchmarks.models import CASES
from benchmarks.peers import everything
from benchmarks.speed import ROUND
from benchmarks.variants import Variant

TARGETS = {"rwalk-blocked": 9.2, "rwalk-numba": 9.2}
"""What we aim at: highest memory while training above that of plain training, over the bytes of the parameters."""

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux accounts for a process; other systems do not say."""


def measure(name: str, variants: dict[str, Variant], seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the memory of each variant in units of the parameters' bytes, beside plain training of the same loop."""
    figures: dict[str, dict[str, float]] = {}
    for key in variants:
        say(f"memory: {key}")
        figures[key] = child.run("benchmarks.memory", name, key, seed)
    return [row(name, key, variant, figures[key], figures[variant.base]) for key, variant in variants.items()]


def row(name: str, key: str, variant: Variant, own: dict[str, float], base: dict[str, float]) -> dict[str, Any]:
    unit = own["parameters"]
    above = {field: (own[field] - base[field]) / unit for field in ("tensors", "resident", "peak_training", "peak_task_end")}
    about = {"model": name, "variant": key, "about": variant.about, "base": variant.base, "parameter_bytes": unit}
    return about | above | {"state": None if own["state"] is None else own["state"] / unit, "target": TARGETS.get(key)}


def trial(variant: Variant, name: str, seed: int) -> dict[str, Any]:
    """Return what is held in the second task, and the peaks while training in it and at its end, in bytes.

    Writing 5 to `clear_refs` starts the kernel's account of the peak anew.
    """
    variant.start(CASES["tiny"], "adam", seed).steps(2 * ROUND)
    gc.collect()
    before = status("VmRSS")
    loop = variant.make(CASES[name], "adam", seed)
    loop.prepare()
    loop.steps(loop.first)
    loop.conclude()
    RESET.write_text("5")
    loop.steps(2 * ROUND)
    gc.collect()
    held = {"state": loop.state_bytes, "tensors": live(), "resident": status("VmRSS") - before}
    peak = status("VmHWM")
    RESET.write_text("5")
    loop.conclude()
    unit = sum(p.numel() * p.element_size() for p in loop.model.parameters())
    return {"parameters": unit, **held, "peak_training": peak - before, "peak_task_end": status("VmHWM") - before}


def live() -> int:
    """Return the bytes of all tensors that the process holds; those that compilers trace with hold none."""
    storages = [
        t.untyped_storage()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor)
    ]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def status(field: str) -> int:
    """Return a field of the kernel's account of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main(name: str, key: str, seed: str) -> None:
    torch.set_num_threads(1)
    print(json.dumps(trial(everything()[key], name, int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
