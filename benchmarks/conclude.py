"""What the end of a task costs under rules that measure on its data: layer by layer, and parameter by parameter.

    python -m benchmarks.conclude --models mlp,cnn --examples 1000

Random examples, ten classes, in batches of 100, on one thread. The two ways take turns in one process, each on a network of its
own, after a warm-up on one batch. Printed are CPU seconds of `consolidate`, and how much more memory the process held at its
peak than before, by the kernel's account. With `--full N` the second way sees only N examples, and its time is scaled up.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import memory
from rwalk import EWC, MAS, Consolidator
from rwalk.bench.models import GPT, cnn, mlp, resnet
from rwalk.gradients import layerwise

RULES = {**{f"EWC, {labels}": EWC(labels=labels) for labels in ("exact", "sample", "true")}, "MAS": MAS()}


def images(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: mlp((784,), 10), images(784)),
    "cnn": (lambda: cnn((3, 32, 32), 10), images(3, 32, 32)),
    "resnet": (lambda: resnet((3, 32, 32), 10), images(3, 32, 32)),
    "gpt": (lambda: GPT((32,), 10, 1000, False), lambda n: torch.randint(1, 1000, (n, 32))),
}


def once(name: str, rule: EWC | MAS, examples: int, by_layer: bool) -> tuple[float, int]:
    """Return CPU seconds of a task's end, and bytes above what was held before it."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    x, y = inputs(examples), torch.randint(10, (examples,))
    data = list(zip(x.split(100), y.split(100), strict=True))
    consolidator = Consolidator(make(), rule)
    ways = dict(layerwise.ROOTS)
    try:
        if not by_layer:
            layerwise.ROOTS.clear()
        consolidator.estimate([(x[:100], y[:100])])
        memory.RESET.write_text("5")
        before, start = memory.status("VmRSS"), time.process_time()
        consolidator.consolidate(data)
        return time.process_time() - start, memory.status("VmHWM") - before
    finally:
        layerwise.ROOTS.update(ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--full", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = options.full or options.examples
    for name in options.models.split(","):
        for title, rule in RULES.items():
            for _ in range(options.rounds):
                fast, little = once(name, rule, options.examples, by_layer=True)
                slow, much = once(name, rule, full, by_layer=False)
                slow *= options.examples / full
                say = f"{name:8}{title:12} {fast:8.2f} s {little / 2**20:6.0f} MiB  {slow:8.2f} s {much / 2**20:6.0f} MiB"
                Console().print(f"{say}  {slow / fast:6.1f} times", highlight=False)


if __name__ == "__main__":
    main()
