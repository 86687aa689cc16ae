"""Per-example gradients of each kind of layer, from the layer's input and the gradient of its output."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk._parameters import state_dtype
from rwalk.distributed.wrappers import module_class

BLOCK = 2**18
"""Elements of a weight that are summed at a time on a CPU, so that an example's block and that of the sum stay in the cache."""

AT_ONCE = {"cpu": 2**21}
"""Elements of unfolded inputs or of per-example weights in memory at a time, by device: on a CPU few that stay in the cache."""

AT_ONCE_ELSEWHERE = 2**25
"""The same on all other devices, where few large operations are faster."""

Elementwise = Callable[..., Tensor]
"""An elementwise function of a tensor, with an optional `out`."""


class Sum:
    """The sum over examples of a function of their contributions to one parameter's gradient, times the number of examples.

    Every write includes the factor, and the first one overwrites the buffer, so that a step passes over the buffer once. If
    `compared` is set when a step begins, `total` becomes the plain sum of the step's contributions.

    Args:
        name: the parameter's name.
        parameter: the parameter.
        of: the function of contributions: `torch.square`, or `torch.abs`.
    """

    def __init__(self, name: str, parameter: nn.Parameter, of: Elementwise = torch.square) -> None:
        self.name, self.parameter = name, parameter
        self._of = of
        self.examples = 0
        self.compared = False
        self.total: Tensor | None = None
        self._wants_total = False
        self._buffer: Tensor | None = None
        self._keep = 0.0

    def open(self, examples: int) -> None:
        """Begin the contributions of one backward pass; `examples` is the number of all so far, including these."""
        self._wants_total = self._wants_total if self.examples else self.compared
        self._keep = examples / self.examples if self.examples else 0.0
        self.examples = examples

    def take(self, examples: int) -> Tensor:
        """Return the buffer, scaled for `examples` in all; the next write overwrites it."""
        buffer = self.buffer
        if examples != self.examples:
            buffer.mul_(examples / self.examples)
        self.examples = 0
        return buffer

    @property
    def buffer(self) -> Tensor:
        """A contiguous tensor of the parameter's shape in state precision."""
        p = self.parameter
        if self._buffer is None or self._buffer.shape != p.shape or self._buffer.device != p.device:
            self._buffer = torch.empty(p.shape, dtype=state_dtype(p), device=p.device)
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def _rescaled(self, part: Tensor) -> Tensor:
        """Scale a part of the buffer for the examples that are added to it; zero it at the first write."""
        return part.mul_(self._keep) if self._keep else part.zero_()

    def _add_total(self, c: Tensor) -> None:
        """Add to the plain sum of contributions."""
        c = c.reshape(self.buffer.shape)
        self.total = c if self.total is None else self.total + c

    def add(self, c: Tensor) -> None:
        """Add per-example contributions of shape (examples, *parameter)."""
        c = c.to(self.buffer.dtype)
        if self._wants_total:
            self._add_total(c.sum(0))
        self._rescaled(self.buffer).add_(self._of(c).sum(0), alpha=self.examples)
        self._keep = 1.0

    def add_outer(self, g: Tensor, x: Tensor) -> None:
        """Add contributions g_i x_i^T for g of shape (examples, rows) and x of shape (examples, columns)."""
        buffer = self.buffer
        g, x = g.to(buffer.dtype), x.to(buffer.dtype)
        if self._wants_total:
            self._add_total(g.t() @ x)
        g, x = self._of(g), self._of(x)  # the function of a product is the product of its values at the factors
        rows = max(BLOCK // max(x.shape[1], 1), 1) if g.device.type == "cpu" else len(buffer)  # slower as one product
        for part, some in zip(buffer.split(rows), g.t().split(rows), strict=True):
            part.addmm_(some, x, beta=self._keep, alpha=self.examples)
        self._keep = 1.0

    def add_products(self, g: Tensor, x: Tensor) -> None:
        """Add contributions g_i x_i for g, (examples, groups, rows, n), and x, (examples, groups, n, columns)."""
        g, x = g.to(self.buffer.dtype), x.to(self.buffer.dtype)
        if self._wants_total:
            self._add_total(torch.einsum("egrn,egnc->grc", g, x))
        if g.shape[1] == 1 and g.device.type == "cpu":
            self._add_blocks(g[:, 0], x[:, 0])
        else:
            into = self._rescaled(self.buffer).view(g.shape[1], g.shape[2], x.shape[3])
            for a, b in zip(*(t.split(at_once(g.device, into.numel())) for t in (g, x)), strict=True):
                product = torch.matmul(a, b)
                into.add_(self._of(product, out=product).sum(0), alpha=self.examples)
        self._keep = 1.0

    def _add_blocks(self, g: Tensor, x: Tensor) -> None:
        """Add up block by block of rows, so that products and sum stay in the cache."""
        into = self.buffer.view(g.shape[1], x.shape[2])
        rows = min(max(BLOCK // max(x.shape[2], 1), 1), g.shape[1])
        scratch = into.new_empty(rows, x.shape[2])
        pairs = list(zip(g, x, strict=True))
        for start in range(0, g.shape[1], rows):
            part = self._rescaled(into[start : start + rows])
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
        keys, index = torch.unique(example * rows + tokens, return_inverse=True)
        summed = self.buffer.new_zeros(len(keys), self.buffer.shape[1])
        summed.index_add_(0, index.flatten(), g.to(self.buffer.dtype).flatten(0, 1))
        keys = keys % rows
        if padding is not None:
            summed[keys == padding] = 0
        if self._wants_total:
            self._add_total(torch.zeros_like(self.buffer).index_add_(0, keys, summed))
        self._rescaled(self.buffer).index_add_(0, keys, self._of(summed, out=summed), alpha=self.examples)
        self._keep = 1.0


def at_once(device: torch.device, elements: int) -> int:
    """Return how many examples to take at a time, given the elements of one."""
    return max(AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE) // max(elements, 1), 1)


Gather = Callable[[Tensor, Sum | None, Sum | None], None]
"""Takes the gradient of a layer's output and adds each example's contributions to the sums of the layer's weight and bias."""

LayerRule = Callable[[Any, Tensor], Gather]
"""Takes a layer and its input, and returns the function for the gradient of its output."""


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
            count = at_once(g.device, module.in_channels * math.prod(module.kernel_size) * flat.shape[2])
            flat = flat.unflatten(1, (module.groups, -1))
            for a, b in zip(flat.split(count), x.split(count), strict=True):
                weight.add_products(a, patches(module, b))

    return gather


def patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Unfold a convolution's input to (examples, groups, places, inputs of a group * kernel)."""
    x = windows(module, x)
    places = math.prod(x.shape[2 + len(module.kernel_size) :])
    return x.reshape(x.shape[0], module.groups, -1, places).mT


def windows(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Return a view of a convolution's input as (examples, channels, *kernel, *places)."""
    x = F.pad(x, _padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    dims = len(module.kernel_size)
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for i, (size, stride, dilation) in enumerate(settings):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


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
    """Gather for y = weight * x + bias with a normalised x; parameters lie along the trailing dimensions or the second one."""

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


def _running_statistics(module: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Copy the running statistics, which the next forward pass changes; None if the module uses those of its input."""
    if module.training or module.running_mean is None:
        return None, None
    return module.running_mean.clone(), module.running_var.clone()


def _batch_norm(module: Any, x: Tensor) -> Gather:
    mean, var = _running_statistics(module)
    return _normalised(False, lambda: F.batch_norm(x, mean, var, training=mean is None, eps=module.eps))


def _instance_norm(module: Any, x: Tensor) -> Gather:
    mean, var = _running_statistics(module)
    return _normalised(False, lambda: F.instance_norm(x, mean, var, use_input_stats=mean is None, eps=module.eps))


def _embedding(module: nn.Embedding, tokens: Tensor) -> Gather:
    def gather(g: Tensor, weight: Sum | None, _: Sum | None) -> None:
        if weight:
            flat = tokens.reshape(len(tokens), -1)
            weight.add_lookups(g.reshape(*flat.shape, -1), flat, module.padding_idx)

    return gather


LAYER_RULES: dict[type[nn.Module], tuple[LayerRule, tuple[int, ...]]] = {
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
"""The rule of each class of layers, and how many dimensions its input may have; empty if that depends on the layer."""


class Owner(NamedTuple):
    """A module that owns parameters.

    Args:
        path: its name in the model, without compilation.
        module: the module.
        parameters: those of the requested parameters that it owns, by their names in the module.
        problem: why there is no rule for it; None if there is one.
    """

    path: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    problem: str | None


def find_owners(root: nn.Module, theta: Mapping[str, nn.Parameter]) -> Iterator[Owner]:
    """Find the modules that own parameters."""
    ids = {id(p) for p in theta.values()}
    modules = {path.replace("_orig_mod.", ""): module for path, module in root.named_modules()}
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        for p in module._parameters.values():
            paths.setdefault(id(p), []).append(path)
    for path, module in modules.items():
        own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in ids}
        if own:
            yield Owner(path, module, own, _unsupported(module, own) or _tied(own, paths))


def _unsupported(module: nn.Module, own: Mapping[str, nn.Parameter]) -> str | None:
    """Return why a module has no rule, as far as this is known before it runs."""
    if module_class(module) not in LAYER_RULES:
        return f"a `{type(module).__name__}`"
    if any(p.is_complex() for p in own.values()):
        return "its parameters are complex"
    odd = sorted(set(own) - {"weight", "bias"})
    if odd:
        return f"its parameter `{odd[0]}`"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return "an `Embedding` with max_norm, scale_grad_by_freq or sparse"
    return None


def _tied(own: Mapping[str, nn.Parameter], paths: Mapping[int, list[str]]) -> str | None:
    shared = next((paths[id(p)] for p in own.values() if len(paths[id(p)]) > 1), None)
    return None if shared is None else f"it shares a parameter with {', '.join(f'`{name}`' for name in shared)}"
