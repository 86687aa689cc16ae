"""Steps that are drawn at random: any parameters with any columns, in any memory order and kind, under every backend.

Truth: the formulas of `rwalk.kernels.reference`, one parameter at a time; these are tested against float64 NumPy elsewhere.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import ANCHOR, PATH, WINDOW, Drawn

ULP = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2e-2}
SMALL = [(), (0,), (1,), (5,), (3, 4), (2, 3, 2, 2)]
LARGE = [(40_000,), (300, 257)]


class Maker:
    """Makes the tensors of one parameter: random numbers of one shape, in orders and kinds that are drawn."""

    def __init__(self, draw, shapes):
        self.draw = draw
        self.shape = draw(st.sampled_from(shapes))
        self.dtype = draw(st.sampled_from(list(ULP)))
        self.state = torch.promote_types(self.dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        self.layout = draw(st.permutations(range(len(self.shape))))
        self.odd = draw(st.sampled_from(["", "", "order", "gaps"]))  # one tensor may lie otherwise than the rest

    def order(self, tensor, layout):
        back = sorted(range(len(layout)), key=layout.__getitem__)
        return tensor.permute(layout).contiguous().permute(back) if tensor.dim() else tensor

    def __call__(self, dtype=None, odd=False):
        values = torch.rand(self.shape, dtype=torch.float64, generator=self.generator) * 0.9 + 0.1
        tensor = self.order(values.to(dtype or self.state), self.layout)
        if odd and self.odd == "order":
            return self.order(tensor, self.layout[::-1])
        return tensor.repeat_interleave(2, -1)[..., ::2] if odd and self.odd == "gaps" and tensor.dim() else tensor


@st.composite
def steps(draw, shapes):
    """Draw the parameters and numbers of a step."""
    walks, windows, runs, pulls, averages, squares, second = (draw(st.booleans()) for _ in range(7))
    names = [*(PATH if walks else ()), *(WINDOW if walks and windows else ("fisher",) * runs), *(ANCHOR if pulls else ())]
    names += ["average"] if averages else []
    made = Drawn([], [], {name: [] for name in names}, [] if squares else None, [] if second else None)
    rows, alike = draw(st.integers(1, 5)), draw(st.booleans())
    make = Maker(draw, shapes)
    for _ in range(rows):
        make = make if alike else Maker(draw, shapes)
        odd = draw(st.sampled_from(["theta", "grad", "second", *names]))
        held, takes_part = draw(st.booleans()), draw(st.integers(0, 4)) > 0
        made.theta.append(make(make.dtype, odd == "theta"))
        made.grad.append(make(make.dtype, odd == "grad") if takes_part else None)
        coarse = torch.bfloat16 if draw(st.booleans()) and make.state is torch.float32 else make.state
        for name in names:
            kind = coarse if name == "omega" else make.state
            made.columns[name].append(None if name in ANCHOR and not held else make(kind, odd == name))
        if squares:
            made.squares.append(make() if draw(st.booleans()) else None)
        if second:
            made.second.append(make(make.dtype, odd == "second"))
    scale, skip = draw(st.sampled_from([None, None, 8.0, 3.0])), draw(st.sampled_from([None, None, 0.0, 1.0]))
    weights = st.sampled_from([0.3, 1 / 3, 1.0])
    same = draw(weights)
    made.numbers = {
        "strength": draw(st.sampled_from([0.0, 0.7])),
        "weight": [same if alike else draw(weights) for _ in range(rows)],
        "close": draw(st.booleans()) and windows,
        "eps": draw(st.sampled_from([1e-3, 0.03, 1e9])),
        "scale": None if scale is None else torch.tensor(scale),
        "skip": None if skip is None else torch.tensor(skip),
    }
    if draw(st.booleans()) and pulls:
        made.numbers |= {"step": draw(st.sampled_from([0.3, 1e30])), "correction": 0.7, "adam_eps": 1e-8}
    if averages:
        made.numbers["share"] = draw(st.sampled_from([1.0, 0.2]))
    return made


def close_to(ours, truth, name, kind):
    """Demand equality to rounding in the coarser of a tensor's own kind and the kind that enters it."""
    assert ours.dtype == truth.dtype, name
    ulp = max(ULP[ours.dtype], kind)
    scale = max(1.0, float(truth.double().abs().max())) if truth.numel() else 1.0
    assert torch.allclose(ours.double(), truth.double(), rtol=ulp, atol=ulp * scale), name


def check(name, step):
    bad, moved, *ours, beyond = step.run(name, "last" in step.columns)
    truly_bad, truly_moved, *truth, truly_beyond = step.run("reference", "last" in step.columns)
    assert (bad, moved) == (truly_bad, truly_moved)
    assert abs(beyond - truly_beyond) <= 2  # at the very limit rounding may tell
    for mine, expected in zip(ours, truth, strict=True):
        for column, tensors in expected.items():
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    close_to(mine[column][i], tensor, column, ULP[step.theta[i].dtype])


@pytest.mark.parametrize("name", ["blocked", "rows", "joined", "numba"])
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_drawn_step(name, data):
    if name == "numba":
        pytest.importorskip("numba")
    check(name, data.draw(steps(SMALL + LARGE)))


@settings(max_examples=max(5, settings.default.max_examples // 10))
@given(step=steps(SMALL))
def test_some_drawn_steps_in_tritons_interpreter(step):
    pytest.importorskip("triton")
    check("triton", step)
