"""What training with a rule will cost at a given size: bytes held, bytes moved at each step, and the time that this takes.

Everything follows from three tables, which the tests compare with what the code does: what each formula of
`rwalk.kernels.reference` reads and writes, which formulas each rule uses, and what each optimiser moves. No figure here is
fitted. Nothing here needs PyTorch, unless a model is counted.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal, NamedTuple

from rwalk._errors import explain

Backend = Literal["fused", "blocked"]
BLOCK, BLOCK_SET = 2**15, 2**20
"""Elements of a block of the backend `blocked` on a CPU, and the bytes of its columns, which stay in the cache."""
LARGE = 32 * 2**20
"""Bytes of a tensor whose memory glibc always gives back to the system (its `DEFAULT_MMAP_THRESHOLD_MAX`)."""
STATE = 4
"""The fewest bytes of an element of state; it has those of its parameter where that has more."""


class Formula(NamedTuple):
    """What one formula of `rwalk.kernels.reference` does to each element.

    Args:
        reads: the columns of a visit whose memory it reads, in one string.
        writes: the columns that it writes.
        passes: how many tensors its operations read and write one after another, temporaries too: what moves within the cache
            when PyTorch runs them one by one.
        calls: how many operations there are.
    """

    reads: str
    writes: str
    passes: int
    calls: int


TRACE = Formula("theta grad path mark previous", "path previous", 12, 4)
CLOSE = Formula("theta path mark previous", "path mark previous", 10, 4)
SETTLE = Formula("theta path mark previous fisher score", "path mark previous score", 31, 14)
SQUARE = Formula("grad fisher", "fisher", 5, 2)
PULL = Formula("theta grad point omega", "grad", 7, 2)
DRAW = Formula("theta point omega", "theta", 12, 5)
DRAW_SCALED = Formula("theta point omega second", "theta", 19, 8)
BLEND = Formula("theta average", "average", 5, 2)
FINITE = Formula("grad", "", 1, 1)
REST = Formula("theta path mark previous", "path previous", 9, 3)
LOOK = Formula("theta previous", "", 2, 1)
WAKE = Formula("", "previous", 1, 1)


@dataclass(frozen=True)
class Rule:
    """What a rule holds and does, with its default fields.

    Args:
        state: columns of its state that are as large as the parameters, in one string.
        later: those that join when the first task ends.
        slow: those that `state_device` takes off the accelerator.
        step: the formulas of every step.
        closing: the formula that is added every `window` steps.
        window: steps from one such end of a stretch to the next.
        proximal: whether it pulls after the step, and not by the gradient.
        average: whether the iterates are averaged.
        walks: whether it tells the optimiser's moves from those of others.
    """

    state: str = ""
    later: str = ""
    slow: str = ""
    step: tuple[Formula, ...] = ()
    closing: Formula | None = None
    window: int = 1
    proximal: bool = False
    average: bool = False
    walks: bool = False


_RUNNING = Rule(state="fisher", step=(SQUARE,))
RULES: dict[str, Rule] = {
    "rwalk": Rule(
        state="fisher path score mark previous",
        later="total",
        slow="total",
        step=(TRACE, SQUARE),
        closing=SETTLE,
        window=10,
        walks=True,
    ),
    "ewcpp": _RUNNING,
    "si": Rule(state="path start mark previous", step=(TRACE,), closing=CLOSE, walks=True),
    "ewc": Rule(),
    "online_ewc": Rule(),
    "mas": Rule(),
    "l2": Rule(),
    "recipe": replace(_RUNNING, proximal=True, average=True),
}
"""The rules by the names of their files, and the recommended recipe."""


class Optimizer(NamedTuple):
    """What an optimiser holds, in tensors of the parameters' size, and how many it reads and writes at a step, if fused."""

    holds: int
    moves: int


OPTIMIZERS = {"sgd": Optimizer(0, 3), "momentum": Optimizer(1, 5), "adam": Optimizer(2, 7)}
"""Read are weights, gradient and what the optimiser holds, and all but the gradient is written."""


class Overhead(NamedTuple):
    """Seconds that a step takes however small its tensors are: for itself, and for each tensor."""

    step: float = 0.0
    tensor: float = 0.0


class Machine(NamedTuple):
    """What a device can do.

    Args:
        name: the device in words.
        bandwidth: bytes a second, read or written, by the bytes that are gone through again and again; one figure where caches
            do not matter, else in order of size.
        rate: floating point operations a second.
        utilisation: which share of `rate` training reaches.
        link: bytes a second from the host's memory; None where the device's memory is the host's.
        call: seconds of an operation of PyTorch beside its work.
        fresh: seconds to a byte of memory that the system has to make first; 0 where memory is kept.
        plain: what a plain step takes beside its work.
        ours: what our hooks take beside their work.
    """

    name: str
    bandwidth: tuple[tuple[float, float], ...]
    rate: float
    utilisation: float = 1.0
    link: float | None = None
    call: float = 0.0
    fresh: float = 0.0
    plain: Overhead = Overhead()
    ours: Overhead = Overhead()

    def speed(self, size: float) -> float:
        """Return the bandwidth over `size` bytes; between two known sizes by interpolation over the logarithm of the size."""
        below = [point for point in self.bandwidth if point[0] <= size][-1:] or [self.bandwidth[0]]
        above = [point for point in self.bandwidth if point[0] > size][:1] or [self.bandwidth[-1]]
        (a, low), (b, high) = below[0], above[0]
        return low if a >= b else low + (high - low) * math.log(size / a) / math.log(b / a)


def _device(name: str, gigabytes: float, teraflops: float, link: float | None, utilisation: float = 0.4) -> Machine:
    return Machine(name, ((0.0, 1e9 * gigabytes),), 1e12 * teraflops, utilisation, None if link is None else 1e9 * link)


MACHINES = {
    # NVIDIA's data sheet of the H200 SXM: 4.8 TB/s, 1979 TFLOP/s in bfloat16 with sparsity, half of it without; PCIe 5.0 x16.
    "h200": _device("H200, dense bfloat16", 4800, 989, 64),
    # NVIDIA's data sheet of the A100 80GB SXM: 2039 GB/s, 312 TFLOP/s in bfloat16; PCIe 4.0 x16.
    "a100": _device("A100 80GB, dense bfloat16", 2039, 312, 32),
    # No certain product: two channels of DDR5-5600 (JEDEC), and eight cores of 3.5 GHz with two 256-bit multiply-add units.
    "laptop": _device("laptop, 8 cores, float32", 89.6, 0.896, None),
}
"""Presets. Of the published rates training reaches a part, which is taken as 0.4 unless another one is given."""


class Weights(NamedTuple):
    """The protected parameters: elements by the bytes of each; where known, the tensors, and bytes of large ones."""

    elements: Mapping[int, int]
    tensors: int = 0
    large: int = 0

    @classmethod
    def of(cls, parameters: Iterable[Any]) -> "Weights":
        """Count tensors of PyTorch."""
        tensors = list(parameters)
        widths = sorted({t.element_size() for t in tensors})
        elements = {w: sum(t.numel() for t in tensors if t.element_size() == w) for w in widths}
        return cls(elements, len(tensors), sum(t.nbytes for t in tensors if t.nbytes > LARGE))

    @property
    def number(self) -> int:
        """Return the number of elements."""
        return sum(self.elements.values())

    @property
    def bytes(self) -> int:
        """Return P, their bytes."""
        return sum(width * count for width, count in self.elements.items())

    def shard(self, devices: int) -> "Weights":
        """Return one device's equal part."""
        return self._replace(elements={width: -(-count // devices) for width, count in self.elements.items()})


@dataclass(frozen=True)
class Setup:
    """A training run.

    Args:
        weights: the protected parameters of the whole model.
        rule: one of `RULES`.
        optimizer: one of `OPTIMIZERS`.
        tokens: examples or tokens in a device's batch.
        devices: how many devices there are.
        sharded: whether each holds an equal part of all tensors (FSDP2), and not a copy.
        coarse: whether `state_dtype` is bfloat16.
        off_device: whether `state_device` is "cpu".
        backend: "fused" for `numba` and `triton`, or "blocked".
        flops: operations of a step on a device; None for 6 for each weight and token.
    """

    weights: Weights
    rule: str = "rwalk"
    optimizer: str = "adam"
    tokens: int = 1024
    devices: int = 1
    sharded: bool = False
    coarse: bool = False
    off_device: bool = False
    backend: Backend = "fused"
    flops: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _choice("rule", self.rule, RULES)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("tokens", "devices"):
            value = getattr(self, name)
            if not 1 <= value < 2**62:
                raise ValueError(explain(f"{name} {value}", "a whole number from 1 to 2^62", f"Correct `{name}`."))

    @property
    def part(self) -> Weights:
        """Return the parameters that one device holds and updates."""
        return self.weights.shard(self.devices) if self.sharded else self.weights

    def size(self, columns: Iterable[str]) -> int:
        """Return the bytes of columns on one device; a column that is named twice counts twice."""
        return sum(self._width(column, width) * n for column in columns for width, n in self.part.elements.items())

    def _width(self, column: str, width: int) -> int:
        """Return the bytes of an element of a column, beside a parameter of `width` bytes."""
        if column in ("theta", "grad", "second"):
            return width
        return 2 if self.coarse and column == "omega" else max(STATE, width)


class State(NamedTuple):
    """Bytes that one device holds for us, by part, and those of them that are in the host's memory."""

    rule: int
    anchor: int
    average: int
    host: int

    @property
    def total(self) -> int:
        """Return all of it, as `Consolidator.state_bytes` does."""
        return self.rule + self.anchor + self.average

    @property
    def device(self) -> int:
        """Return what is in the device's own memory."""
        return self.total - self.host


def state(setup: Setup, later: bool = True) -> State:
    """Return what is held in the first task, or in a later one."""
    rule = RULES[setup.rule]
    own = rule.state.split() + (rule.later.split() if later else [])
    anchor = ["point", "omega"] if later else []
    away = [*anchor, *(column for column in own if column in rule.slow.split())] if setup.off_device else []
    average = ["average"] if rule.average else []
    return State(*(setup.size(columns) for columns in (own, anchor, average, away)))


class Traffic(NamedTuple):
    """Bytes that our hooks move at a step on one device, the mean over a window.

    Args:
        check: the look at the gradients, whether all are finite.
        visit: before the optimiser moves.
        after: after it has moved.
        rest: before and after, to tell the optimiser's moves from those of others.
        link: from the host's memory to the device's, where they are written before the visit reads them.
        cached: what moves within the cache besides, where operations run one by one; temporaries are in state precision.
        calls: operations and views of PyTorch for one block.
    """

    check: float
    visit: float
    after: float
    rest: float
    link: float
    cached: float
    calls: float

    @property
    def total(self) -> float:
        """Return what crosses the memory bus if nothing comes over the link."""
        return self.check + self.visit + self.after + self.rest


def visits(setup: Setup, later: bool = True) -> tuple[tuple[Formula, ...], ...]:
    """Return the formulas of a visit before the step, of one that ends a stretch too, and of the visit after the step."""
    rule = RULES[setup.rule]
    usual = (*rule.step, PULL) if later and not rule.proximal else rule.step
    closing = (*usual, rule.closing) if rule.closing else usual
    draw = DRAW_SCALED if setup.optimizer == "adam" else DRAW
    after = ((draw,) if later and rule.proximal else ()) + ((BLEND,) if rule.average else ())
    return usual, closing, after


def traffic(setup: Setup, later: bool = True) -> Traffic:
    """Count what our hooks read and write; what one visit touches several times crosses the bus once."""
    usual, closing, after = visits(setup, later)
    window = RULES[setup.rule].window
    before = [(usual, 1 - 1 / window), (closing, 1 / window)]
    apart = (LOOK, WAKE, REST) if RULES[setup.rule].walks else ()
    every = [*before, (after, 1.0), *(((formula,), 1.0) for formula in apart)]
    return Traffic(
        check=setup.size(FINITE.reads.split()),
        visit=sum(share * setup.size(streams(visit)) for visit, share in before),
        after=setup.size(streams(after)),
        rest=sum(setup.size(streams([formula])) for formula in apart),
        link=setup.size(["point", "omega"]) if later and setup.off_device else 0,
        cached=setup.size(["path"]) * sum(share * sum(f.passes for f in visit) for visit, share in every),
        calls=sum(share * (sum(f.calls for f in visit) + len(set(streams(visit)))) for visit, share in every),
    )


def streams(formulas: Iterable[Formula]) -> list[str]:
    """Name the columns that a visit reads, and once more those that it writes."""
    many = list(formulas)
    return sorted({c for f in many for c in f.reads.split()}) + sorted({c for f in many for c in f.writes.split()})


class Seconds(NamedTuple):
    """The parts of a step in seconds; without us, the last is 0.

    Args:
        compute: forward and backward arithmetic.
        memory: weights read forward and backward, gradients written, and the optimiser.
        overhead: what is there however small the network is.
        ours: our hooks.
    """

    compute: float
    memory: float
    overhead: float
    ours: float = 0.0

    @property
    def total(self) -> float:
        """Return the whole step."""
        return sum(self)


def seconds(setup: Setup, machine: Machine, ours: bool = True, later: bool = True) -> Seconds:
    """Predict a step; the one place of this formula.

    compute  = 6 * weights * tokens / (rate * utilisation), 2 for the forward and 4 for the backward pass
    memory   = (3 * bytes of all weights + what the optimiser moves) / bandwidth; activations are left out
               + bytes of large gradients, which are made anew at every step, * what fresh memory takes, 0 for the presets
    overhead = a step's + a tensor's * tensors, 0 for the presets
    ours     = what our hooks move / bandwidth + their overhead
               + what comes from the host / link, and again / bandwidth, and with "blocked"
               + what moves within the cache / its bandwidth + calls for a block * blocks * a call's

    The bandwidth is that over all bytes which a step goes through, so that a step may be slower with us in its other parts too.
    Communication between devices is left out, as we add nothing to it.
    """
    optimizer, moved = OPTIMIZERS[setup.optimizer], traffic(setup, later)
    speed = machine.speed(touched(setup, ours, later))
    flops = 6 * setup.weights.number * setup.tokens if setup.flops is None else setup.flops
    step = Seconds(
        compute=flops / (machine.rate * machine.utilisation),
        memory=(3 * setup.weights.bytes + optimizer.moves * setup.part.bytes) / speed + setup.weights.large * machine.fresh,
        overhead=machine.plain.step + machine.plain.tensor * setup.weights.tensors,
    )
    if not ours:
        return step
    time = moved.total / speed + machine.ours.step + machine.ours.tensor * setup.weights.tensors
    if machine.link is not None:
        time += moved.link / machine.link + moved.link / speed
    if setup.backend == "blocked":
        time += moved.cached / machine.speed(BLOCK_SET) + moved.calls * setup.part.number / BLOCK * machine.call
    return step._replace(ours=time)


def touched(setup: Setup, ours: bool = True, later: bool = True) -> int:
    """Return the bytes that a step goes through: weights, gradients, what the optimiser holds, and our columns."""
    columns = {"theta", "grad"}
    if ours:
        columns |= {column for visit in visits(setup, later) for column in streams(visit)} - {"second"}
    return setup.size(columns) + OPTIMIZERS[setup.optimizer].holds * setup.part.bytes


UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def weights(model: str, width: int = STATE) -> Weights:
    """Count the parameters of a model.

    Args:
        model: a size such as 350M or 7b, or `package.module:factory`, a function without arguments that makes an `nn.Module`;
            it is called on the meta device, where no memory is taken.
        width: bytes of an element, where a size is given.

    Raises:
        ValueError: if it is neither.
    """
    size = re.fullmatch(r"(\d+\.?\d*)([kmbt]?)", model.strip().lower(), re.ASCII)
    if size and 1 <= float(size[1]) * UNITS[size[2]] < 2**62:
        return Weights({width: round(float(size[1]) * UNITS[size[2]])})
    if size or ":" not in model:
        expected = "a size from 1 to 10^18 such as 350M or 7b, or `package.module:factory`"
        raise ValueError(explain(f"model `{model}`", expected, "Pass one of the two."))
    return _counted(model)


def _counted(path: str) -> Weights:
    """Make a model on the meta device and count its trainable parameters."""
    import torch

    with torch.device("meta"):
        model = made(path, "`package.module:factory`, with a function without arguments that makes an `nn.Module`")
    return Weights.of(p for p in model.parameters() if p.requires_grad)


def made(path: str, expected: str, *arguments: Any) -> Any:
    """Return the `nn.Module` that the function at `package.module:factory` makes.

    Raises:
        ValueError: if there is none, or it makes none; `expected` says what kind of function it should be.
    """
    from torch import nn

    module, _, name = path.partition(":")
    sys.path.insert(0, "")
    try:
        model = getattr(import_module(module), name)(*arguments)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it makes an object of type {type(model).__name__}")
    except Exception as error:
        remedy = "Correct the path; packages are looked for in the current folder too."
        raise ValueError(explain(f"model `{path}` ({type(error).__name__}: {error})", expected, remedy)) from None
    finally:
        sys.path.remove("")
    return model


def machine(
    name: str, bandwidth: float | None = None, compute: float | None = None, utilisation: float | None = None
) -> Machine:
    """Return a preset, with what the user knows better: GB/s, TFLOP/s, and the share of the latter that training reaches.

    Raises:
        ValueError: if there is no such preset, or a figure is not positive and finite.
    """
    _choice("machine", name, MACHINES)
    return adjusted(MACHINES[name], bandwidth, compute, utilisation)


def adjusted(known: Machine, bandwidth: float | None, compute: float | None, utilisation: float | None) -> Machine:
    """Return a machine with figures replaced that are given."""
    check_figures(bandwidth, compute, utilisation)
    if bandwidth is not None:
        known = known._replace(bandwidth=((0.0, 1e9 * bandwidth),))
    if compute is not None:
        known = known._replace(rate=1e12 * compute)
    return known if utilisation is None else known._replace(utilisation=utilisation)


def check_figures(bandwidth: float | None, compute: float | None, utilisation: float | None) -> None:
    """Refuse figures that no machine has."""
    for option, value in (("bandwidth", bandwidth), ("compute", compute), ("utilisation", utilisation)):
        most = 1.0 if option == "utilisation" else 1e9
        if value is not None and not 0 < value <= most:
            raise ValueError(explain(f"{option} {value}", f"a number above 0, up to {most:g}", f"Correct `--{option}`."))


def _choice(what: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        raise ValueError(explain(f"{what} `{given}`", f"one of {', '.join(known)}", f"Correct `{what}`."))
