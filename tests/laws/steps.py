"""One step of drawn parameters with what belongs to them, under any backend: what it wrote, to compare with the reference."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from rwalk import kernels
from rwalk.kernels import AfterStep, BeforeStep, Metric, blocked, packs

PATH = ("path", "last")
WINDOW = ("mark", "score", "fisher")
ANCHOR = ("point", "omega")


@contextmanager
def backend(name):
    """Choose a backend; "joined" is what `blocked` does on a GPU, with small batches, on the CPU; "rows" leaves out packs."""
    patches = {
        "joined": mock.patch.object(blocked, "pieces", lambda rows: blocked.batches(rows, 20_000)),
        "rows": mock.MagicMock(),
    }
    alone = mock.patch.object(packs, "SMALL", 0) if name in patches else mock.MagicMock()
    try:
        kernels.use("blocked" if name in patches else name)
        with warnings.catch_warnings(), alone, patches.get(name, mock.MagicMock()):
            warnings.simplefilter("ignore", RuntimeWarning)  # Triton's interpreter works in NumPy, which warns of division by 0
            yield
    finally:
        kernels.use("blocked")


def copies(tensors):
    """Copy with memory order and gaps, so that all work on alike tensors."""
    return [t if t is None else torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).copy_(t) for t in tensors]


@dataclass
class Drawn:
    """Parameters, what belongs to them, and the numbers of a step.

    Args:
        theta, grad: the parameters, and their gradients or None.
        columns: what belongs to them, by name; where there is a path, the gradients are kept.
        squares, second: of per-example gradients and of the optimiser, None for none.
        numbers: of the passes: strength, weight, scale, skip, close, eps, step, correction, adam_eps, share and made.
    """

    theta: list
    grad: list
    columns: dict = field(default_factory=dict)
    squares: list | None = None
    second: list | None = None
    numbers: dict = field(default_factory=dict)

    def copied(self):
        """Return it with tensors of its own."""
        columns = {name: copies(column) for name, column in self.columns.items()}
        several = {
            k: None if getattr(self, k) is None else copies(getattr(self, k)) for k in ("theta", "grad", "squares", "second")
        }
        return replace(self, columns=columns, **several)

    def run(self, name, compare=False):
        """Make a step under a backend; return all tensors after the pass before it and after the pass after it."""
        mine = self.copied()
        with backend(name):
            return mine._run(compare)

    def _run(self, compare):
        n, rows = self.numbers, len(self.theta)
        walks = "path" in self.columns
        if walks:
            self.columns["previous"] = [None if p is None else torch.zeros_like(p) for p in self.columns["path"]]
        layout = kernels.laid_out(None, self.theta, self.columns)
        grad = kernels.StepGradients(self.grad)
        bad = layout.nonfinite(grad)
        weight, squares = n.get("weight"), self.squares
        several = squares, weight, n.get("strength", 0.0), n.get("scale"), n.get("skip"), compare
        moved = layout.before(BeforeStep(grad, *several))
        first = {name: copies(column) for name, column in layout.columns.items()} | {"grad": copies(self.grad)}
        for theta, grad in zip(self.theta, self.grad, strict=True):
            if grad is not None:
                theta.sub_(grad.to(theta.dtype) / 16)
        beyond_eps = torch.zeros((), dtype=torch.int64)
        metric = None
        if "step" in n:
            second = self.second or [None] * rows
            metric = Metric([n["step"]] * rows, second, [n["adam_eps"]] * rows, [n["correction"]] * rows, n.get("made"))
        share = [n["share"]] * rows if "share" in n else None
        path = (squares, weight, n.get("close", False), n.get("eps", 0.0), beyond_eps, n.get("scale"), n.get("skip"))
        layout.after(
            AfterStep(
                [g is not None for g in self.grad],
                metric,
                share,
                *(path if walks else (None,) * 2),
                **({} if walks else {"skip": n.get("skip")}),
            )
        )
        last = dict(layout.columns) | {"theta": self.theta, "grad": self.grad}
        return bad.ne(0).tolist(), moved, first, last, int(beyond_eps)
