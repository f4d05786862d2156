"""Settings every test shares: no network, few threads, no colours in captured output."""

import os
import shutil
from collections.abc import Iterator

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Inductor writes C++: on a machine without a compiler the tests that are named after it are skipped."""
    if os.environ.get("CXX") or shutil.which("g++"):
        return
    for item in items:
        if "inductor" in item.name:
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler: sudo apt install g++"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same state of the global generators."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
