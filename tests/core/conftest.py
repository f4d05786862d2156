"""Core tests run in deterministic mode, which fills fresh memory with NaN (or the largest integer)."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples on every run, and no time limit for one of them: the machine may be busy.
settings.register_profile("core", deadline=None, derandomize=True)
settings.load_profile("core")


@pytest.fixture(autouse=True, scope="package")
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
