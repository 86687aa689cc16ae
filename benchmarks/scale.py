"""What rules hold and move at sizes that are not trained here: counted on a small layer, scaled to networks on the meta device.

    python -m benchmarks.scale

State is counted in the first task and in later ones. Traffic is what an optimiser step of a later task reads and writes beside
the optimiser, a mean over twenty steps: each pass over memory reads its columns once and writes those that change, as the fused
backends do.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwalk import EWC, SI, Consolidator, EWCpp, RWalk, TaskFisher, kernels
from rwalk.rules import Rule

RULES: dict[str, Rule[Any]] = {"RWalk()": RWalk(), "recipe": TaskFisher(), "EWCpp()": EWCpp(), "SI()": SI(), "EWC()": EWC()}
PASSES = [(kernels.Layout, name) for name in ("nonfinite", "before", "after")]
SIZES = {"1 M": (6, 128), "100 M": (8, 1024), "1 B": (20, 2048), "7 B": (35, 4096), "70 B": (87, 8192)}
"""Blocks and width of a transformer without embeddings of about that size."""
SIDE, STEPS, SHARDS = 64, 20, 8


class Touched(TorchDispatchMode):
    """Collects which of some tensors operations read, and which they write to: the first argument of those in place."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.held = {t.data_ptr() for t in held}
        self.read: set[int] = set()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sides = [value if isinstance(value, list | tuple) else [value] for value in args]
        places = [{t.data_ptr() for t in side if isinstance(t, Tensor)} & self.held for side in sides]
        self.read |= set().union(*places)
        if func._schema.name.endswith("_"):
            self.written |= places[0]
        return func(*args, **(kwargs or {}))

    def columns(self) -> int:
        """Count reads and writes."""
        return len(self.read) + len(self.written)


def counted(call: Callable[..., Any], held: Callable[[], list[Tensor]], total: list[int]) -> Callable[..., Any]:
    """Wrap a pass so that what it reads and writes is added to `total`."""

    def wrapped(*args: Any, **options: Any) -> Any:
        with Touched(held()) as touched:
            result = call(*args, **options)
        total.append(touched.columns())
        return result

    return wrapped


def figures(rule: Rule[Any]) -> tuple[float, float, float]:
    """Return state in the first task and later, and the traffic of a step, in units of the parameters' bytes."""
    torch.manual_seed(0)
    model = nn.Linear(SIDE, SIDE, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, rule).attach(optimizer)
    batch = torch.randn(8, SIDE), torch.randint(SIDE, (8,))

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

    def held() -> list[Tensor]:
        return [model.weight.detach(), *([] if model.weight.grad is None else [model.weight.grad]), *memory._memory.tensors()]

    train()
    first = memory.state_bytes
    memory.consolidate([batch])
    total: list[int] = []
    with ExitStack() as stack:
        for module, name in PASSES:
            stack.enter_context(mock.patch.object(module, name, counted(getattr(module, name), held, total)))
        train()
    return first / model.weight.nbytes, memory.state_bytes / model.weight.nbytes, sum(total) / STEPS


def parameters(blocks: int, width: int) -> int:
    """Count the parameters of a transformer on the meta device, where they take no memory."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width)
    return blocks * sum(p.numel() for p in layer.parameters())


def main() -> None:
    """Print the table of rules, and that of sizes."""
    kernels.use("reference")
    found = {name: figures(rule) for name, rule in RULES.items()}
    print("| rule | state, first task | state, later | traffic of a step |\n|---|---|---|---|")
    for name, row in found.items():
        print(f"| `{name}` | " + " | ".join(f"{value:.1f} P" for value in row) + " |")
    print(f"\n| parameters | GiB of P | {' | '.join(f'{name}, GiB' for name in found)} | the same on {SHARDS} shards |")
    print("|---|" + "---|" * (len(found) + 2))
    for size in SIZES.values():
        whole = parameters(*size) * 4 / 2**30
        states = [later * whole for _, later, _ in found.values()]
        each = " / ".join(f"{state / SHARDS:.3g}" for state in states)
        print(f"| {parameters(*size):,} | {whole:.3g} | {' | '.join(f'{state:.3g}' for state in states)} | {each} |")


if __name__ == "__main__":
    main()
