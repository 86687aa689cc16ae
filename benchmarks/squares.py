"""What per-example squares cost: the time of a training step that gathers them over that of a plain one.

    python benchmarks/squares.py [--steps 40] [--models mlp,gpt]

Plain and gathering steps alternate in one process, on one thread; medians of CPU time. "squares" gathers only; "walk" is RWalk
in its second task with the Fisher information of the batch, "walk example" that of its examples.
"""

import argparse
import time
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator, RWalk
from rwalk.gradients import Squares


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, dim=2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """A small language model: 7.4 M parameters with 9 blocks of width 256 and 512 tokens."""

    def __init__(self, tokens: int = 512, width: int = 256, blocks: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x)))).transpose(1, 2)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 in its CIFAR form."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    body = [b for i, o, s in stages for b in (Residual(i, o, s), Residual(o, o, 1))]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp(*widths: int) -> nn.Module:
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "mlp": (lambda: mlp(784, 400, 400, 10), lambda: (torch.randn(128, 784), torch.randint(10, (128,))), 1.35),
    "mlp49m": (lambda: mlp(784, 4900, 4900, 4300, 10), lambda: (torch.randn(16, 784), torch.randint(10, (16,))), 1.15),
    "gpt": (GPT, lambda: (torch.randint(512, (8, 128)), torch.randint(512, (8, 128))), 1.45),
    "resnet18": (resnet18, lambda: (torch.randn(32, 3, 32, 32), torch.randint(10, (32,))), 2.0),
}


def variants(build):
    """Build each variant: model, optimiser, and what to call before the optimiser's step."""
    made = {}
    for name in ("plain", "squares", "walk", "walk example"):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        squares = Squares(model, dict(model.named_parameters())) if name == "squares" else None
        memory = None
        if name.startswith("walk"):
            memory = Consolidator(model, RWalk(fisher="example" if "example" in name else "batch"), 0.1).attach(optimizer)
        made[name] = model, optimizer, squares, memory
    return made


def step(model, optimizer, squares, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if squares is not None:
        squares.take()
    optimizer.step()


def measure(name: str, steps: int) -> None:
    build, batch, target = MODELS[name]
    torch.manual_seed(0)
    (x, y), made = batch(), variants(build)
    times = {key: [] for key in made}
    for n in range(steps + 3):
        for key, (model, optimizer, squares, memory) in made.items():
            before = time.process_time()
            step(model, optimizer, squares, x, y)
            times[key].append(time.process_time() - before)
            if n == 2 and memory is not None:
                memory.consolidate()
    middle = {key: median(values[3:]) for key, values in times.items()}
    ratios = "  ".join(f"{key} {middle[key] / middle['plain']:.2f}" for key in list(middle)[1:])
    print(f"{name:9} plain {1e3 * middle['plain']:8.1f} ms   ratio: {ratios}   (squares: target {target})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models.split(","):
        measure(name, options.steps if name == "mlp" else max(options.steps // 4, 5))


if __name__ == "__main__":
    main()
