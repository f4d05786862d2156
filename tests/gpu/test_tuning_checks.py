"""The GPU checks of the tuner's parts, rehearsed on a CPU."""

from __future__ import annotations

from dit_sparse.grid import TokenGrid
from tests.gpu import tuning_checks


def test_every_check_runs() -> None:
    assert tuning_checks.oracle(TokenGrid(3, 7, 9, text=11, text_at="front"), "cpu") == ""
    assert tuning_checks.costs("cpu", TokenGrid(2, 7, 9), seconds=0.2) == ""
