"""Every backend against the formulas of the reference, through the seam: all parts of a visit, kinds of tensors and layouts."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from cases import pairwise
from rwalk import kernels
from rwalk.kernels import PostStepRow, PreStepPass, blocked, reference

SHAPES = [(), (0,), (3,), (blocked.BLOCK + 5,), (300, 257), (2, 3, 64, 111)]
PARTS = {"path", "settle", "fisher", "squares", "pull"}
COLUMNS = {
    "path": ("path", "mark", "previous"),
    "settle": ("path", "mark", "previous", "score", "fisher"),
    "fisher": ("fisher",),
    "squares": ("fisher", "squares"),
    "pull": ("point", "omega"),
}
BACKENDS = ["blocked", "joined", "numba", "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture
def backend(request, monkeypatch):
    """Choose a backend; "joined" is what `blocked` does on a GPU, with small batches, on the CPU."""
    if request.param == "joined":
        monkeypatch.setattr(blocked, "_pieces", lambda rows: blocked.batches(rows, 20_000))
        kernels.use("blocked")
    else:
        if request.param in ("numba", "triton"):
            pytest.importorskip(request.param)
        kernels.use(request.param)
    gpu = torch.cuda.is_available() and request.param in ("joined", "triton")
    with warnings.catch_warnings(), torch.device("cuda" if gpu else "cpu"):
        if request.param == "triton":
            warnings.simplefilter("ignore", RuntimeWarning)  # its interpreter works in NumPy, which warns of division by 0
        yield request.param
    kernels.use("blocked")


def dense(tensor, _):
    return tensor


def transposed(tensor, _):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def mixed(tensor, key):
    return transposed(tensor, key) if key == "grad" else tensor


def strided(tensor, _):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2] if tensor.dim() else tensor


def column(key, shapes, dtype, layout=dense):
    low = key in ("theta", "grad") and dtype is torch.bfloat16
    state = dtype if low or dtype is torch.float64 else torch.float32
    return [layout((torch.rand(shape, dtype=torch.float64) + 0.1).to(state), key) for shape in shapes]


def a_pass(shapes, dtype=torch.float32, layout=dense, parts=PARTS, **numbers):
    """Make a visit with random columns; the first parameter gets all parts, later ones miss some."""
    keys = {key for part in parts for key in COLUMNS[part]} | {"theta", "grad"}
    columns = {key: column(key, shapes, dtype, layout) for key in sorted(keys)}
    for key, place in (("grad", 2), ("squares", 1), ("point", 3), ("omega", 3)):
        if key in columns and len(shapes) > place:
            columns[key][place] = None
    settings = {"close": "settle" in parts, "eps": 1e-3, "strength": 2.0, "weight": [0.3] * len(shapes), **numbers}
    return PreStepPass(**columns, **settings)


def copy_of(visit):
    return visit._replace(
        **{
            key: [None if t is None else t.clone() for t in value]
            for key, value in visit._asdict().items()
            if isinstance(value, list) and key != "weight"
        }
    )


def close_to(ours, truth, dtype=torch.float64):
    """Equal to rounding: in units of the last place of the tensor's own kind, or of the less exact `dtype`."""
    assert ours.dtype == truth.dtype
    limit = max({torch.bfloat16: 1e-2, torch.float32: 2e-6, torch.float64: 1e-14}[kind] for kind in (ours.dtype, dtype))
    scale = truth.double().abs().max() if truth.numel() else 1.0
    assert torch.allclose(ours.double(), truth.double(), rtol=limit, atol=float(limit * scale))


def check(visit, truth=None):
    """Demand that the backend in use does to a visit's tensors what the reference does; return both."""
    truth = copy_of(visit) if truth is None else truth
    beyond_eps = kernels.before_step_(visit)
    _, counts = reference.before_step_(truth.rows(), truth)
    assert (beyond_eps is None) == (not counts)
    if counts:
        assert int(beyond_eps) == sum(int(c) for c in counts)
    for key, ours in visit._asdict().items():
        if isinstance(ours, list) and key != "weight":
            for a, b in zip(ours, getattr(truth, key), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    close_to(a, b)
    return visit, truth


@pairwise(["backend"], **{part: [True, False] for part in sorted(PARTS)}, backend=BACKENDS)
def test_combinations_of_parts(backend, fisher, path, pull, settle, squares):
    """Each pair of parts with each backend; `test_visits` draws from all combinations."""
    torch.manual_seed(0)
    wanted = {"fisher": fisher, "path": path, "pull": pull, "settle": settle, "squares": squares}
    check(a_pass([(9, 7), (3,), (4, 2), (40_000,), ()], parts={part for part, there in wanted.items() if there}))


@pairwise(["backend"], shape=SHAPES, backend=BACKENDS, layout=[dense, transposed, mixed, strided], dtype=DTYPES)
def test_every_kind_of_tensor(shape, dtype, layout, backend):
    torch.manual_seed(0)
    check(a_pass([shape], dtype, layout))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_loss_scale_divides_what_is_observed_and_multiplies_what_is_added(strength, backend):
    torch.manual_seed(0)
    plain = a_pass([(5, 6), (7,)], strength=strength)
    scaled = copy_of(plain)
    larger = {"grad": [g * 1024 for g in scaled.grad], "squares": [q if q is None else q * 1024**2 for q in scaled.squares]}
    scaled = scaled._replace(**larger, scale=torch.tensor(1024.0))
    kernels.before_step_(plain)
    kernels.before_step_(scaled)
    for a, b in zip(plain.grad, scaled.grad, strict=True):
        close_to(b / 1024, a)
    for key in ("fisher", "path", "previous", "score"):
        for a, b in zip(getattr(plain, key), getattr(scaled, key), strict=True):
            close_to(b, a)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_a_skipped_pass_changes_nothing(backend):
    visit = a_pass([(5, 6), (40_000,)], skip=torch.tensor(1.0))
    before = copy_of(visit)
    assert not kernels.before_step_(visit)  # nothing counted
    for ours, kept in zip(visit[:10], before[:10], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True) if a is not None)
    kernels.before_step_(visit._replace(skip=torch.tensor(0.0)))
    assert not torch.equal(visit.fisher[0], before.fisher[0])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_backend_that_is_left_nothing_does_not_ask_whether_the_step_counts(backend, monkeypatch):
    """Only `blocked` asks on the host, where it would wait for a GPU."""
    monkeypatch.setattr(PreStepPass, "left_out", property(lambda _: pytest.fail("asked")))
    skip = torch.tensor(float("nan"))
    visit = a_pass([(5, 6), (7,)], skip=skip)
    before = copy_of(visit)
    kernels.before_step_(visit)
    assert torch.equal(visit.fisher[0], before.fisher[0])
    kernels.after_step_(after_adam([None] * 3), skip=skip)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_importance_in_bfloat16(backend):
    torch.manual_seed(0)
    visit = a_pass([(9, 70), (40_000,), (3,)])
    check(visit._replace(omega=[t if t is None else t.bfloat16() for t in visit.omega]))


@pairwise(["backend"], parts=["pull", "pull+second", "average", "pull+second+average"], backend=BACKENDS, dtype=DTYPES)
def test_what_is_done_after_a_step(parts, dtype, backend):
    torch.manual_seed(0)
    rows = []
    for shape in [(9, 7), (40_000,), (), (0,)]:
        state = torch.float32 if dtype is torch.bfloat16 else dtype
        theta, point, omega, second, average = (torch.rand(shape, dtype=state) + 0.1 for _ in range(5))
        row = PostStepRow(theta.to(dtype), step=0.3, correction=0.7, eps=1e-8, weight=0.2)
        row = row._replace(point=point, omega=omega) if "pull" in parts else row
        row = row._replace(second=second.to(dtype)) if "second" in parts else row
        rows.append(row._replace(average=average) if "average" in parts else row)
    truth = [PostStepRow(*(v.clone() if isinstance(v, torch.Tensor) else v for v in row)) for row in rows]
    kernels.after_step_(rows)
    reference.after_step_(truth)
    for ours, expected in zip(rows, truth, strict=True):
        for a, b in zip(ours, expected, strict=True):
            if isinstance(a, torch.Tensor):
                close_to(a, b, dtype)  # the average is of the parameter as rounded


def after_adam(made):
    torch.manual_seed(0)
    columns = [[torch.rand(shape, dtype=torch.float64) + 0.1 for _ in range(5)] for shape in [(9, 7), (40_000,), ()]]
    return [
        PostStepRow(*five, step=0.3, correction=0.99, eps=1e-8, weight=0.2, made=m)
        for five, m in zip(columns, made, strict=True)
    ]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_adams_correction_is_made_of_the_steps_that_a_gpu_has_counted(backend):
    made = [1.0, 7.0, 1000.0]
    ours, truth = after_adam(map(torch.tensor, made)), after_adam([None] * 3)
    kernels.after_step_(ours)
    reference.after_step_(row._replace(correction=1 - 0.99**m) for row, m in zip(truth, made, strict=True))
    for a, b in zip(ours, truth, strict=True):
        close_to(a.theta, b.theta)
        close_to(a.average, b.average)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
@pytest.mark.parametrize("flag", [True, 1.0, float("nan"), False, 0.0])
def test_what_is_left_out_after_a_step_that_does_not_count(flag, backend):
    ours, truth = after_adam([None] * 3), after_adam([None] * 3)
    kernels.after_step_(ours, skip=torch.tensor(flag))
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a.theta, b.theta) == torch.equal(a.average, b.average) == bool(flag)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
@pytest.mark.parametrize("step", [0.0, 1e-30, 1e30, float("inf")])
def test_the_proximal_pull_is_exact_at_both_ends(step, backend):
    theta, point = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0])
    kernels.after_step_([PostStepRow(theta, point, torch.tensor([1.0, 0.0]), step=step if step < 1e31 else 3e38)])
    assert theta.tolist() == [1.0 if step < 1 else 5.0, 2.0]


def test_the_triton_kernels_compile_for_a_gpu():
    """Down to machine code for compute capability 9.0, which needs no GPU; the interpreter does not check types."""
    script = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rwalk.kernels import triton as ours

def compiles(function, kinds, types, **flags):
    constants = {"KINDS": kinds, "CHUNK_LENGTH": ours.CHUNK, **flags}
    signature = dict(zip(function.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": True})
    assert len(made.asm["cubin"]) > 1000

f, h, d = tl.float32, tl.bfloat16, tl.float64
tables = ("*i64", "*i32", "*i64", "*fp64")
whole = tables + ("*fp32", "*fp32", "*i64")
walk = {"CLOSE": True, "SCALED": True, "SKIPS": True}
compiles(ours._before_step, (f,) * 10, whole, **walk)
compiles(ours._before_step, (h, h, f, f, f, f, f, None, f, h), whole, **walk)
compiles(ours._before_step, (d,) * 7 + (None, d, d), whole, **walk)
compiles(ours._before_step, (d,) * 7 + (None, d, h), whole, **walk)
plain = walk | {"SCALED": False, "SKIPS": False}
compiles(ours._before_step, (f, f, *(None,) * 4, f, None, None, None), whole, **plain | {"CLOSE": False})
compiles(ours._before_step, (f, None, f, f, f, f, f, None, None, None), whole, **plain)
compiles(ours._after_step, (f,) * 5, (*tables, "*i1"), SKIPS=True)
compiles(ours._after_step, (h, f, h, h, f), (*tables, "*fp32"), SKIPS=True)
compiles(ours._after_step, (f, f, f, None, None), (*tables, "*fp32"), SKIPS=False)
"""
    pytest.importorskip("triton")
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr


def test_threads_share_a_large_pass_and_change_no_result():
    pytest.importorskip("numba")
    torch.manual_seed(0)
    visit = a_pass([(700, 1000), (5,)])
    alone = copy_of(visit)
    threads = torch.get_num_threads()
    try:
        kernels.use("numba")
        torch.set_num_threads(1)
        beyond_eps = kernels.before_step_(alone)
        torch.set_num_threads(2)
        assert int(kernels.before_step_(visit)) == int(beyond_eps)
    finally:
        torch.set_num_threads(threads)
        kernels.use("blocked")
    for a, b in zip(visit[:10], alone[:10], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def test_blocks_cover_every_element_once_and_share_storage():
    tensor = torch.arange(3 * blocked.BLOCK + 7.0).view(1, -1)
    pieces = [piece for (piece,) in blocked.blocks([tensor])]
    assert len(pieces) == 4
    assert torch.equal(torch.cat(pieces), tensor.view(-1))
    pieces[1].zero_()
    assert (tensor == 0).sum() == blocked.BLOCK + 1


def test_choosing_a_backend():
    assert kernels.current() == "blocked"
    try:
        for name in kernels.available():
            kernels.use(name)
            assert kernels.current() == name
        kernels.use("auto")
        assert kernels.current().endswith("blocked")
        assert ("numba" in kernels.current()) == ("numba" in kernels.available())
    finally:
        kernels.use("blocked")
    with pytest.raises(ValueError, match=r"no backend `fast`.*auto, reference, blocked, numba, triton"):
        kernels.use("fast")


def test_a_backend_that_is_not_installed_explains_itself(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(kernels, "import_module", missing)
    with pytest.raises(ImportError, match=r"backend `numba` needs.*pip install 'rwalk\[fast\]'"):
        kernels.use("numba")
    assert kernels.current() == "blocked"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_importance_in_bfloat16_is_not_rounded_again_where_it_is_scaled(backend):
    """Truth: the formulas in float64 with the importance as it is held."""
    theta, point, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0]), torch.tensor([0.3, 0.7])
    omega, grad = torch.tensor([1.0 + 2.0**-7, 3.0]).bfloat16(), torch.zeros(2)
    kernels.before_step_(PreStepPass([theta], [grad], point=[point], omega=[omega], strength=0.5, scale=torch.tensor(0.3)))
    close_to(grad, (0.3 * omega.double() * (theta - point)).float())
    w = 0.3 * omega.double() / (second.double().sqrt() + 1e-3)
    expected = ((theta + w * point) / (1 + w)).float()
    kernels.after_step_([PostStepRow(theta, point, omega, second, step=0.3, eps=1e-3)])
    close_to(theta, expected)
