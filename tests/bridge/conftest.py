"""Diffusers keeps a process-wide attention backend, which model.set_attention_backend changes: put it back."""

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry


@pytest.fixture(autouse=True)
def _same_backend() -> Iterator[None]:
    before = Registry._active_backend
    yield
    Registry._active_backend = before
