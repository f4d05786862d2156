"""What the tests of methods share: made-up calls, and a guard against waiting for the device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.base import Call
from tests.waits import Waits


@pytest.fixture(autouse=True, scope="package")
def _poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context in which nothing may wait for the device."""

    @contextmanager
    def guard() -> Iterator[None]:
        with Waits():
            yield

    return guard


@pytest.fixture
def make_call() -> Callable[..., Call]:
    """Builds a call with random activations and a cache that counts how often it builds."""

    def make(
        grid: TokenGrid, *, batch: int = 1, heads: int = 2, head_dim: int = 8, seed: int = 0, **extra: Any
    ) -> Call:
        generator = torch.Generator().manual_seed(seed)
        query, key, value = torch.randn(3, batch, grid.tokens, heads, head_dim, generator=generator).unbind(0)
        store: dict[Any, Any] = {}

        def cached(name: Any, build: Callable[[], Any]) -> Any:
            if name not in store:
                store[name] = build()
            return store[name]

        call = Call(query, key, value, grid, head_dim**-0.5, cached=cached, generator=generator, **extra)
        call.store = store  # type: ignore[attr-defined]
        return call

    return make
