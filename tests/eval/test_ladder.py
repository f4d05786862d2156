"""The ladder of kernels: every rung computes attention over its own lists, and what cannot run is told."""

import csv
import pathlib
from typing import Any

import pytest
import torch

from dit_sparse.eval import ladder
from dit_sparse.eval.ladder import bench_ladder, rungs, uneven, write
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.reference import block_sparse_reference

GRID = TokenGrid(3, 9, 20)


def on_cpu(monkeypatch: pytest.MonkeyPatch, seen: list[Any] | None = None) -> None:
    """The Hopper kernels' rungs by the formula."""

    def hopper(query, key, value, blocks: Blocks, scale: float, tuning: Tuning) -> Any:
        if seen is not None:
            seen.append((blocks, tuning))
        return block_sparse_reference(query, key, value, blocks, scale, None)

    monkeypatch.setattr(ladder, "_hopper", hopper)
    monkeypatch.setattr(ladder, "block_sparse_attention_fp8", lambda *a: block_sparse_reference(*a, None))


def test_every_rung_computes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    on_cpu(monkeypatch, seen)
    query, key, value = torch.randn(3, 1, GRID.tokens, 4, 16).unbind(0)
    found = {rung.name: rung for rung in rungs(query, key, value, GRID, 0.4)}
    assert len(found) == 10 and next(iter(found)) == "dense"
    for name, rung in found.items():
        out = rung.call()
        out = out[0] if isinstance(out, tuple) else out
        assert out.shape == query.shape and out.isfinite().all(), name
        assert name == "dense" or 0.2 < rung.density < 0.7, name
    assert [tuning.cuda for _, tuning in seen[:2]] == [False, None] and seen[0][0].lists is seen[1][0].lists
    (boxes, ragged), (packed, _), (apart, in_order), (same, longest) = seen[2:]
    assert boxes.query_box is not None and ragged.ragged_boxes and packed.query_index is not None
    assert packed.query_blocks < boxes.query_blocks  # no padding
    assert apart is same or torch.equal(apart.lists, same.lists)
    assert not in_order.longest_first and longest.longest_first


def test_rows_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    on_cpu(monkeypatch)
    failed: dict[str, str] = {}
    rows = bench_ladder(GRID, 2, 16, density=0.4, device="cpu", dtype="fp32", rounds=2, on_failure=failed.setdefault)
    assert not failed and [row.rung for row in rows][:2] == ["dense", "PyTorch's CPU kernel"]
    assert rows[0].speedup == 1 and all(row.milliseconds > 0 and row.tflops > 0 for row in rows)
    assert all(len(row.cells()) == len(ladder.COLUMNS) for row in rows)
    table, _, picture = write(rows, tmp_path / "new", "a title", "a machine")
    with table.open() as file:
        assert [line["rung"] for line in csv.DictReader(file)] == [row.rung for row in rows]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture.unlink()
    assert ladder.main(["--redraw", str(tmp_path / "new")]) == 0 and picture.exists()


def test_the_program_prints_and_writes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--grid", "2x9x10", "--heads", "1", "--head-dim", "16", "--rounds", "2", "--device", "cpu"]
    assert ladder.main([*words, "--dtype", "fp32", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not measured: Hopper kernel (Gluon): " in out and "x dense" in out and "ladder.csv" in out
    for wrong, said in ((["--grid", "5by5"], "frames x height x width"), (["--density", "0"], "(0, 1]")):
        with pytest.raises(SystemExit, match="2"):
            ladder.main(wrong)
        assert said in capsys.readouterr().err


def test_what_cannot_run_is_told() -> None:
    failed: dict[str, str] = {}
    rows = bench_ladder(GRID, 1, 16, density=0.4, device="cpu", dtype="fp32", rounds=2, on_failure=failed.setdefault)
    ran = {row.rung for row in rows}
    assert {"dense", "PyTorch's CPU kernel", "Hopper, and soft blocks for the rest"} <= ran
    assert "Hopper kernel (Gluon)" in failed and all("\n" not in why for why in failed.values())


@pytest.mark.parametrize(("heads", "density"), [(1, 0.3), (12, 0.25), (40, 0.2), (5, 0.9)])
def test_uneven_heads_have_the_mean_density(heads: int, density: float) -> None:
    found = uneven(heads, density)
    assert len(found) == heads and found == sorted(found) and 0 < found[0] <= found[-1] <= 1
    assert sum(found) / heads == pytest.approx(density, rel=0.01)
    assert heads < 12 or found[-1] > 5 * found[0]


def test_the_launch_order_with_and_without_the_longest_first() -> None:
    pytest.importorskip("triton")
    from dit_sparse.kernels.portable import launch_order

    counts = torch.tensor([[[1, 1, 9], [1, 5, 1]]], dtype=torch.int32)
    assert launch_order(counts, 1, 2).tolist() == [2, 0, 1, 3, 4, 5]
    assert launch_order(counts, 1, 2, longest_first=False).tolist() == [0, 1, 2, 3, 4, 5]
    assert launch_order(counts, 2, 2, longest_first=False).tolist() == list(range(12))
