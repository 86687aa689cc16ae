"""Every backend against closed forms and laws of its own; `test_passes` compares all of them with the reference."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from steps import Drawn

from rwalk import SI, Consolidator, EWCpp, RWalk, TaskFisher, kernels
from rwalk.kernels import blocked

BACKENDS = ["blocked", "rows", "joined", "numba", "triton"]


def installed(name):
    if name in ("numba", "triton"):
        pytest.importorskip(name)
    return name


def drawn(shapes, *names, dtype=torch.float64, **numbers):
    """Return a step of positive random parameters of some shapes, with these columns."""
    torch.manual_seed(0)

    def column(kind=dtype):
        return [(torch.rand(shape, dtype=torch.float64) + 0.1).to(kind) for shape in shapes]

    state = torch.promote_types(dtype, torch.float32)
    columns = {name: column(state) for name in names}
    return Drawn(column(), column(), columns, numbers={"weight": [0.3] * len(shapes), "strength": 0.7, **numbers})


def close_to(ours, truth):
    limit = {torch.bfloat16: 1e-2, torch.float32: 2e-6, torch.float64: 1e-13}[ours.dtype]
    scale = truth.double().abs().max() if truth.numel() else 1.0
    assert torch.allclose(ours.double(), truth.double(), rtol=limit, atol=float(limit * scale))


RULES = [("fisher",), ("fisher", "point", "omega"), ("path", "last", "mark", "score", "fisher", "point", "omega")]


@pytest.mark.parametrize("names", RULES, ids=str)
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_loss_scale_divides_what_is_observed_and_multiplies_what_is_added(name, names):
    plain = drawn([(5, 6), (7,), (40_000,)], *names)
    scaled = plain.copied()
    scaled.grad = [g * 1024 for g in scaled.grad]
    scaled.numbers = scaled.numbers | {"scale": torch.tensor(1024.0)}
    _, _, first, _, _ = plain.run(installed(name))
    _, _, larger, _, _ = scaled.run(name)
    for column, tensors in first.items():
        for a, b in zip(tensors, larger[column], strict=True):
            close_to(b / 1024 if column == "grad" else b, a)


@pytest.mark.parametrize("names", [*RULES, ("point", "omega", "average")], ids=str)
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("flag", [True, 1.0, float("nan"), False, 0.0])
def test_a_skipped_step_leaves_no_trace(flag, name, names):
    """What the gradient was is kept only until the next step."""
    step = drawn([(5, 6), (40_000,), ()], *names, skip=torch.tensor(flag), share=0.2, step=0.3, correction=0.7, adam_eps=1e-8)
    _, _, _, last, _ = step.run(installed(name))
    moved = [t - g / 16 for t, g in zip(step.theta, step.grad, strict=True)]
    for column in names:
        same = all(torch.equal(a, b) for a, b in zip(step.columns[column], last[column], strict=True))
        assert same if flag else (same == (column in ("point", "omega", "mark", "score"))), column
    if flag:
        assert all(torch.equal(a, b) for a, b in zip(moved, last["theta"], strict=True))


@pytest.mark.parametrize("name", ["triton"])
def test_a_backend_that_is_left_nothing_does_not_ask_whether_the_step_counts(name, monkeypatch):
    """Only plain PyTorch asks on the host, where it would wait for a GPU."""
    step = drawn([(5, 6), (7,)], "fisher", "point", "omega", skip=torch.tensor(float("nan")))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("asked"))
    step.copied().run(installed(name))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_adams_correction_is_made_of_the_steps_that_a_gpu_has_counted(name):
    made = [1.0, 7.0, 1000.0]
    for i, n in enumerate(made):
        step = drawn([[(9, 7), (40_000,), ()][i]], "point", "omega", step=0.3, correction=0.99, adam_eps=1e-8)
        step.second = [torch.rand_like(step.theta[0])]
        known = step.copied()
        step.numbers = step.numbers | {"made": [torch.tensor(n)]}
        known.numbers = known.numbers | {"correction": 1 - 0.99**n}
        (*_, counted, _), (*_, expected, _) = step.run(installed(name)), known.run("reference")
        close_to(counted["theta"][0], expected["theta"][0])


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("step", [1e-30, 1e30, 3e38])
def test_the_proximal_pull_is_exact_at_both_ends(step, name):
    one = Drawn([torch.tensor([1.0, 2.0])], [torch.zeros(2)])
    one.columns = {"point": [torch.tensor([5.0, -3.0])], "omega": [torch.tensor([1.0, 0.0])]}
    one.numbers = {"step": step, "correction": 1.0, "adam_eps": 0.0}
    *_, last, _ = one.run(installed(name))
    assert last["theta"][0].tolist() == [1.0 if step < 1 else 5.0, 2.0]


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_importance_in_bfloat16_is_not_rounded_again_where_it_is_scaled(name):
    """Truth: the formulas in float64 with the importance as it is held."""
    theta, point, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0]), torch.tensor([0.3, 0.7])
    omega = torch.tensor([1.0 + 2.0**-7, 3.0]).bfloat16()
    step = Drawn([theta], [torch.zeros(2)], {"point": [point], "omega": [omega]}, second=[second])
    step.numbers = {"strength": 0.5, "scale": torch.tensor(0.3), "step": 0.3, "correction": 1.0, "adam_eps": 1e-3}
    _, _, first, last, _ = step.run(installed(name))
    grad = (0.3 * omega.double() * (theta - point)).float()
    close_to(first["grad"][0], grad)
    w = 0.3 * omega.double() / (second.double().sqrt() + 1e-3)
    close_to(last["theta"][0], ((theta - grad / 16 + w * point) / (1 + w)).float())


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_gradients_that_are_not_finite_are_told_of_each_parameter(name, value):
    """1e30 is finite in float32, and its square is not."""
    step = drawn([(5, 6), (40_000,), (3,), ()], "fisher", dtype=torch.float32)
    step.grad[0][2, 3], step.grad[1][39_999], step.grad[2] = value, value, None
    assert step.run(installed(name))[0] == [True, True, False, False]


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_parameters_that_something_else_has_moved_are_found(name):
    step = drawn([(5, 6), (40_000,), (3,), ()], "path", "last")
    step.columns["last"] = [t.clone() for t in step.theta]
    assert step.run(installed(name), compare=True)[1] == []
    step.columns["last"][1][39_999] += 1e-12
    step.columns["last"][2][0] += 1e-12
    step.grad[2] = None
    assert step.run(name, compare=True)[1] == [1, 2]


def test_the_triton_kernels_compile_for_a_gpu():
    """Down to machine code for compute capability 9.0, which needs no GPU; the interpreter does not check types."""
    script = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile as compile_
from rwalk.kernels import triton, triton_programs as ours

f, h, d = tl.float32, tl.bfloat16, tl.float64
TABLES = ("*i64", "*i32", "*i64", "i32")

def compiles(function, kinds, types, state=f, **flags):
    kinds = tuple(kinds.get(name) for name in triton.COLUMNS)
    constants = {"KINDS": kinds, "STATE": state, "CHUNK_LENGTH": triton.CHUNK, **flags}
    signature = dict(zip(function.arg_names, TABLES + types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = compile_(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": True})
    assert len(made.asm["cubin"]) > 1000

def columns(names, kind=f, **others):
    return dict.fromkeys(names.split(), kind) | others

flags, plain = {"SCALED": True, "SKIPS": True}, {"SCALED": False, "SKIPS": False}
before, after = ("*fp64", "*fp32", "*fp32"), ("*fp64", "*fp32", "*fp32", "*i64")
whole = "theta grad point omega second average previous path last fisher squares mark score"
compiles(ours.nonfinite, columns("grad"), ("*i64",))
compiles(ours.nonfinite, columns("grad", h), ("*i64",))
compiles(ours.before_step, columns("theta grad previous point omega"), before, **flags)
compiles(ours.before_step, columns("theta grad fisher squares point omega", theta=h, grad=h, omega=h), before, **flags)
compiles(ours.before_step, columns("theta grad fisher point omega", d), before, d, **flags)
compiles(ours.before_step, columns("theta grad fisher"), ("*fp64", "*i64", "*i64"), **plain)
compiles(ours.after_step, columns(whole, made=f), after, CLOSE=True, **flags)
compiles(ours.after_step, columns(whole, theta=h, grad=h, second=h, omega=h), after, CLOSE=True, **flags)
compiles(ours.after_step, columns(whole, d, made=f), after, d, CLOSE=True, **plain)
compiles(ours.after_step, columns("theta grad previous path last"), after, CLOSE=False, **plain)
averages = ("*fp64", "*i64", "*i1", "*i64")
compiles(ours.after_step, columns("theta grad average"), averages, CLOSE=False, SCALED=False, SKIPS=True)
"""
    pytest.importorskip("triton")
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr


def test_threads_share_a_large_pass_and_change_no_result():
    step = drawn([(700, 1000), (5,)], *RULES[2], close=True, eps=1e-3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        *_, alone, counted = step.run(installed("numba"))
        torch.set_num_threads(2)
        *_, shared, both = step.run("numba")
    finally:
        torch.set_num_threads(threads)
    assert counted == both
    for column, tensors in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, shared[column], strict=True))


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


@pytest.mark.parametrize("rule", [RWalk(delta_t=3), EWCpp(), SI(), TaskFisher()], ids=repr)
def test_a_step_takes_three_launches_however_many_tensors_there_are(rule, monkeypatch):
    """The check of gradients, the pass before the step and the one after it; tables are sent where something has changed."""
    installed("triton")
    warnings.simplefilter("ignore", RuntimeWarning)  # its interpreter works in NumPy, which warns of division by 0
    from rwalk.kernels import triton

    kernels.use("triton")
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(3, n % 4 + 1)) for n in range(60)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = Consolidator(model, rule, 0.1).attach(optimizer)
    launches, sent = [], []
    launch, there = triton.DeviceTable._launch, triton.Upload.there
    monkeypatch.setattr(triton.DeviceTable, "_launch", lambda table, *a, **k: (launches.append(table), launch(table, *a, **k)))
    monkeypatch.setattr(triton.Upload, "there", lambda table: (sent.append(table._there is None), there(table))[1])

    def step():
        launches.clear()
        sent.clear()
        optimizer.zero_grad(set_to_none=False)
        sum(p.square().sum() for p in model).backward()
        optimizer.step()
        return len(launches), sum(sent)

    for _ in range(4):
        step()
    memory.consolidate()
    for _ in range(4):
        step()
    counts = [step() for _ in range(3)]
    after = len(optimizer._optimizer_step_post_hooks)
    assert {count for count, _ in counts} == {2 + after}
    assert max(tables for _, tables in counts) <= (2 if after else 1), "numbers that change at each step, and what has moved"
