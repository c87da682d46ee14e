import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports it: a test that asks the hub waits for a minute

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable():
    """Every test starts from the same random state and stays on one thread, so that it says the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
