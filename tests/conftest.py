import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the tests run its kernels on the CPU

torch.set_num_threads(1)  # tests run side by side, and two threads each would wait for one another


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
