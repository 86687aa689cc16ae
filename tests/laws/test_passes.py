"""Drawn visits: every backend does what the reference does, whatever is missing, of whatever kind and in whatever order."""

import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwalk import kernels
from rwalk.kernels import PostStepRow, PreStepPass, blocked, reference

COLUMNS = PreStepPass._fields[1:10]
SMALL = [(), (0,), (1,), (7,), (3, 0), (1, 5, 1), (4, 6), (2, 3, 4, 5)]
LARGE = [(blocked.BLOCK + 5,), (200, 181), (5, 3, 41, 67)]
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-19, torch.float64: 2.0**-46}
"""A few units in the last place: backends round intermediate values differently."""


@contextmanager
def backend(name):
    """Choose a backend; "joined" is what `blocked` does on a GPU, with small batches, on the CPU."""
    joined = mock.patch.object(blocked, "_pieces", lambda rows: blocked.batches(rows, 20_000))
    try:
        kernels.use("blocked" if name == "joined" else name)
        with warnings.catch_warnings(), joined if name == "joined" else mock.MagicMock():
            warnings.simplefilter("ignore", RuntimeWarning)  # Triton's interpreter works in NumPy, which warns of division by 0
            yield
    finally:
        kernels.use("blocked")


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

    def __call__(self, dtype=None, low=0.0, odd=False):
        values = torch.rand(self.shape, dtype=torch.float64, generator=self.generator) * (1 - low) + low
        tensor = self.order(values.to(dtype or self.state), self.layout)
        if odd and self.odd == "order":
            return self.order(tensor, self.layout[::-1])
        return tensor.repeat_interleave(2, -1)[..., ::2] if odd and self.odd == "gaps" and tensor.dim() else tensor

    def coarse(self):
        """Draw what fields that may be kept in two bytes are of."""
        return self.draw(st.sampled_from([self.state, torch.bfloat16]))


@st.composite
def visits(draw, shapes):
    rows, absent = draw(st.integers(1, 4)), draw(st.sets(st.sampled_from(COLUMNS)))
    table = {key: [] for key in ("theta", *COLUMNS)}
    for _ in range(rows):
        make, missing = Maker(draw, shapes), draw(st.sets(st.sampled_from(COLUMNS), max_size=3))
        odd = draw(st.sampled_from(["theta", *COLUMNS]))
        for key, column in table.items():
            dtype = make.dtype if key in ("theta", "grad") else make.coarse() if key == "omega" else make.state
            column.append(None if key in missing else make(dtype, odd=key == odd))
    scale, skip = draw(st.sampled_from([None, 1.0, 8.0, 3.0])), draw(st.sampled_from([None, 0.0, 0.0, 1.0]))
    return PreStepPass(
        **{key: None if key in absent else column for key, column in table.items()},
        weight=draw(st.none() | st.lists(st.sampled_from([0.0, 0.3, 1 / 3, 1.0]), min_size=rows, max_size=rows)),
        close=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-3, 0.03, 1e9])),
        strength=draw(st.sampled_from([0.0, 0.7, 2.0])),
        scale=None if scale is None else torch.tensor(scale),
        skip=None if skip is None else torch.tensor(skip),
    )


@st.composite
def afters(draw, shapes):
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        make, missing = Maker(draw, shapes), draw(st.sets(st.sampled_from(PostStepRow._fields[1:5])))
        odd = draw(st.sampled_from(PostStepRow._fields[:5]))
        kinds = {"theta": make.dtype, "omega": make.coarse(), "second": draw(st.sampled_from([make.dtype, make.state]))}
        tensors = {k: None if k in missing else make(kinds.get(k), 0.1, k == odd) for k in PostStepRow._fields[:5]}
        numbers = [draw(st.sampled_from(some)) for some in ([0.0, 0.3, 1e30], [1.0, 0.01], [1e-8, 1e-3], [1.0, 0.2])]
        rows.append(PostStepRow(*tensors.values(), *numbers))
    return rows


def copies(tensors):
    """Copy with memory order and gaps, so that both sides work on alike tensors."""
    return [t if t is None else torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).copy_(t) for t in tensors]


def close_to(ours, truth, name, kind):
    """Demand equality to rounding in the coarser of a tensor's own kind and the kind that enters it."""
    assert ours.dtype == truth.dtype
    ulp = max(ULP[ours.dtype], kind)
    scale = max(1.0, float(truth.double().abs().max())) if truth.numel() else 1.0
    assert torch.allclose(ours.double(), truth.double(), rtol=ulp, atol=ulp * scale), name


def check_visit(name, visit):
    columns = {key: getattr(visit, key) for key in ("theta", *COLUMNS)}
    truth, before = (visit._replace(**{key: column and copies(column) for key, column in columns.items()}) for _ in range(2))
    _, counts = reference.before_step_(truth.rows(), truth)
    with backend(name):
        beyond_eps = kernels.before_step_(visit)
    skipped = visit.skip is not None and bool(visit.skip)  # of which Triton's host does not know
    assert skipped or (beyond_eps is None) == (not counts)
    assert int(beyond_eps or 0) == sum(map(int, counts))
    for key, column in columns.items():
        for i, ours in enumerate(column or []):
            if ours is None:
                continue
            if key in ("theta", "squares", "point", "omega") or skipped:
                assert torch.equal(ours, getattr(before, key)[i]), key
            # without a scale, reference and fused code see one and the same gradient; a sum in float16 rounds where it is made
            half = visit.theta[i].dtype in (torch.float16, torch.bfloat16) and key == "grad"
            close_to(ours, getattr(truth, key)[i], key, ULP[visit.theta[i].dtype] if half else 0.0)


def check_after(name, rows):
    truth = [PostStepRow(*copies(row[:5]), *row[5:]) for row in rows]
    before = [PostStepRow(*copies(row[:5]), *row[5:]) for row in rows]
    reference.after_step_(truth)
    with backend(name):
        kernels.after_step_(rows)
    for row, expected, old in zip(rows, truth, before, strict=True):
        for key in PostStepRow._fields[:5]:
            ours = getattr(row, key)
            if ours is not None and key in ("point", "omega", "second"):
                assert torch.equal(ours, getattr(old, key)), key
            elif ours is not None:
                close_to(ours, getattr(expected, key), key, ULP[row.theta.dtype])


@pytest.mark.parametrize("name", ["blocked", "joined", "numba"])
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_drawn_visit(name, data):
    if name == "numba":
        pytest.importorskip("numba")
    check_visit(name, data.draw(visits(SMALL + LARGE)))
    check_after(name, data.draw(afters(SMALL + LARGE)))


@settings(max_examples=max(5, settings.default.max_examples // 10))
@given(visit=visits(SMALL), rows=afters(SMALL))
def test_some_drawn_visits_in_tritons_interpreter(visit, rows):
    pytest.importorskip("triton")
    check_visit("triton", visit)
    check_after("triton", rows)
