"""What one example adds to the squared gradient of each kind of layer, from the layer's input and its output's gradient."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk.parallel import kind
from rwalk.parameters import state_dtype

BLOCK = 2**18
"""Elements of a weight that are gathered at a time on a CPU: the block of one example and that of the sum stay in the cache."""

HELD = {"cpu": 2**21}
"""Elements of unfolded inputs or per-example weights that are held at a time: few where there is a cache to stay near."""

HELD_ELSEWHERE = 2**25
"""The same on all other devices, where few large operations are faster."""

Of = Callable[..., Tensor]
"""Works elementwise, and may write where `out` says."""


class Sum:
    """The sum of squared contributions to one parameter, times the number of examples.

    The factor N is folded into every write, and a buffer is overwritten rather than cleared, so that a step touches the
    buffer once. If `compared` is set when a step begins, `total` becomes the plain sum of the step's contributions.

    Args:
        name: the parameter's.
        parameter: the parameter.
        of: what is summed of contributions: `torch.square`, or `torch.abs`.
    """

    def __init__(self, name: str, parameter: nn.Parameter, of: Of = torch.square) -> None:
        self.name, self.parameter = name, parameter
        self._of = of
        self.examples = 0
        self.compared = False
        self.total: Tensor | None = None
        self._totals = False
        self._buffer: Tensor | None = None
        self._keep = 0.0

    def open(self, examples: int) -> None:
        """Expect the contributions of one backward pass; `examples` have been seen in all, these included."""
        self._totals = self._totals if self.examples else self.compared
        self._keep = examples / self.examples if self.examples else 0.0
        self.examples = examples

    def take(self, examples: int) -> Tensor:
        """Return the buffer, scaled for `examples` in all, and start anew at the next write."""
        buffer = self.buffer
        if examples != self.examples:
            buffer.mul_(examples / self.examples)
        self.examples = 0
        return buffer

    @property
    def buffer(self) -> Tensor:
        """Contiguous, of the parameter's shape, in state precision."""
        p = self.parameter
        if self._buffer is None or self._buffer.shape != p.shape or self._buffer.device != p.device:
            self._buffer = torch.empty(p.shape, dtype=state_dtype(p), device=p.device)
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def _kept(self, part: Tensor) -> Tensor:
        return part.mul_(self._keep) if self._keep else part.zero_()

    def _add_whole(self, c: Tensor) -> None:
        """Add contributions of examples that are summed already to their plain sum."""
        c = c.reshape(self.buffer.shape)
        self.total = c if self.total is None else self.total + c

    def add(self, c: Tensor) -> None:
        """Add per-example contributions of shape (examples, *parameter)."""
        c = c.to(self.buffer.dtype)
        if self._totals:
            self._add_whole(c.sum(0))
        self._kept(self.buffer).add_(self._of(c).sum(0), alpha=self.examples)
        self._keep = 1.0

    def add_outer(self, g: Tensor, x: Tensor) -> None:
        """Add contributions g_i x_i^T for g of shape (examples, rows) and x of shape (examples, columns)."""
        buffer = self.buffer
        g, x = g.to(buffer.dtype), x.to(buffer.dtype)
        if self._totals:
            self._add_whole(g.t() @ x)
        g, x = self._of(g), self._of(x)  # that of a product is the product of those of its factors
        rows = max(BLOCK // max(x.shape[1], 1), 1) if g.device.type == "cpu" else len(buffer)  # one product of all is slower
        for part, some in zip(buffer.split(rows), g.t().split(rows), strict=True):
            part.addmm_(some, x, beta=self._keep, alpha=self.examples)
        self._keep = 1.0

    def add_products(self, g: Tensor, x: Tensor) -> None:
        """Add contributions g_i x_i for g, (examples, groups, rows, n), and x, (examples, groups, n, columns)."""
        g, x = g.to(self.buffer.dtype), x.to(self.buffer.dtype)
        if self._totals:
            self._add_whole(torch.einsum("egrn,egnc->grc", g, x))
        if g.shape[1] == 1 and g.device.type == "cpu":
            self._add_blocks(g[:, 0], x[:, 0])
        else:
            into = self._kept(self.buffer).view(g.shape[1], g.shape[2], x.shape[3])
            for a, b in zip(*(t.split(_at_once(g.device, into.numel())) for t in (g, x)), strict=True):
                product = torch.matmul(a, b)
                into.add_(self._of(product, out=product).sum(0), alpha=self.examples)
        self._keep = 1.0

    def _add_blocks(self, g: Tensor, x: Tensor) -> None:
        """Go through blocks of rows, so that product and sum of all examples meet in the cache."""
        into = self.buffer.view(g.shape[1], x.shape[2])
        rows = min(max(BLOCK // max(x.shape[2], 1), 1), g.shape[1])
        scratch = into.new_empty(rows, x.shape[2])
        pairs = list(zip(g, x, strict=True))
        for start in range(0, g.shape[1], rows):
            part = self._kept(into[start : start + rows])
            product = scratch[: part.shape[0]]
            for gi, xi in pairs:
                torch.mm(gi[start : start + rows], xi, out=product)
                if self._of is torch.square:
                    part.addcmul_(product, product, value=self.examples)  # one operation
                else:
                    part.add_(self._of(product, out=product), alpha=self.examples)

    def add_lookups(self, g: Tensor, tokens: Tensor, padding: int | None) -> None:
        """Add contributions to the rows `tokens`, (examples, n), of a table, for g of shape (examples, n, columns)."""
        rows = self.buffer.shape[0]
        example = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
        keys, place = torch.unique(example * rows + tokens, return_inverse=True)
        summed = self.buffer.new_zeros(len(keys), self.buffer.shape[1])
        summed.index_add_(0, place.flatten(), g.to(self.buffer.dtype).flatten(0, 1))
        keys = keys % rows
        if padding is not None:
            summed[keys == padding] = 0
        if self._totals:
            self._add_whole(torch.zeros_like(self.buffer).index_add_(0, keys, summed))
        self._kept(self.buffer).index_add_(0, keys, self._of(summed, out=summed), alpha=self.examples)
        self._keep = 1.0


def _at_once(device: torch.device, elements: int) -> int:
    """Return how many examples of so many elements may be held at a time."""
    return max(HELD.get(device.type, HELD_ELSEWHERE) // max(elements, 1), 1)


Gather = Callable[[Tensor, Sum | None, Sum | None], None]
"""Adds what a gradient of a module's output means for the module's weight and bias."""

Rule = Callable[[Any, Tensor], Gather]
"""Keeps of a module and its input what the gradient will be met with."""


def _linear(_: nn.Linear, x: Tensor) -> Gather:
    def gather(g: Tensor, weight: Sum | None, bias: Sum | None) -> None:
        places = math.prod(g.shape[1:-1])
        if bias:
            bias.add(g.flatten(1) if places == 1 else g.reshape(len(g), places, g.shape[-1]).sum(1))
        if weight and places == 1:
            weight.add_outer(g.flatten(1), x.flatten(1))
        elif weight:
            weight.add_products(g.reshape(len(g), 1, places, -1).mT, x.reshape(len(x), 1, places, -1))

    return gather


def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Gather:
    def gather(g: Tensor, weight: Sum | None, bias: Sum | None) -> None:
        flat = g.flatten(2)
        if bias:
            bias.add(flat.sum(2))
        if weight:
            count = _at_once(g.device, module.in_channels * math.prod(module.kernel_size) * flat.shape[2])
            flat = flat.unflatten(1, (module.groups, -1))
            for a, b in zip(flat.split(count), x.split(count), strict=True):
                weight.add_products(a, _patches(module, b))

    return gather


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Unfold a convolution's input to (examples, groups, places, inputs of a group * kernel)."""
    x = F.pad(x, _padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    dims = len(module.kernel_size)
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for i, (size, stride, dilation) in enumerate(settings):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.reshape(x.shape[0], module.groups, -1, math.prod(x.shape[-dims:])).mT


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return a convolution's padding in the order of `F.pad`: both sides of the last dimension first."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if isinstance(module.padding, str):
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(n // 2, n - n // 2) for n in whole]
    else:
        sides = [(n, n) for n in module.padding]
    return [n for pair in reversed(sides) for n in pair]


def _normalised(trailing: bool, x: Callable[[], Tensor]) -> Gather:
    """Gather for y = weight * x + bias with a normalised x; the parameters run along the trailing dimensions, or along 1."""

    def gather(g: Tensor, weight: Sum | None, bias: Sum | None) -> None:
        def add(to: Sum, c: Tensor) -> None:
            shape = to.parameter.shape
            to.add(c.reshape(len(c), -1, *shape).sum(1) if trailing else c.reshape(len(c), *shape, -1).sum(2))

        if weight:
            add(weight, g * x())
        if bias:
            add(bias, g)

    return gather


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Gather:
    return _normalised(True, lambda: F.layer_norm(x, module.normalized_shape, eps=module.eps))


def _rms_norm(module: nn.RMSNorm, x: Tensor) -> Gather:
    return _normalised(True, lambda: F.rms_norm(x, list(module.normalized_shape), eps=module.eps))


def _group_norm(module: nn.GroupNorm, x: Tensor) -> Gather:
    return _normalised(False, lambda: F.group_norm(x, module.num_groups, eps=module.eps))


def _running(module: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Copy the statistics that a module normalises with, if not those of its input: they move at the next forward pass."""
    if module.training or module.running_mean is None:
        return None, None
    return module.running_mean.clone(), module.running_var.clone()


def _batch_norm(module: Any, x: Tensor) -> Gather:
    mean, var = _running(module)
    return _normalised(False, lambda: F.batch_norm(x, mean, var, training=mean is None, eps=module.eps))


def _instance_norm(module: Any, x: Tensor) -> Gather:
    mean, var = _running(module)
    return _normalised(False, lambda: F.instance_norm(x, mean, var, use_input_stats=mean is None, eps=module.eps))


def _embedding(module: nn.Embedding, tokens: Tensor) -> Gather:
    def gather(g: Tensor, weight: Sum | None, _: Sum | None) -> None:
        if weight:
            flat = tokens.reshape(len(tokens), -1)
            weight.add_lookups(g.reshape(*flat.shape, -1), flat, module.padding_idx)

    return gather


RULES: dict[type[nn.Module], tuple[Rule, tuple[int, ...]]] = {
    nn.Linear: (_linear, ()),
    nn.Conv1d: (_conv, (3,)),
    nn.Conv2d: (_conv, (4,)),
    nn.Conv3d: (_conv, (5,)),
    nn.LayerNorm: (_layer_norm, ()),
    nn.RMSNorm: (_rms_norm, ()),
    nn.GroupNorm: (_group_norm, ()),
    nn.BatchNorm1d: (_batch_norm, (2, 3)),
    nn.BatchNorm2d: (_batch_norm, (4,)),
    nn.BatchNorm3d: (_batch_norm, (5,)),
    nn.InstanceNorm1d: (_instance_norm, (3,)),
    nn.InstanceNorm2d: (_instance_norm, (4,)),
    nn.InstanceNorm3d: (_instance_norm, (5,)),
    nn.Embedding: (_embedding, ()),
}
"""How each kind of module is gathered, and how many dimensions its input may have, if that depends on the kind alone."""


class Found(NamedTuple):
    """A module that has parameters of those looked for, by their names in it, and why it cannot be gathered, if so."""

    path: str
    module: nn.Module
    mine: dict[str, nn.Parameter]
    why: str | None


def survey(root: nn.Module, theta: Mapping[str, nn.Parameter]) -> Iterator[Found]:
    """Look for the modules that parameters belong to; paths are those without compilation."""
    ids = {id(p) for p in theta.values()}
    paths = {path.replace("_orig_mod.", ""): module for path, module in root.named_modules()}
    owners: dict[int, list[str]] = {}
    for path, module in paths.items():
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(path)
    for path, module in paths.items():
        mine = {key: p for key, p in module._parameters.items() if p is not None and id(p) in ids}
        if mine:
            yield Found(path, module, mine, _unsupported(module, mine) or _tied(mine, owners))


def _unsupported(module: nn.Module, mine: Mapping[str, nn.Parameter]) -> str | None:
    """Say why a module cannot be gathered, as far as can be told before it runs."""
    if kind(module) not in RULES:
        return f"a `{type(module).__name__}`"
    if any(p.is_complex() for p in mine.values()):
        return "its parameters are complex"
    odd = sorted(set(mine) - {"weight", "bias"})
    if odd:
        return f"its parameter `{odd[0]}`"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return "an `Embedding` with max_norm, scale_grad_by_freq or sparse"
    return None


def _tied(mine: Mapping[str, nn.Parameter], owners: Mapping[int, list[str]]) -> str | None:
    shared = next((owners[id(p)] for p in mine.values() if len(owners[id(p)]) > 1), None)
    return None if shared is None else f"it shares a parameter with {', '.join(f'`{name}`' for name in shared)}"
