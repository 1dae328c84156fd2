"""For all tests."""

import os

import torch


def pytest_configure() -> None:
    """Share the cores: workers that each take all of them wait for one another most of the time."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(share)
    os.environ["OMP_NUM_THREADS"] = str(share)  # for the programs that tests start
