"""The optimiser's own step, made inside our visit of memory: SGD, Adam and AdamW as `torch.optim` makes them.

Parameters, gradients and the optimiser's moments then cross the memory bus once for both, and the path is extended by the very
step that is made, so that the gradient of the step before need not be kept. The optimiser keeps its state in its own place and
form; while its `step` runs, the gradients that have been used are set aside, so that it finds nothing to do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rwalk._errors import explain
from rwalk.kernels import Move, Rates
from rwalk.parallel import sharded

ODD = ("amsgrad", "maximize", "nesterov", "differentiable", "capturable", "dampening")
"""Settings of a parameter group under which the step is left to the optimiser."""


def refuse_inside(optimizer: Optimizer, theta: Mapping[str, Tensor], drawn: bool) -> None:
    """Refuse, with a ValueError, an optimiser whose step cannot be made inside the visit.

    Args:
        optimizer: the optimiser.
        theta: the protected parameters by name.
        drawn: whether parameters of which a path is kept move once more after the step.
    """
    odd = sorted({key for group in optimizer.param_groups for key in ODD if group.get(key)})
    coarse = [name for name, p in theta.items() if p.dtype not in (torch.float32, torch.float64)]
    problem = (
        f"a `{type(optimizer).__name__}`" if type(optimizer) not in (SGD, Adam, AdamW)
        else f"`{type(optimizer).__name__}` with {', '.join(odd)}" if odd
        else f"parameters such as `{coarse[0]}` in less than float32" if coarse
        else "parameters on an accelerator or in shards" if any(not p.is_cpu or sharded(p) for p in theta.values())
        else "the proximal pull, whose moves are part of the path but come later" if drawn
        else ""
    )  # fmt: skip
    if problem:
        raise ValueError(
            explain(
                f"`attach(optimizer, inside=True)` with {problem}",
                "SGD, Adam or AdamW on a CPU, in float32 or float64, without such settings, and the gradient pull or a rule "
                "without a path",
                "Leave out `inside=True`: the result is the same.",
            )
        )


class Inside:
    """Makes the steps of one optimiser.

    Args:
        optimizer: the optimiser whose steps are made.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._make = self._descents if isinstance(optimizer, SGD) else self._adams
        self._aside: list[tuple[nn.Parameter, Tensor]] = []

    def moves(self, theta: Sequence[Tensor], grad: Sequence[Tensor | None]) -> list[Move | None]:
        """Return the step of each parameter that has a gradient, and count it in the optimiser's state."""
        moving = {id(p) for p, g in zip(theta, grad, strict=True) if g is not None}
        made: dict[int, Move] = {}
        for group in self.optimizer.param_groups:
            parameters = [p for p in group["params"] if id(p) in moving]
            made |= zip(map(id, parameters), self._make(parameters, group), strict=True)
        return [made.get(id(p)) for p in theta]

    def _descents(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Move]:
        rates = Rates(float(group["lr"]), float(group["momentum"]), decay=float(group["weight_decay"]))
        if not group["momentum"]:
            return [Move(rates)] * len(parameters)
        states = [self.optimizer.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        return [Move(rates, state["momentum_buffer"]) for state in states]

    def _adams(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Move]:
        states = [self.optimizer.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:  # as the optimiser itself would begin
                wide = torch.get_default_dtype() is torch.float64 and not group["fused"]
                state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if states:
            torch._foreach_add_([state["step"] for state in states], 1)
        counts = [state["step"].item() for state in states]
        rates = {count: self._rates(count, group) for count in set(counts)}
        return [Move(rates[n], state["exp_avg"], state["exp_avg_sq"]) for n, state in zip(counts, states, strict=True)]

    def _rates(self, count: float, group: dict[str, Any]) -> Rates:
        """Return the numbers of Adam's step with this count."""
        one, two = (float(beta) for beta in group["betas"])
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        beside = isinstance(self.optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))
        return Rates(
            step=lr / (1 - one**count),
            keep=one,
            fresh=1 - one,
            square=1 - two,
            root=(1 - two**count) ** -0.5,
            eps=float(group["eps"]),
            decay=0.0 if beside else decay,
            shrink=lr * decay if beside else 0.0,
        )

    def set_aside(self, parameters: Sequence[Any], grad: Sequence[Tensor | None]) -> None:
        """Hide gradients that have been used from the optimiser."""
        self._aside = [(p, g) for p, g in zip(parameters, grad, strict=True) if g is not None]
        for parameter, _ in self._aside:
            parameter.grad = None

    def give_back(self) -> None:
        """Put the gradients back where the user left them."""
        for parameter, g in self._aside:
            parameter.grad = g
        self._aside = []
