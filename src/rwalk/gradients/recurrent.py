"""Gates of recurrent layers, computed again step by step: PyTorch computes all steps at once and shows none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk.gradients.layer_kinds import LayerRows, MeasuredLayer

Recurrent = nn.LSTM | nn.GRU | nn.RNN


def measurable(module: nn.Module) -> bool:
    """Return whether the gates can be computed again: without random numbers between layers, and without projections."""
    if not isinstance(module, Recurrent):
        return False
    return (module.num_layers == 1 or not module.dropout) and not module.proj_size


class Gates:
    """One pass of a recurrent module, whose gates are leaves of a graph of their own.

    Args:
        module: the module.
        x: its input, without gradients.
        start: its first hidden state, and cell state, as the module takes them; None for zeros.
    """

    def __init__(self, module: Any, x: Tensor, start: Any) -> None:
        self.module, self.uses = module, dict[str, tuple[Tensor, list[Tensor], list[Tensor]]]()
        single = x.dim() == 2
        x = x.unsqueeze(0 if module.batch_first else 1) if single else x
        x = x.transpose(0, 1) if module.batch_first else x
        directions = 2 if module.bidirectional else 1
        states = _states(module, start, x, single)
        ends: list[list[Tensor]] = []
        for number in range(module.num_layers):
            found = [self._run(number, d, x, [s[number * directions + d] for s in states]) for d in range(directions)]
            x = torch.cat([outputs for outputs, _ in found], 2)
            ends += [end for _, end in found]
        output = x.transpose(0, 1) if module.batch_first else x
        hidden = [torch.stack([end[i] for end in ends]) for i in range(len(states))]
        self.outputs = [t.squeeze(0 if t is output and module.batch_first else 1) if single else t for t in (output, *hidden)]

    def _run(self, number: int, direction: int, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run one layer in one direction; return its outputs and its last state."""
        suffix = f"l{number}" + "_reverse" * direction
        found = [getattr(self.module, f"{name}_{suffix}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        w_ih, w_hh, b_ih, b_hh = (cast(Tensor, None if w is None else w.detach()) for w in found)
        gates = F.linear(x, w_ih, b_ih).requires_grad_()
        inputs, recurrent, outputs = [], [], []
        for t in reversed(range(len(x))) if direction else range(len(x)):
            inputs.append(state[0].detach())
            recurrent.append(F.linear(state[0], w_hh, b_hh).requires_grad_())
            state = _cell(self.module, gates[t], recurrent[-1], state)
            outputs.append(state[0])
        self.uses[f"weight_ih_{suffix}"] = x, [x.detach()], [gates]
        self.uses[f"weight_hh_{suffix}"] = x, inputs, recurrent
        return torch.stack(outputs[::-1] if direction else outputs), state

    def rows(self, layers: Mapping[str, MeasuredLayer], gradients: Sequence[Tensor | None]) -> Iterator[LayerRows]:
        """Yield what each weight contributes, given the gradients of the module's output and last states."""
        pairs = [(y, g) for y, g in zip(self.outputs, gradients, strict=True) if g is not None and y.requires_grad]
        used = {key: self.uses[key] for key in layers}
        leaves = [t for _, _, gates in used.values() for t in gates]
        found = torch.autograd.grad([y for y, _ in pairs], leaves, [g.to(y.dtype) for y, g in pairs], allow_unused=True)
        deltas = iter([torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)])
        for key, (_, inputs, gates) in used.items():
            x, d = torch.cat(inputs), torch.cat([next(deltas) for _ in gates])
            yield LayerRows(layers[key], x.reshape(1, -1, x.shape[-1]), d.reshape(1, -1, d.shape[-1]))


def _states(module: Any, start: Any, x: Tensor, single: bool) -> list[Tensor]:
    """Return the first states, each (layers * directions, batch, hidden)."""
    count = 2 if isinstance(module, nn.LSTM) else 1
    if start is None:
        shape = module.num_layers * (2 if module.bidirectional else 1), x.shape[1], module.hidden_size
        return [x.new_zeros(shape) for _ in range(count)]
    given = list(start) if count == 2 else [start]
    return [s.detach().unsqueeze(1) if single else s.detach() for s in given]


def _cell(module: Any, from_input: Tensor, from_hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Return the next state of one step."""
    if isinstance(module, nn.GRU):
        r1, z1, n1 = from_input.chunk(3, 1)
        r2, z2, n2 = from_hidden.chunk(3, 1)
        update = torch.sigmoid(z1 + z2)
        new = torch.tanh(n1 + torch.sigmoid(r1 + r2) * n2)
        return [new + update * (state[0] - new)]
    gates = from_input + from_hidden
    if isinstance(module, nn.LSTM):
        i, f, g, o = gates.chunk(4, 1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(cell), cell]
    activation: Callable[[Tensor], Tensor] = torch.tanh if module.nonlinearity == "tanh" else torch.relu
    return [activation(gates)]
