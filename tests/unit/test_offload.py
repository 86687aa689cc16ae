"""Rule in two bytes an element, and state off the accelerator."""

import pytest
import torch

from cases import assert_same_state, batches, mlp, train
from rwalk import EWC, MAS, SI, Consolidator, EWCpp, RWalk, kernels
from rwalk.kernels.passes import BeforeRow
from rwalk.kernels.rows import fetched


def walked(rule=None, tasks=2, model=None, **options):
    model = mlp(torch.float32) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = Consolidator(model, rule, **options).attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, [(torch.as_tensor(x).float(), y) for x, y in batches(task, 9)])
        memory.consolidate([(torch.as_tensor(x).float(), torch.as_tensor(y)) for x, y in batches(task, 2)])
    return model, optimizer, memory


@pytest.mark.parametrize("rule", [RWalk(), RWalk(alpha=0.01), EWCpp(alpha=0.1), SI(), EWC(), MAS(), None], ids=repr)
def test_importance_in_bfloat16_is_close_and_smaller(rule):
    _, _, full = walked(rule)
    _, _, coarse = walked(rule, state_dtype=torch.bfloat16)
    assert coarse.state_bytes < full.state_bytes
    held = [*coarse.anchor.omega.values(), *(t for f in getattr(coarse.anchor, "layers", {}).values() for t in f.tensors())]
    assert {t.dtype for t in held} == {torch.bfloat16}
    assert {t.dtype for t in coarse.anchor.point.values()} == {torch.float32}
    full, coarse = full.anchor.importance(), coarse.anchor.importance()
    whole = sum(float(o.sum()) for o in full.values())
    apart = sum(float((o - coarse[name].float()).abs().sum()) for name, o in full.items())
    assert apart < 0.05 * whole


def test_what_bfloat16_saves():
    _, _, memory = walked(RWalk(), state_dtype=torch.bfloat16)
    assert memory.state_bytes == 7.5 * sum(p.nbytes for p in memory.model.parameters())


@pytest.mark.parametrize("rule", [RWalk(), EWCpp(), None], ids=repr)
def test_a_saved_coarse_state_continues_bit_for_bit(rule):
    model, optimizer, memory = walked(rule, state_dtype=torch.bfloat16)
    train(model, optimizer, [(torch.as_tensor(x).float(), y) for x, y in batches(3, 4)])
    twin = mlp(torch.float32)
    twin.load_state_dict(model.state_dict())
    resumed = Consolidator(twin, rule, state_dtype=torch.bfloat16)
    resumed.load_state_dict(memory.state_dict())
    resumed.attach(torch.optim.SGD(twin.parameters(), lr=0.05))
    for m, o in ((model, optimizer), (twin, resumed._memory.optimizer)):
        train(m, o, [(torch.as_tensor(x).float(), y) for x, y in batches(4, 5)])
    assert_same_state(memory, resumed)


@pytest.mark.parametrize("rule", [RWalk(), EWC(), SI(), None], ids=repr)
def test_an_anchor_kept_on_the_cpu_changes_no_number(rule):
    """Without an accelerator both places are the same one; what is tested is that the way there and back loses nothing."""
    a, _, here = walked(rule)
    b, _, there = walked(rule, state_device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert_same_state(here, there)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("rule", [RWalk(), EWC(), None], ids=repr)
def test_on_a_gpu_the_anchor_stays_in_pinned_memory_and_changes_no_number(rule, backend):
    kernels.use(backend)
    try:
        built = []
        for device in (None, "cpu"):
            model = mlp(torch.float32).cuda()
            optimizer = torch.optim.Adam(model.parameters())
            memory = Consolidator(model, rule, state_device=device).attach(optimizer)
            for task in range(2):
                data = [(torch.as_tensor(x).float().cuda(), torch.as_tensor(y).cuda()) for x, y in batches(task, 9)]
                for x, y in data:
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                memory.consolidate(data)
            built.append((model, memory))
    finally:
        kernels.use("blocked")
    assert all(t.is_pinned() for t in built[1][1].anchor.point.values())
    for a, b in zip(built[0][0].parameters(), built[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_lies_elsewhere_comes_over_a_few_at_a_time():
    """Ten parameters with anchors on another device, of which three fit at a time."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

        def to(self, *_, **__):
            return torch.zeros(self.shape)

    away = [Elsewhere(torch.zeros(100)) for _ in range(10)]
    rows = [BeforeRow(torch.zeros(100), torch.zeros(100), point=there, omega=there) for there in away]
    batches = list(fetched(rows, limit=3 * 2 * 400))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert all(type(row.omega) is torch.Tensor for batch in batches for row in batch)


@pytest.mark.parametrize("option", [{"state_dtype": torch.float16}, {"state_device": "cuda"}], ids=str)
def test_what_cannot_be_kept_so_is_refused(option):
    with pytest.raises(ValueError, match=r"`state_d"):
        Consolidator(mlp(), RWalk(), **option)
