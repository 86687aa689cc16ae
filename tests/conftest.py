import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from dense import ENGINES
from rwalk import kernels
from rwalk.gradients import layerwise, over_data

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the tests run its kernels on the CPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit it, and the tests press Ctrl-C on them

torch.set_num_threads(1)  # tests run side by side, and two threads each would wait for one another

PHASES = [phase for phase in Phase if phase is not Phase.explain]  # takes minutes for little
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine is no failure
settings.register_profile("quick", **UNTIMED, phases=PHASES, derandomize=True, max_examples=100)
settings.register_profile("thorough", **UNTIMED, phases=PHASES, max_examples=3_000)  # anew at each run
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_kernels():
    """Let tests run in plain PyTorch unless they say otherwise, and leave no choice of a backend to the next one."""
    kernels.use("blocked")
    yield
    kernels.use("blocked")


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Have all parameters go layer by layer where they can, or by `vmap`, or example by example."""
    if request.param != "layers":
        monkeypatch.setattr(layerwise, "ROOTS", {})
    if request.param == "alone":

        def refuse(*_):
            raise RuntimeError("not today")

        monkeypatch.setattr(over_data, "mapped", refuse)
    return request.param
