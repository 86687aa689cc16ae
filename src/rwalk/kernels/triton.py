"""One launch over all parameters on a GPU, compiled by Triton: the formulas of `reference`, fused.

Tensors come in as addresses in a table on the device, so that any number of them takes one launch; a list of chunks says which
program works on which piece of which tensor. Loss scale and the flag of a skipped step are read on the device: the host waits
for nothing. With the environment variable TRITON_INTERPRET=1 the same code runs on the CPU, slowly, for tests.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rwalk.kernels import blocked
from rwalk.kernels.passes import AfterStep, BeforeStep, Column, Metric, Part, StepGradients
from rwalk.kernels.rows import RowByRow
from rwalk.kernels.triton_programs import (
    ADAM_EPS,
    CORRECTION,
    EPS,
    NUMBERS,
    ON,
    PULL,
    SHARE,
    STEP,
    WEIGHT,
    after_step,
    before_step,
    nonfinite,
)

CHUNK = 2**12
"""Elements per program: enough loads in flight for each column, and few enough registers."""
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
KINDS: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
COLUMNS = (
    "theta", "grad", "previous", "last", "fisher", "squares", "point", "omega", "second", "average", "path", "mark", "score",
    "made",
    "on",
)  # fmt: skip


def prepare(
    theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]
) -> tuple[list[Part], list[int]]:
    """Lay out the parameters that one launch can take together: see `passes.Prepare`."""
    groups: dict[Any, list[int]] = {}
    rest = []
    for i in places:
        held = [theta[i], *(t for c in columns.values() if (t := c[i]) is not None)]
        alone = len({t.get_device() for t in held}) == 1 and theta[i].device.type in DEVICES and theta[i].numel()
        if alone and all(t.dtype in KINDS for t in held) and blocked.one_order(held):
            kinds = tuple(None if (t := c[i]) is None else t.dtype for c in columns.values())
            groups.setdefault((theta[i].device, theta[i].dtype, kinds), []).append(i)
        else:
            rest.append(i)
    return [DeviceTable(theta, columns, group) for group in groups.values()], rest


class DeviceTable:
    """Parameters of one device with the same columns, as addresses there.

    Args:
        theta: all parameters.
        columns: what belongs to each, by name.
        places: which of them these are.
    """

    def __init__(self, theta: Sequence[Tensor], columns: dict[str, list[Tensor | None]], places: list[int]) -> None:
        self.places, self._theta, self._columns = places, theta, columns
        mine = [theta[i] for i in places]
        self._device = mine[0].device
        self._kinds: dict[str, torch.dtype] = {}
        self._at = Upload(len(COLUMNS), len(places), torch.int64, self._device)
        self._numbers = Upload(NUMBERS.value, len(places), torch.float64, self._device)
        self._point("theta", mine)
        self._held = {name for name, column in columns.items() if column[places[0]] is not None}
        for name in self._held:
            self._point(name, [columns[name][i] for i in places])
        self._sizes = torch.tensor([t.numel() for t in mine]).to(self._device)
        self._chunks = chunks([t.numel() for t in mine]).to(self._device)
        self._nothing = torch.zeros((), dtype=torch.int64, device=self._device)
        self._seen: dict[str, list[Tensor | None]] = {}

    def nonfinite(self, grad: StepGradients) -> Tensor:
        """Return for each of the places a number that is 0 unless an element of its gradient, or its square, is not finite."""
        bad = torch.zeros(len(self.places), dtype=torch.int64, device=self._device)
        odd = self._find_gradients(grad)
        self._launch(nonfinite, {"grad"}, bad)
        for i, value in zip(odd, self._rows(odd).nonfinite(grad), strict=True):
            bad[self.places.index(i)] = value.to(self._device) != 0
        return bad

    def before(self, step: BeforeStep) -> list[int]:
        """Do what is to be done before the step; return the places of parameters that something else has moved."""
        moved = self._rows(self.places).moved() if step.compare else []
        odd = self._find_gradients(step.grad)
        names = {"theta", "grad"} | (self._held & ({"previous"} if "previous" in self._held else {"fisher"}))
        names |= self._held & {"point", "omega"} if step.strength else set()
        names |= {"squares"} if "fisher" in names and self._find("squares", step.squares) else set()
        self._numbers.write(WEIGHT.value, self._mine(step.weight))
        self._numbers.write(PULL.value, [2 * step.strength] * len(self.places))
        numbers = (self._numbers.there(), self._flag(step.scale), self._flag(step.skip))
        self._launch(before_step, names, *numbers, SCALED=step.scale is not None, SKIPS=step.skip is not None)
        if odd:
            self._rows(odd).before(step._replace(compare=False))
        return moved

    def after(self, step: AfterStep) -> None:
        """Do what is to be done after the step."""
        metric, walks = step.metric, "path" in self._held
        names = {"theta"} | (self._held & {"average"} if step.share is not None else set())
        if metric is not None:
            names |= self._held & {"point", "omega"}
            if not self._sees(metric):
                self._rows(self.places).after(step)
                return
            names |= {name for name in ("second", "made") if any(t is not None for t in self._seen[name])}
        if walks:
            names |= self._held & {"previous", "path", "last", "fisher", *(("mark", "score") if step.close else ())}
            names |= {"squares"} if self._find("squares", step.squares) else set()
        self._at.write(ON.value, [int(moved) for moved in self._mine(step.moved)])
        self._write_numbers(step)
        count = self._nothing if step.beyond_eps is None else step.beyond_eps
        rest = (self._numbers.there(), self._flag(step.scale), self._flag(step.skip), count)
        flags = {"CLOSE": walks and step.close, "SCALED": step.scale is not None, "SKIPS": step.skip is not None}
        self._launch(after_step, names, *rest, **flags)

    def _write_numbers(self, step: AfterStep) -> None:
        """Have the numbers of each parameter ready."""
        self._numbers.write(WEIGHT.value, self._mine(step.weight))
        self._numbers.write(SHARE.value, self._mine(step.share))
        self._numbers.write(EPS.value, [step.eps] * len(self.places))
        if step.metric is not None:
            for row, values in zip(
                (STEP, CORRECTION, ADAM_EPS), (step.metric.step, step.metric.correction, step.metric.eps), strict=True
            ):
                self._numbers.write(row.value, self._mine(values))

    def _mine(self, values: Sequence[Any] | None) -> list[Any]:
        return [0.0] * len(self.places) if values is None else [values[i] for i in self.places]

    def _rows(self, places: list[int]) -> RowByRow:
        """Return some parameters as rows, for what one launch does not take."""
        return RowByRow(self._theta, self._columns, places, blocked.pieces)

    def _find_gradients(self, grad: StepGradients) -> list[int]:
        """Write down where gradients lie; return the places of those in another order or precision, which are left out."""
        odd = [i for i in self.places if (g := grad[i]) is not None and not self._fits(i, g, self._theta[i].dtype)]
        self._point("grad", [None if i in odd else grad[i] for i in self.places])
        self._kinds["grad"] = self._kinds["theta"]
        return odd

    def _find(self, name: str, tensors: Column | None) -> bool:
        """Write down where tensors lie, in the order of the parameters; return whether there are any."""
        mine = [None if tensors is None or (t := tensors[i]) is None else self._ordered(i, t) for i in self.places]
        self._seen[name] = mine  # which keeps copies alive
        self._point(name, mine)
        return any(t is not None for t in mine)

    def _sees(self, metric: Metric) -> bool:
        """Write down where second moments and counts of steps lie; return False for such as one launch does not take."""
        second = self._mine(metric.second)
        kinds = {None if s is None else s.dtype for s in second}
        if len(kinds) > 1 or not all(s is None or s.device == self._device for s in second) or not kinds <= {None, *KINDS}:
            return False
        made = self._mine(metric.made) if metric.made is not None else [None] * len(second)
        if len({None if m is None else m.dtype for m in made}) > 1:
            return False
        if not all(m is None or (m.device == self._device and m.dtype is torch.float32) for m in made):
            return False
        self._find("second", metric.second)
        self._seen["made"] = made
        self._point("made", made)
        return True

    def _fits(self, i: int, tensor: Tensor, dtype: torch.dtype) -> bool:
        return tensor.dtype is dtype and tensor.device == self._device and blocked.one_order([self._theta[i], tensor])

    def _ordered(self, i: int, tensor: Tensor) -> Tensor:
        """Return a tensor in the memory order of a parameter, a copy where it is in another one."""
        if blocked.one_order([self._theta[i], tensor]):
            return tensor
        return torch.empty_like(self._theta[i], dtype=tensor.dtype).copy_(tensor)

    def _point(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Enter the addresses of a column's tensors, 0 where there is none, and their type."""
        self._at.write(COLUMNS.index(name), [0 if t is None else t.data_ptr() for t in tensors])
        self._kinds[name] = next((t.dtype for t in tensors if t is not None), torch.float32)

    def _flag(self, flag: Tensor | None) -> Tensor:
        return self._nothing if flag is None else flag.to(self._device)

    def _launch(self, kernel: Any, names: set[str], *rest: Any, **flags: Any) -> None:
        """Start one program for each chunk of the parameters, with the columns of these names."""
        kinds = tuple([KINDS[self._kinds[name]] if name in names else None for name in COLUMNS])
        options = {"num_warps": 8, "enable_fp_fusion": True}
        table = self._at.there()
        state = tl.float64 if self._kinds["theta"] is torch.float64 else tl.float32
        arguments = (table, self._chunks, self._sizes, len(self.places), *rest)
        with torch.cuda.device_of(table):  # Triton starts programs on the device that is the current one
            kernel[(len(self._chunks),)](*arguments, KINDS=kinds, STATE=state, CHUNK_LENGTH=CHUNK, **flags, **options)


class Upload:
    """A table of numbers on a device, which is sent again when something in it has changed.

    Args:
        rows, columns: its size.
        dtype: of its numbers.
        device: where it goes.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows: list[list[Any]] = [[0] * columns for _ in range(rows)]
        self._dtype, self._device = dtype, device
        self._there: Tensor | None = None

    def write(self, row: int, values: list[Any]) -> None:
        """Set a row."""
        if self._rows[row] != values:
            self._rows[row], self._there = values, None

    def there(self) -> Tensor:
        """Return the table on the device; nothing waits for it to come."""
        if self._there is None:
            cuda = self._device.type == "cuda"
            made = torch.tensor(self._rows, dtype=self._dtype, device="cpu", pin_memory=cuda)
            self._there = made.to(self._device, non_blocking=cuda)
        return self._there


def chunks(sizes: list[int]) -> Tensor:
    """List the chunks of tensors of some sizes: pairs of a tensor's place and a chunk's number in it."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes], device="cpu")
    place = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([place, torch.arange(len(place), device="cpu") - first], 1).to(torch.int32)
