import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the tests run its kernels on the CPU

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests run side by side, and two threads each would wait for one another

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=3_000)  # --hypothesis-profile=thorough: anew at each run
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
