"""The library on a GPU against itself on the CPU in double precision; and that its steps wait for nothing there."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from cases import assert_same_state, batches, mlp, tensors
from rwalk import EWC, MAS, SI, Consolidator, EWCpp, Kronecker, RWalk, kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RULES = [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), EWC(), EWCpp(), SI(), MAS(), Kronecker(labels="exact"), None]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "capturable adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
}


@pytest.fixture(autouse=True, params=["blocked", "triton"])
def backend(request):
    kernels.use(request.param)
    return request.param


def on(device, data):
    return [(torch.as_tensor(x).to(device), torch.as_tensor(y).to(device)) for x, y in data]


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@contextmanager
def no_waiting():
    """Let PyTorch raise an error when the host waits for the GPU; it warns that it does not see every such wait."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(action="ignore"):
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def learned(rule, make, device, model=mlp, tasks=2, **options):
    """Train on some tasks, and half of one more."""
    model = model().to(device)
    optimizer = make(model.parameters())
    memory = Consolidator(model, rule, strength=0.3, **options).attach(optimizer)
    for task in range(tasks):
        train(model, optimizer, on(device, batches(task, 8)))
        memory.consolidate(on(device, batches(task + 50, 3)))
    train(model, optimizer, on(device, batches(tasks, 5)))
    return model, optimizer, memory


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_gpu_computes_what_the_cpu_does(rule, name):
    """Fused optimisers keep their count of steps on the GPU, where Adam's correction is then worked out.

    Capturable Adam works out its own correction from that count in single precision, and eigenvectors have no sign.
    """
    limit = 1e-3 if name == "capturable adam" else 1e-7
    _, _, theirs = learned(rule, OPTIMIZERS[name.removeprefix("fused ").removeprefix("capturable ")], "cpu")
    _, _, memory = learned(rule, OPTIMIZERS[name], "cuda")
    ours, truth = tensors(memory), tensors(theirs)
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        if isinstance(value, torch.Tensor):
            a, b = ours[key].cpu().double(), value.double()
            a, b = (a.abs(), b.abs()) if key.startswith(".anchor.layers") else (a, b)
            assert torch.allclose(a, b, rtol=limit, atol=limit * float(b.abs().max()) if b.numel() else 0), key


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [RWalk(), EWCpp(), SI(), EWC(), MAS(), None], ids=repr)
def test_a_step_waits_for_nothing(rule, name, backend):
    """PyTorch raises an error when the host waits for the GPU. After a step, `blocked` asks whether it counted."""
    model, optimizer, _ = learned(rule, OPTIMIZERS[name], "cuda", nonfinite="raise")
    if backend == "blocked":
        pytest.skip("documented")
    data = on("cuda", batches(9, 12))
    with no_waiting():
        train(model, optimizer, data)


@pytest.mark.parametrize("rule", [RWalk(delta_t=1), EWCpp(), None, Kronecker()], ids=repr)
def test_bad_numbers_are_found_a_step_later_and_leave_the_memory_as_it_was(rule):
    model, optimizer, memory = learned(rule, OPTIMIZERS["fused adam"], "cuda", average="tail")
    before = memory.state_dict()
    x, y = on("cuda", batches(7, 1))[0]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[2].bias.grad[0] = float("nan")
    optimizer.step()
    with pytest.raises(FloatingPointError, match=r"`2.bias`.* at step 6 .*one step later"):
        optimizer.step()
    other = Consolidator(model, rule, strength=0.3, average="tail")
    other.load_state_dict(before)
    assert_same_state(memory, other)


@pytest.mark.parametrize("rule", [RWalk(delta_t=2), None], ids=repr)
def test_a_loss_scaler_that_skips_a_step(rule):
    """With a fused optimiser, which skips it on the device: what is left is as without that step."""

    def run(poisoned):
        model = mlp(torch.float32).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        memory = Consolidator(model, rule, strength=0.3).attach(optimizer)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=10**6)
        for task in range(2):
            for k, (x, y) in enumerate(on("cuda", batches(task, 9))):
                if k == 4 and not poisoned:
                    continue
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x.float()), y)
                scaler.scale(loss * float("inf") if k == 4 else loss).backward()
                scaler.step(optimizer)
                scaler.update(1024.0)
            memory.consolidate()
        return model, memory

    model, memory = run(True)
    twin, theirs = run(False)
    assert memory.skipped == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, omega in memory.anchor.omega.items():
        assert torch.allclose(omega, theirs.anchor.omega[name], rtol=1e-4, atol=1e-5 * float(omega.max()))


class Sequence(torch.nn.Module):
    """An LSTM, whose kernels go backward in training mode alone, and attention, whose kernels cannot be mapped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.attend = torch.nn.LSTM(5, 8, batch_first=True), torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        h, _ = self.rnn(x.unsqueeze(1).expand(-1, 4, -1))
        return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("rule", [EWC(), MAS(), Kronecker(labels="exact"), EWC(labels="true")], ids=repr)
def test_what_is_measured_over_data_with_sequences(rule):
    _, _, ours = learned(rule, OPTIMIZERS["adam"], "cuda", Sequence)
    _, _, theirs = learned(rule, OPTIMIZERS["adam"], "cpu", Sequence)
    for name, omega in theirs.anchor.omega.items():
        assert torch.allclose(ours.anchor.omega[name].cpu(), omega, rtol=1e-5, atol=1e-8 * float(omega.max())), name


def test_a_state_moves_between_devices(tmp_path):
    model, _, memory = learned(None, OPTIMIZERS["adam"], "cuda")
    memory.save(tmp_path / "state")
    twin = copy.deepcopy(model).cpu()
    other = Consolidator(twin, None, strength=0.3).attach(OPTIMIZERS["adam"](twin.parameters()))
    other.load(tmp_path / "state")
    for name, omega in memory.anchor.omega.items():
        assert torch.equal(omega.cpu(), other.anchor.omega[name])
    back = Consolidator(model, None, strength=0.3)
    back.load(tmp_path / "state")
    assert all(t.is_cuda for t in back.anchor.omega.values())
