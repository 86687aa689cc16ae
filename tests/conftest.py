import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, and two threads each would wait for one another


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
