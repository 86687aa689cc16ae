"""Models for the benchmarks, by name or by import path."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._errors import printable, suggestion
from rwalk.bench.imports import Source, create, path_of
from rwalk.bench.streams import Experience, Kind

Weighted = TypeVar("Weighted", nn.Conv2d, nn.Linear)


def mlp(shape: Sequence[int], outputs: int, hidden: Sequence[int] = (256, 256), tokens: int = 0) -> nn.Module:
    """Build a multi-layer perceptron with ReLU; a text enters as the sum of its words' embeddings, of size 64.

    Args:
        shape: of one example.
        outputs: number of labels.
        hidden: widths of the hidden layers.
        tokens: how many different numbers a text's inputs can be, 0 for other inputs.
    """
    widths = [64 if tokens else math.prod(shape), *hidden]
    layers: list[nn.Module] = [Words(tokens, 64) if tokens else nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class Words(nn.Module):
    """The sum of the embeddings of a text's words, over the root of their number, so that texts of any length have one scale.

    Texts have shape (texts, words), 0 after their end.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (texts, width)."""
        return over_words(self.embed(x), x, 0.5)


def over_words(h: Tensor, x: Tensor, power: float) -> Tensor:
    """Return the sum over each text's words of `h`, (texts, words, width), over a power of their number."""
    is_word = (x != 0).unsqueeze(2)
    return (h * is_word).sum(1) / is_word.sum(1).clamp(min=1).pow(power)


SMALLEST = 10
"""Pixels on a side that `cnn` needs."""


def cnn(shape: Sequence[int], outputs: int) -> nn.Module:
    """Build SI's network for CIFAR: 3 x 3 convolutions of 32, 32, 64 and 64 maps, dense layers of 512 and of the outputs.

    As in Zenke, Poole and Ganguli, "Continual learning through synaptic intelligence" (ICML 2017), and its code; Riemannian
    Walk follows it. Every second convolution has no padding, and pooling over 2 x 2 and dropout of 1/4 behind it; the first
    dense layer has dropout of 1/2. Initial weights are He's; under PyTorch's usual ones so deep a network without
    normalisation spends most of an epoch near its start.

    Args:
        shape: channels, height and width.
        outputs: number of labels.

    Raises:
        ValueError: if images are smaller than 10 x 10 pixels.
    """
    channels, *sides = shape
    _check_size(sides)
    layers: list[nn.Module] = []
    for a, b in ((channels, 32), (32, 64)):
        first, second = rectified(nn.Conv2d(a, b, 3, padding=1)), rectified(nn.Conv2d(b, b, 3))
        layers += [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    height, width = (((side - 2) // 2 - 2) // 2 for side in sides)
    dense = [rectified(nn.Linear(64 * height * width, 512)), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, outputs)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def _check_size(sides: Sequence[int]) -> None:
    if min(sides) < SMALLEST:
        size = " x ".join(map(str, sides))
        raise ValueError(
            f"Model `cnn` needs images of {SMALLEST} x {SMALLEST} pixels or more, not {size}; use `mlp` or `resnet`."
        )


def rectified(layer: Weighted) -> Weighted:
    """Give a layer in front of a ReLU initial weights that keep the size of what passes through, and biases of 0.

    Source: He, Zhang, Ren and Sun, "Delving deep into rectifiers" (ICCV 2015), equation 10.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same size, or half of it."""
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.short(x))


def resnet(shape: Sequence[int], outputs: int, base: int = 20) -> nn.Module:
    """Build ResNet-18 for small images; with 20 maps at its base, and not 64, it is the reduced one of GEM and A-GEM.

    As in Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning" (NeurIPS 2017): a 3 x 3 convolution, four
    stages of two blocks with 1, 2, 4 and 8 times `base` maps, the mean over pixels, one dense layer.

    Args:
        shape: channels, height and width.
        outputs: number of labels.
        base: maps of the first stage.
    """
    stages = [(1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)]
    body = [b for i, o, s in stages for b in (Residual(i * base, o * base, s), Residual(o * base, o * base, 1))]
    stem = [nn.Conv2d(shape[0], base, 3, 1, 1, bias=False), nn.BatchNorm2d(base), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * base, outputs))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (examples, places, width); no place sees a later one."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, dim=2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = self.down(F.gelu(self.up(self.second(x))))
        return x + y


class Reader(nn.Module):
    """Reads words or characters in their order; scores the next character at each place, or the whole text.

    Args:
        outputs: number of labels.
        tokens: how many different numbers the inputs can be.
        each: whether a label belongs to each place.
        width: size of an embedding, and of what is read so far.
    """

    def __init__(self, outputs: int, tokens: int, each: bool, width: int) -> None:
        super().__init__()
        self.each = each
        self.embed = nn.Embedding(tokens, width, padding_idx=None if each else 0)
        self.head = nn.Linear(width, outputs)

    def read(self, x: Tensor) -> Tensor:
        """Return what is read up to each place, (examples, places, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, (examples, outputs, places) if a label belongs to each place, else (examples, outputs)."""
        h = self.read(x)
        scores: Tensor = self.head(h).transpose(1, 2) if self.each else self.head(over_words(h, x, 1))
        return scores


class GPT(Reader):
    """A small transformer: learned places, pre-norm blocks with GELU, in the manner of GPT-2 (Radford et al., 2019).

    By default two blocks of width 64 with 4 heads: about 0.1 M parameters beside those of words or characters.
    """

    def __init__(
        self, shape: Sequence[int], outputs: int, tokens: int, each: bool, width: int = 64, blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__(outputs, tokens, each, width)
        self.places = nn.Embedding(shape[0], width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)

    def read(self, x: Tensor) -> Tensor:
        """Return what is read up to each place."""
        places = torch.arange(x.shape[1]).expand_as(x)  # one row for each example, for per-example gradients
        h: Tensor = self.norm(self.blocks(self.embed(x) + self.places(places)))
        return h


class LSTM(Reader):
    """One layer of long short-term memory, by default of width 64 (Hochreiter and Schmidhuber, 1997).

    It has 0.03 M parameters beside those of words or characters.
    """

    def __init__(self, shape: Sequence[int], outputs: int, tokens: int, each: bool, width: int = 64) -> None:  # noqa: ARG002
        super().__init__(outputs, tokens, each, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def read(self, x: Tensor) -> Tensor:
        """Return what is read up to each place."""
        h: Tensor = self.lstm(self.embed(x))[0]
        return h


class Model(NamedTuple):
    """A model by name: the kinds of inputs that it takes, what builds it for a task, and whether it has BatchNorm."""

    kinds: tuple[Kind, ...]
    build: Callable[[Experience, Sequence[int]], nn.Module]
    about: str
    batchnorm: bool = False


def _reader(kind: type[GPT] | type[LSTM]) -> Callable[[Experience, Sequence[int]], nn.Module]:
    return lambda task, _: kind(task.shape, task.outputs, task.tokens, task.kind == "characters")


MODELS = {
    "mlp": Model(
        ("table", "image", "text"), lambda task, hidden: mlp(task.shape, task.outputs, hidden, task.tokens), mlp.__doc__ or ""
    ),
    "cnn": Model(("image",), lambda task, _: cnn(task.shape, task.outputs), cnn.__doc__ or ""),
    "resnet": Model(("image",), lambda task, _: resnet(task.shape, task.outputs), resnet.__doc__ or "", batchnorm=True),
    "gpt": Model(("text", "characters"), _reader(GPT), GPT.__doc__ or ""),
    "lstm": Model(("text", "characters"), _reader(LSTM), LSTM.__doc__ or ""),
}


def resolve(model: Source, task: Experience) -> str:
    """Return the name of a model; "auto" means cnn for colour images, lstm for characters, mlp otherwise."""
    if not isinstance(model, str):
        return path_of(model)
    if model != "auto":
        return model
    colour = task.kind == "image" and task.shape[0] == 3 and min(task.shape[1:]) >= SMALLEST
    return "cnn" if colour else "lstm" if task.kind == "characters" else "mlp"


NETWORK = (lambda made: isinstance(made, nn.Module)), "an `nn.Module`"


def build(model: Source, task: Experience, hidden: Sequence[int]) -> nn.Module:
    """Make the model for a stream.

    Args:
        model: "auto", a name, `package.module:factory`, or such a class or function itself; see `rwalk.bench.imports`.
        task: the stream's first task.
        hidden: widths of the MLP's hidden layers.

    Raises:
        ValueError: if there is no such model, it does not fit the data, or its scores are not one for each output.
    """
    name = resolve(model, task)
    if ":" in name:
        return _fitting(create(model, task, "Model", NETWORK), name, task)
    return _known(name, task).build(task, hidden)


def check(model: Source, task: Experience) -> bool:
    """Refuse a model that does not fit a task, and return whether it has BatchNorm; only one's own is built for that.

    Raises:
        ValueError: as `build` does.
    """
    name = resolve(model, task)
    if ":" in name:
        return has_batchnorm(build(model, task, ()))
    if name == "cnn":
        _check_size(task.shape[1:])
    return _known(name, task).batchnorm


def _known(name: str, task: Experience) -> Model:
    model = MODELS.get(name)
    if model is None or task.kind not in model.kinds:
        fitting = [known for known, other in MODELS.items() if task.kind in other.kinds]
        raise ValueError(
            f"There is no model `{printable(name, '')}` for inputs of kind {task.kind}.{suggestion(name, fitting)} "
            f"Pass {', '.join(fitting)} or `package.module:factory`."
        )
    return model


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm, which in training needs more than one example at once."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _fitting(model: nn.Module, name: str, task: Experience) -> nn.Module:
    """Return a model that gives one score for each output; else raise a ValueError."""
    x, y = task.test.x[:2], task.test.y[:2]
    expected = (len(x), task.outputs, *(y.shape[1:] if task.kind == "characters" else ()))
    try:
        with torch.no_grad():
            scores = model.eval()(x)
            came = str(tuple(scores.shape))
    except Exception as error:  # a model of one's own may raise anything
        came = f"{type(error).__name__}: {error}"
    model.train()
    if came != str(expected):
        raise ValueError(
            f"Model `{name}` gives {printable(came)} for inputs of shape {tuple(x.shape)}, and has to give scores of shape "
            f"{expected}. Build it from the `shape`, `outputs` and `tokens` that it may ask for."
        )
    if task.outputs > 1 and not y.is_floating_point() and scores.min() > 0 and scores.sum(1).sub(1).abs().max() < 1e-5:
        raise ValueError(
            f"Model `{name}` gives probabilities, and has to give scores before a softmax. Leave its last softmax out."
        )
    return model
