"""A plain loop under Accelerate gives what it gives without: accumulation, clipping, half precision, checkpoints, two ranks."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs Accelerate: make test-integrations")

import accelerate
from accelerate.state import AcceleratorState, GradientState

import hosts
from hosts import numbers
from rwalk import EWC, Consolidator, RWalk

RULES = {"rwalk": RWalk(delta_t=3), "recipe": None, "ewc": EWC()}


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerate keeps its settings for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).to(dtype)


def loader(number, batch, dtype=torch.float64, count=24):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x.to(dtype), x[:, number : number + 3].argmax(1))
    return torch.utils.data.DataLoader(data, batch)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def arranged(rule, scaler=None, accumulate=3, dtype=torch.float64, **options):
    """Return what a loop under Accelerate needs, and a memory; with the scaler that fp16 has on a GPU, without autocast."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    accelerator.scaler = scaler
    model = network(dtype)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    accelerator.native_amp |= scaler is not None
    return accelerator, optimizer, Consolidator(model, RULES[rule], strength=0.5)


def epoch(accelerator, optimizer, memory, data):
    """The loop of Accelerate's documentation."""
    for x, y in data:
        with accelerator.accumulate(memory.model):
            accelerator.backward(F.cross_entropy(memory.model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(memory.model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()


def accelerated(rule, batch=4, **options):
    """Two tasks, under a new optimiser each."""
    accelerator, optimizer, memory = arranged(rule, **options)
    for number in (0, 1):
        memory.attach(optimizer)
        data = accelerator.prepare(loader(number, batch, options.get("dtype", torch.float64)))
        for _ in range(2):
            epoch(accelerator, optimizer, memory, data)
        memory.consolidate(data)
        accelerator.free_memory()  # it would unscale gradients once for each optimiser that it knows
        optimizer = accelerator.prepare(optimizer_of(memory.model))
    return memory


def plain(rule, dtype=torch.float64, half=None):
    """The same without Accelerate, in batches as large as what it accumulates."""
    model = network(dtype)
    memory = Consolidator(model, RULES[rule], strength=0.5)
    for number in (0, 1):
        optimizer, data = optimizer_of(model), loader(number, 12, dtype)
        memory.attach(optimizer)
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                    output = model(x).to(dtype)
                F.cross_entropy(output, y).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
        memory.consolidate(data)
    return memory


def same(one, two, rtol=1e-9, atol=1e-12):
    """Demand equal weights, anchors and state, whatever the model is wrapped in."""
    a, b = one.state_dict(), two.state_dict()
    for key in ("anchor", "tail", "state"):
        torch.testing.assert_close(numbers(a[key]), numbers(b[key]), rtol=rtol, atol=atol)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    assert [a[key] for key in ("tasks", "steps")] == [b[key] for key in ("tasks", "steps")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_the_loop_of_accelerates_documentation_gives_what_a_plain_one_gives(rule, scaled):
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8), "mixed_precision": "fp16"} if scaled else {}
    same(accelerated(rule, **options), plain(rule))


def test_half_precision_is_that_of_autocast():
    one = accelerated("rwalk", batch=12, accumulate=1, dtype=torch.float32, mixed_precision="bf16")
    same(one, plain("rwalk", torch.float32, torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["rwalk", "recipe"])
def test_a_memory_may_be_registered_for_accelerates_checkpoints(rule, tmp_path):
    runs = []
    for resume in (False, True):
        accelerator, optimizer, memory = arranged(rule, accumulate=1)
        accelerator.register_for_checkpointing(memory)
        memory.attach(optimizer)
        data = accelerator.prepare(loader(0, 4))
        if resume:
            accelerator.load_state(str(tmp_path))
        else:
            epoch(accelerator, optimizer, memory, data)
            accelerator.save_state(str(tmp_path))
        assert memory.state_dict()["steps"] == 6
        epoch(accelerator, optimizer, memory, data)
        memory.consolidate()
        runs.append(memory)
    same(*runs, rtol=0, atol=0)


def test_two_ranks_give_what_one_gives(tmp_path):
    with hosts.forks("test_accelerate") as run:
        done = run("two_tasks_under_each_rule", tmp_path, ranks=2)
    assert done["statuses"] == [0, 0], done["stderr"]
    for rule in RULES:
        one = plain(rule)
        other = Consolidator(network(), one.rule, average=one.average)
        other.load(tmp_path / f"{rule}.safetensors")
        other.model.load_state_dict(torch.load(tmp_path / f"{rule}.pt"))
        same(one, other)


def two_tasks_under_each_rule(folder):
    for rule in RULES:
        memory = accelerated(rule, batch=2)
        if torch.distributed.get_rank() == 0:
            memory.save(Path(folder) / f"{rule}.safetensors")
            torch.save(memory.model.module.state_dict(), Path(folder) / f"{rule}.pt")
