"""The networks that are timed, from a small perceptron to a transformer, with the batches they train on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk.bench.models import Block, resnet

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network and its batches; both take the cross entropy of `model(x)` and `y` as loss.

    Args:
        about: the network in words.
        build: makes the network.
        batch: makes one random batch.
        rounds: rounds of a full measurement.
        apart: whether variants are measured in pairs with plain training, because all at once would not fit into memory.
    """

    about: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    rounds: int
    apart: bool = False

    def on(self, device: str) -> "Case":
        """Return the same case with network and batches on a device; a GPU has memory for all variants at once."""

        def batch() -> Batch:
            x, y = self.batch()
            return x.to(device), y.to(device)

        return self if device == "cpu" else replace(self, build=lambda: self.build().to(device), batch=batch, apart=False)


class GPT(nn.Module):
    """A small language model: 7.4 M parameters with 9 blocks of width 256 and 512 tokens."""

    def __init__(self, tokens: int = 512, width: int = 256, blocks: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x)))).transpose(1, 2)


class Transformer(nn.Module):
    """An encoder or language model in the shape of a published one, with learned positions.

    Args:
        tokens: the vocabulary; 0 for images, cut into patches of 16 x 16.
        length: the most tokens or patches of an input.
        classes: outputs; 0 for one of the vocabulary at each token, with the embedding's own weights.
        width, blocks, heads: of the blocks.
    """

    def __init__(self, tokens: int, length: int, classes: int, width: int = 768, blocks: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(tokens, width) if tokens else nn.Conv2d(3, width, 16, 16)
        self.images = not tokens
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes or tokens, bias=bool(classes))
        if not classes:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.flatten(2).transpose(1, 2) if self.images else x
        x = self.norm(self.blocks(x + self.positions[: x.shape[1]]))
        return self.head(x).transpose(1, 2) if self.head.bias is None else self.head(x.mean(1))


class Bottleneck(nn.Module):
    """Three convolutions with a short cut (He et al. 2016, arXiv 1512.03385, figure 5)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(before, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        layers = [(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, k, s in sizes]
        self.body = nn.Sequential(*[layer for three in layers for layer in three][:-1])
        fits = before == 4 * width and stride == 1
        self.short = (
            nn.Identity()
            if fits
            else nn.Sequential(nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50() -> nn.Module:
    """ResNet-50 with its 161 tensors."""
    blocks, before = [], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            blocks.append(Bottleneck(before, width, stride if i == 0 else 1))
            before = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def many(count: int) -> nn.Module:
    """As many matrices of 16 x 16, whose step costs what they are many."""
    return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(count)))


def resnet18() -> nn.Module:
    """ResNet-18 in its CIFAR form."""
    return resnet((3, 32, 32), 10, base=64)


def mlp(*widths: int) -> nn.Module:
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def images(size: int, *shape: int) -> Batch:
    return torch.randn(size, *shape), torch.randint(10, (size,))


def text(size: int, length: int, tokens: int = 512) -> Batch:
    return torch.randint(tokens, (size, length)), torch.randint(tokens, (size, length))


def sentences(size: int, length: int) -> Batch:
    return torch.randint(30_522, (size, length)), torch.randint(10, (size,))


CASES = {
    "mlp-b10": Case("MLP 784-400-400-10, batch 10", lambda: mlp(784, 400, 400, 10), lambda: images(10, 784), 40),
    "mlp-b128": Case("MLP 784-400-400-10, batch 128", lambda: mlp(784, 400, 400, 10), lambda: images(128, 784), 20),
    "mlp-49m": Case(
        "MLP 784-4900-4900-4300-10 (49 M), batch 16", lambda: mlp(784, 4900, 4900, 4300, 10), lambda: images(16, 784), 5, True
    ),
    "resnet18": Case("ResNet-18, CIFAR form, batch 32", resnet18, lambda: images(32, 3, 32, 32), 3),
    "gpt": Case("GPT of 7.4 M, 8 x 128 tokens", GPT, lambda: text(8, 128), 3),
    "resnet50": Case(
        "ResNet-50 (25.6 M, 161 tensors), 4 images of 128 x 128", resnet50, lambda: images(4, 3, 128, 128), 2, True
    ),
    "vit-b16": Case(
        "ViT-B/16 (86 M), an image of 224 x 224", lambda: Transformer(0, 196, 1000), lambda: images(1, 3, 224, 224), 2, True
    ),
    "bert-base": Case(
        "BERT-base (109 M), 2 x 128 tokens", lambda: Transformer(30_522, 512, 10), lambda: sentences(2, 128), 2, True
    ),
    "gpt2": Case(
        "GPT-2 small (124 M), 128 tokens", lambda: Transformer(50_257, 1024, 0), lambda: text(1, 128, 50_257), 2, True
    ),
    "many-30": Case("30 matrices of 16 x 16", lambda: many(30), lambda: images(4, 16), 20),
    "many-300": Case("300 matrices of 16 x 16", lambda: many(300), lambda: images(4, 16), 10),
    "many-3000": Case("3,000 matrices of 16 x 16", lambda: many(3000), lambda: images(4, 16), 3),
    "tiny": Case("MLP 8-8-10, batch 4", lambda: mlp(8, 8, 10), lambda: images(4, 8), 5),
}
"""By name; "tiny" is for warming up and for tests, and measured only when asked for."""
