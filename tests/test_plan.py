"""The plan's tables against what the code does, its arithmetic by hand, and its command."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases import batches, mlp, train
from rwalk import Consolidator, calibrate, guard, kernels, plan
from rwalk.cli import main
from rwalk.importance import rules
from rwalk.kernels import reference

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
PURE = {"copy_", "zero_"}
"""Operations that write into their first argument without reading it."""


class Meter(TorchDispatchMode):
    """Counts what operations touch: each tensor's first reading and first writing, and all passes over full-sized tensors."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr(): (name, t.nbytes) for name, t in known}
        self.size = max(t.numel() for _, t in known)
        self.reads, self.writes = {}, {}
        self.passes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        schema = func._schema.arguments
        mutated = [
            t
            for a, s in zip(args, schema, strict=False)
            if s.alias_info is not None and s.alias_info.is_write
            for t in tree_leaves(a)
        ]
        viewing = any(s.alias_info is not None and not s.alias_info.is_write for s in schema)
        if viewing:
            return out
        written = mutated or [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        read = [t for t in inputs if not (name in PURE and t is args[0])]
        for t in read:
            self._note(t, self.reads, unless=self.writes)
        for t in mutated:
            self._note(t, self.writes)
        full = [{t.untyped_storage().data_ptr() for t in ts if t.numel() == self.size} for ts in (read, written)]
        self.passes += len(full[0]) + len(full[1])
        self.calls += 1
        return out

    def _note(self, tensor, where, unless=()):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in self.known and pointer not in unless:
            where[pointer] = self.known[pointer]

    @property
    def bytes(self):
        return sum(size for touched in (self.reads, self.writes) for _, size in touched.values())

    def names(self, touched):
        return {name for name, _ in touched.values()}


def columns(formula):
    return {c: torch.rand(7, dtype=torch.float64) for c in {*formula.reads.split(), *formula.writes.split()}}


FORMULAS = {
    "TRACE": lambda c: reference.trace_(c["theta"], c["grad"], c["path"], c["mark"], c["previous"]),
    "CLOSE": lambda c: reference.close_(**c),
    "SETTLE": lambda c: reference.settle_(**c, eps=0.1),
    "SQUARE": lambda c: reference.square_(**c, weight=0.5),
    "PULL": lambda c: reference.pull_(**c, strength=2.0),
    "DRAW": lambda c: reference.draw_(**c, step=0.1),
    "DRAW_SCALED": lambda c: reference.draw_scaled_(**c, step=0.1, correction=0.5, eps=0.1),
    "BLEND": lambda c: reference.blend_(c["average"], c["theta"], 0.5),
    "FINITE": guard.norms_of,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_formula_touches_what_is_declared(name):
    formula = getattr(plan, name)
    tensors = columns(formula)
    with Meter(list(tensors.items())) as meter:
        FORMULAS[name](tensors)
    assert meter.names(meter.reads) == set(formula.reads.split())
    assert meter.names(meter.writes) == set(formula.writes.split())
    if name != "FINITE":  # followed by the joining of one number for each tensor
        assert (meter.passes, meter.calls) == (formula.passes, formula.calls)


def test_every_rule_is_declared():
    assert set(plan.RULES) == {*rules(), "recipe"} - {"kronecker"}  # what it holds does not follow from the size


def weights_of(model):
    return plan.Weights({4: sum(p.numel() for p in model.parameters())}, len(list(model.parameters())))


def stream(task, steps):
    return [(torch.as_tensor(x).float(), torch.as_tensor(y)) for x, y in batches(task, steps)]


def start(rule, optimizer, later, **options):
    model = mlp(torch.float32)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    memory = Consolidator(model, None if rule == "recipe" else rules()[rule](), 1e-3, **options).attach(optimizer)
    if later:
        train(model, optimizer, stream(0, 3))
        memory.consolidate(stream(0, 2))
    return model, optimizer, memory


@pytest.mark.parametrize("coarse", [False, True], ids=["full", "bfloat16"])
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("rule", plan.RULES)
def test_state_is_what_a_consolidator_holds(rule, later, coarse):
    model, _, memory = start(rule, "adam", later, state_dtype=torch.bfloat16 if coarse else None)
    setup = plan.Setup(weights_of(model), rule, coarse=coarse)
    assert plan.state(setup, later).total == memory.state_bytes


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("coarse", [False, True], ids=["full", "bfloat16"])
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("rule", plan.RULES)
def test_traffic_is_what_the_visits_of_a_window_touch(rule, later, coarse, optimizer, monkeypatch):
    """Every visit and check of two whole windows runs under a meter that knows all tensors there are."""
    model, inner, memory = start(rule, optimizer, later, state_dtype=torch.bfloat16 if coarse else None)
    seen = {"visit_": 0, "after_": 0, "norms_of": 0, "rest_": 0, "unlike": 0}

    def metered(name, function, *arguments):
        theta = dict(memory._watch.theta)
        known = [pair for name, p in theta.items() for pair in ((name, p), ("grad", p.grad))]
        lists = {key: column for key, column in memory._state._asdict().items() if isinstance(column, list)}
        dicts = (memory.anchor.point, memory.anchor.omega, memory._tail.average)
        known += [(key, t) for key, column in lists.items() for t in column if isinstance(t, torch.Tensor)]
        known += [("held", t) for d in dicts for t in d.values()]
        known += [(key, t) for s in inner.state.values() for key, t in s.items() if t is not None and t.dim()]
        with Meter(known) as meter:
            result = function(*arguments)
        seen[name] += meter.bytes
        return result

    for module, name in (*((kernels, name) for name in ("visit_", "after_", "rest_", "unlike")), (guard, "norms_of")):
        monkeypatch.setattr(module, name, functools.partial(metered, name, getattr(module, name)))
    steps = max(2 * plan.RULES[rule].window, 2)
    kernels.use("reference")
    try:
        train(model, inner, stream(1, steps))
    finally:
        kernels.use("blocked")
    setup = plan.Setup(weights_of(model), rule, optimizer, coarse=coarse)
    expected = plan.traffic(setup, later)
    wake = setup.size(["previous"]) if expected.rest else 0  # at whose start a gradient is forgotten
    assert seen["norms_of"] == pytest.approx(steps * expected.check)
    assert seen["visit_"] == pytest.approx(steps * expected.visit)
    assert seen["after_"] == pytest.approx(steps * expected.after)
    assert seen["rest_"] + seen["unlike"] * steps / (steps - 1) == pytest.approx(steps * (expected.rest - wake))


@pytest.mark.parametrize("name", plan.OPTIMIZERS)
def test_optimizers_hold_and_write_what_is_declared(name):
    model = mlp(torch.float32)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, stream(0, 2))
    parameter = model[0].weight
    held = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor) and t.shape == parameter.shape]
    tensors = [parameter.detach(), parameter.grad, *held]
    before = [t.clone() for t in tensors]
    optimizer.step()
    written = [not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)]
    assert len(held) == plan.OPTIMIZERS[name].holds
    assert len(tensors) + sum(written) == plan.OPTIMIZERS[name].moves


def test_the_walks_figures_by_hand():
    """P = 4000 bytes. A visit reads 8 columns and writes 4; once in ten steps score is read, and score and mark are written.

    To tell moves apart, weights and where they came to rest are compared, the latter is emptied, and after the step four
    columns are read and two of them written.
    """
    setup = plan.Setup(plan.Weights({4: 1000}, 2))
    assert plan.state(setup, later=False) == plan.State(rule=20000, anchor=0, average=0, host=0)
    assert plan.state(setup) == plan.State(rule=24000, anchor=8000, average=0, host=0)
    assert plan.touched(setup, ours=False) == 4000 * 4
    assert plan.touched(setup) == 4000 * (4 + 7)  # all but the score of earlier tasks
    moved = plan.traffic(setup)
    assert (moved.check, moved.after, moved.rest, moved.link) == (4000, 0, 36000, 0)
    assert moved.visit == pytest.approx(4000 * (12 + 3 / 10))
    assert plan.traffic(setup, later=False).visit == pytest.approx(4000 * (9 + 3 / 10))


def test_a_prediction_by_hand():
    setup = plan.Setup(plan.Weights({4: 1000}, 2), tokens=50)
    machine = plan.Machine("m", ((0.0, 1e6),), rate=1e8, utilisation=0.5, plain=plan.Overhead(1, 2), ours=plan.Overhead(3, 4))
    plain, whole = plan.seconds(setup, machine, ours=False), plan.seconds(setup, machine)
    assert plain.compute == pytest.approx(6 * 1000 * 50 / 5e7)
    assert plain.memory == pytest.approx((3 + 7) * 4000 / 1e6)
    assert plain.overhead == pytest.approx(1 + 2 * 2)
    assert plain.ours == 0
    assert whole.ours == pytest.approx(22.3 * 4000 / 1e6 + 3 + 4 * 2)
    assert whole.total == pytest.approx(0.006 + 0.04 + 5 + 0.0892 + 11)


def test_large_gradients_are_made_anew():
    machine = plan.Machine("m", ((0.0, 1e9),), rate=1e12, fresh=2e-9)
    usual, large = (plan.seconds(plan.Setup(plan.Weights({4: 10**7}, 1, size)), machine).total for size in (0, 4 * 10**7))
    assert large - usual == pytest.approx(4e7 * 2e-9)
    assert plan.Weights.of([torch.empty(2**23), torch.empty(2**23 + 1)]) == plan.Weights({4: 2**24 + 1}, 2, 2**25 + 4)


def test_the_blocked_backend_by_hand():
    """24 passes of 4 bytes and 8 operations on 10 columns; settling adds 31 passes, 14 operations and the column of scores.

    What tells moves apart adds 2 passes, 1 and 9, and 1 operation, 1 and 3, on 2 columns, 1 and 4.
    """
    setup = plan.Setup(plan.Weights({4: 2**15}), backend="blocked")
    machine = plan.Machine("m", ((2.0**20, 8e9), (2.0**30, 1e9)), rate=1e12, call=1e-6)
    fused = plan.seconds(plan.Setup(plan.Weights({4: 2**15})), machine).ours
    extra = plan.seconds(setup, machine).ours - fused
    assert extra == pytest.approx(4 * 2**15 * (24 + 3.1 + 12) / 8e9 + (8 + 8 + 1.4 + 0.1 + 5 + 7) * 1e-6)


def test_shards_hold_and_move_their_part_and_compute_all():
    weights = plan.Weights({4: 1000})
    whole, part = plan.Setup(weights), plan.Setup(weights, devices=3, sharded=True)
    assert plan.Setup(weights, devices=3).part == weights
    assert part.part.number == 334
    assert plan.state(part).total == 8 * 4 * 334
    machine = plan.machine("h200")
    a, b = plan.seconds(whole, machine), plan.seconds(part, machine)
    assert a.compute == b.compute
    assert b.memory == pytest.approx((3 * 4000 + 7 * 4 * 334) / 4.8e12)


def test_state_off_the_device_is_brought_over_at_every_step():
    setup = plan.Setup(plan.Weights({4: 1000}), off_device=True)
    held = plan.state(setup)
    assert (held.host, held.device) == (4000 * 3, 4000 * 5)  # on the host: point, omega and the score of earlier tasks
    machine = plan.machine("a100")
    here = plan.seconds(plan.Setup(plan.Weights({4: 1000})), machine).ours
    assert plan.seconds(setup, machine).ours - here == pytest.approx(8000 / 32e9 + 8000 / 2039e9)
    laptop = plan.machine("laptop")
    assert plan.seconds(setup, laptop) == plan.seconds(plan.Setup(plan.Weights({4: 1000})), laptop)


def test_half_precision_parameters_have_full_precision_state():
    setup = plan.Setup(plan.Weights({2: 1000}), "l2")
    assert plan.state(setup).total == 8000
    assert plan.traffic(setup).visit == 2000 + 2000 + 8000 + 2000  # theta, grad; point and omega; grad again


def test_bandwidth_between_sizes_follows_the_logarithm():
    machine = plan.Machine("m", ((100.0, 8.0), (10000.0, 4.0)), 1.0)
    assert [machine.speed(size) for size in (1, 100, 1000, 10000, 1e9)] == pytest.approx([8, 8, 6, 4, 4])


@pytest.mark.parametrize(("text", "number"), [
    ("1M", 10**6), ("350m", 350 * 10**6), ("7b", 7 * 10**9), ("1.5B", 1500 * 10**6), ("70B", 70 * 10**9), ("12345", 12345),
    ("2k", 2000),
])  # fmt: skip
def test_sizes(text, number):
    assert plan.weights(text, 2) == plan.Weights({2: number})


def test_sizes_need_no_torch():
    code = (
        "import sys; from rwalk import plan; plan.seconds(plan.Setup(plan.weights('7b')), plan.machine('h200'));"
        "from rwalk.report import costs; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FACTORY = """
import torch
def network():
    model = torch.nn.Sequential(torch.nn.Linear(100_000, 200_000), torch.nn.Linear(3, 4).bfloat16(), torch.nn.Linear(5, 6))
    model[2].requires_grad_(False)
    return model
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "planned_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("planned_networks", None)


def test_a_model_is_counted_without_its_memory(folder):
    """80 GB of weights, which no test machine has."""
    expected = {2: 3 * 4 + 4, 4: 100_000 * 200_000 + 200_000}
    assert plan.weights("planned_networks:network") == plan.Weights(expected, 4, 4 * 100_000 * 200_000)


@pytest.mark.parametrize(
    "model", ["absent_module:network", "planned_networks:absent", "planned_networks:number", "json:dumps", ":"]
)
def test_what_is_no_model_is_refused_in_three_parts(model, folder):
    before = list(sys.path)
    with pytest.raises(
        ValueError, match=re.escape(f"Got model `{model}` (") + r".*Expected `package\.module:factory`.*Correct"
    ):
        plan.weights(model)
    assert sys.path == before


def test_the_command_prints_state_traffic_and_time(capsys):
    assert main(["plan", "7b", "--devices", "8", "--sharded", "--dtype", "bfloat16", "--tokens", "8192"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "7,000,000,000 parameters, sharded over 8 devices: P = 1.63 GiB on a device" in printed
    assert "together 10.00 P 16.30 16.00 P 26.08" in printed
    arithmetic = 6 * 7e9 * 8192 / (989e12 * 0.4)
    assert f"arithmetic {1e3 * arithmetic:.4g} {1e3 * arithmetic:.4g}" in printed
    columns = 2 + 2 + 6 * 4 + 3 * 4 + 2 + 3 / 10 * 4  # theta, grad; six read, three written; grad; the score and its mark
    columns += 2 + 4 + 4 + 2 + 3 * 4 + 2 * 4  # two compared, one emptied; four read, two written
    assert f"us 0 {1e3 * (2 + columns) * 7e9 / 8 / 4.8e12:.4g}" in printed
    assert "our share of the step" in printed


def test_the_users_figures_replace_the_presets(capsys):
    assert main(["plan", "1M", "--bandwidth", "4", "--compute", "0.006", "--utilisation", "1", "--tokens", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "arithmetic 1 1 " in printed  # 6e6 / 6e9 s
    assert "weights, gradients, optimiser 10 10 " in printed  # 10 P of 4e6 bytes at 4e9 a second
    assert "us 0 22.3 " in printed
    assert f"ratio 1 {33.3 / 11:.3f}" in printed


def test_the_readmes_example_is_what_the_command_prints(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (command,) = re.findall(r"^rwalk (plan 1b.*)$", readme, re.M)
    (block,) = re.findall(r"```text\n(1,000,000,000 parameters.*?)```", readme, re.S)
    assert main(command.split()) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith(" ".join(block.split()))


@pytest.mark.parametrize("rule", plan.RULES)
def test_the_table_has_a_line_for_each_size(rule, capsys):
    assert main(["plan", "--table", "--rule", rule, "--machine", "a100"]) == 0
    printed = capsys.readouterr().out
    for size in ("1M", "10M", "100M", "1B", "7B", "70B"):
        assert re.search(rf"^ *{size} ", printed, re.M)


@pytest.mark.parametrize(("arguments", "word"), [
    ([], "no model"),
    (["7x"], "model `7x`"),
    (["0"], "model `0`"),
    (["9" * 400 + "b"], "a size from 1 to"),
    (["7b", "--rule", "sorcery"], "rule `sorcery`"),
    (["7b", "--optimizer", "lion"], "optimizer `lion`"),
    (["7b", "--machine", "abacus"], "machine `abacus`"),
    (["7b", "--devices", "0"], "devices 0"),
    (["7b", "--tokens", "-1"], "tokens -1"),
    (["7b", "--bandwidth", "0"], "bandwidth 0"),
    (["7b", "--compute", "nan"], "compute nan"),
    (["7b", "--utilisation", "1.5"], "utilisation 1.5"),
    (["7b", "--machine", "here", "--compute", "inf"], "compute inf"),
    (["absent_module:f"], "absent_module"),
])  # fmt: skip
def test_mistakes_get_three_parts_and_status_two(arguments, word, capsys):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.match(r"rwalk: Got .*\. Expected .*\. [A-Z]", captured.err, re.S)
    assert word in captured.err
    assert captured.out == ""


def test_this_machine_can_be_measured():
    """Only that there are figures: what they are is for the benchmark."""
    machine = calibrate.here(4, rule="recipe", optimizer="momentum", backend="blocked")
    assert kernels.current() == "blocked"
    assert all(figure > 0 for _, figure in machine.bandwidth)
    assert machine.rate > 0
    assert machine.call > 0
    assert plan.seconds(plan.Setup(plan.Weights({4: 1000}, 2)), machine).total > 0
