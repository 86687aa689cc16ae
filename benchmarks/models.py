"""The networks that are timed, from a small perceptron to a transformer, with the batches they train on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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


def resnet18() -> nn.Module:
    """ResNet-18 in its CIFAR form."""
    return resnet((3, 32, 32), 10, base=64)


def mlp(*widths: int) -> nn.Module:
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def images(size: int, *shape: int) -> Batch:
    return torch.randn(size, *shape), torch.randint(10, (size,))


def text(size: int, length: int) -> Batch:
    return torch.randint(512, (size, length)), torch.randint(512, (size, length))


CASES = {
    "mlp-b10": Case("MLP 784-400-400-10, batch 10", lambda: mlp(784, 400, 400, 10), lambda: images(10, 784), 40),
    "mlp-b128": Case("MLP 784-400-400-10, batch 128", lambda: mlp(784, 400, 400, 10), lambda: images(128, 784), 20),
    "mlp-49m": Case(
        "MLP 784-4900-4900-4300-10 (49 M), batch 16", lambda: mlp(784, 4900, 4900, 4300, 10), lambda: images(16, 784), 5, True
    ),
    "resnet18": Case("ResNet-18, CIFAR form, batch 32", resnet18, lambda: images(32, 3, 32, 32), 3),
    "gpt": Case("GPT of 7.4 M, 8 x 128 tokens", GPT, lambda: text(8, 128), 3),
    "tiny": Case("MLP 8-8-10, batch 4", lambda: mlp(8, 8, 10), lambda: images(4, 8), 5),
}
"""By name; "tiny" is for warming up and for tests, and measured only when asked for."""
