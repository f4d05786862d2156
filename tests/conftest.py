"""Settings every test shares: no network, few threads, no colours in captured output."""

import os

# Before anything imports the hub client, transformers or diffusers: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("COLUMNS", "120")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """One thread in each test process: pytest-xdist gives every core a process of its own."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same state of the global generators."""
    torch.manual_seed(0)
