"""The GPU checks of reuse, rehearsed on a CPU at a small grid."""

from __future__ import annotations

import pytest

from dit_sparse.grid import TokenGrid
from tests.gpu import reuse_checks

GRID = TokenGrid(3, 7, 9, text=11, text_at="front")


@pytest.mark.parametrize("method", reuse_checks.METHODS)
def test_every_check_runs(method: str) -> None:
    assert reuse_checks.complement(method, GRID, "cpu", lambda on: None) == ""
    assert reuse_checks.heads(method, GRID, "cpu", lambda on: None) == ""


def test_fixed_keys() -> None:
    assert reuse_checks.fixed_keys("cpu") == ""
