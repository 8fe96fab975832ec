"""For every test: unwritten memory is NaN, and random numbers are the same in every run."""

import poison
import pytest
import torch

torch.set_num_threads(
    1
)  # tensors are small: threads that wait for each other take ten times as long


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison.install()
    yield
    poison.uninstall()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
