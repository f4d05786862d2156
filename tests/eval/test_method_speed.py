"""The table of methods at a model's geometry, at a tiny one."""

from __future__ import annotations

import pytest

from dit_sparse.eval.method_speed import COLUMNS, bench_methods, main
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import all_methods


def test_every_method_has_a_row_with_its_density_and_the_speedup_counts_the_plan():
    rows = bench_methods(TokenGrid(5, 9, 11, text=7, text_at="back"), 2, 64, dtype="fp32", device="cpu", seconds=0.01)
    assert {row.method for row in rows} == set(all_methods())
    dense, *sparse = rows
    assert dense.method == "dense" and dense.density == dense.speedup == 1.0
    for row in sparse:
        assert 0 < row.density < 1 and row.backend and len(row.cells()) == len(COLUMNS)
        expected = dense.attention_ms / (row.plan_ms + row.attention_ms)
        assert abs(row.speedup - expected) < 1e-9


@pytest.mark.parametrize(("words", "expected"), [
    (["--density", "2"], "(0, 1]"), (["--method", "magic"], "radial"), (["--grid", "5by5"], "height"),
    (["--device", "cuda:99"], "is not there"),
])
def test_misuse_is_told_before_anything_is_measured(monkeypatch, capsys, words, expected):
    monkeypatch.setattr("sys.argv", ["method_speed", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert expected in capsys.readouterr().err


def test_the_folder_of_the_results_is_made(monkeypatch, tmp_path):
    out = tmp_path / "new" / "methods.json"
    words = ["--grid", "1x8x8", "--heads", "1", "--head-dim", "16", "--dtype", "fp32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["method_speed", *words, "--method", "radial", "--out", str(out)])
    main()
    assert out.is_file()
