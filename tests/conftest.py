"""For every test: unwritten memory is NaN, and random numbers are the same in every run."""

import os

import poison
import pytest
import torch

# tensors are small: threads that wait for each other take ten times as long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison.install()
    yield
    poison.uninstall()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """TILEMASK_SHARD=i/n keeps every n-th test from number i on: for several processes at once."""
    shard = os.environ.get("TILEMASK_SHARD")
    if shard:
        index, count = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[t for n, t in enumerate(items) if n % count != index])
        items[:] = items[index::count]
