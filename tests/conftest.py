import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the tests run its kernels on the CPU

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, and two threads each would wait for one another


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
