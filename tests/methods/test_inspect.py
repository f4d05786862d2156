"""Inspecting a method on a grid: numbers, table, JSON, picture."""

import json
from pathlib import Path

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import inspect_method, planted_call
from dit_sparse.methods import all_methods


@pytest.mark.parametrize("name", sorted(all_methods()))
@pytest.mark.parametrize("grid", [TokenGrid(4, 9, 13, text=20, text_at="front"), TokenGrid(1, 1, 1)], ids=str)
def test_report(name, grid, tmp_path: Path) -> None:
    picture = None if name == "dense" else tmp_path / "mask.png"
    report = inspect_method(name, grid, {}, picture)
    assert 0 < report.density <= 1 and report.speedup == pytest.approx(1 / report.density)
    assert report.speedup_blocks <= report.speedup * (1 + 1e-6)
    assert json.loads(json.dumps(report.to_dict()))["method"] == name
    rows = dict(report.rows())
    assert name in rows["method"] and "note" in rows
    if picture is not None:
        from PIL import Image

        with Image.open(picture) as image:
            assert image.format == "PNG" and image.width >= 480 and len(image.getcolors(2**20)) > 2


def test_heads_of_a_table_are_all_shown(tmp_path: Path) -> None:
    options = {"tile_windows": ((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)), "tile": (2, 4, 4)}
    report = inspect_method("gna", TokenGrid(4, 8, 8), options, tmp_path / "mask.png")
    assert len(report.head_density) == 4


def test_numbers_on_a_known_grid() -> None:
    report = inspect_method("radial", TokenGrid(18, 48, 80))
    assert (report.query_blocks, report.block_size, report.tokens) == (540, 128, 69120)
    assert report.density == pytest.approx(1 - 0.71287, abs=1e-5)
    assert report.blocks_mean == pytest.approx(83728 / 540) and report.mask_bytes < 2 * 2**20


def test_refusals(tmp_path: Path) -> None:
    grid = TokenGrid(2, 3, 4)
    with pytest.raises(ValueError, match="unknown method"):
        inspect_method("nope", grid)
    with pytest.raises(ValueError, match="no mask to draw"):
        inspect_method("dense", grid, {}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="does not fit"):
        inspect_method("gna", grid, {"window": (3, 3, 3)})


def test_planted_heads_look_where_they_say() -> None:
    grid = TokenGrid(6, 5, 7, text=3, text_at="back")
    call = planted_call(grid, heads=4, head_dim=64)
    video = slice(0, grid.video)
    q, k = (x[0, video].transpose(0, 1) for x in (call.query, call.key))
    probs = (q @ k.transpose(1, 2) * call.scale).softmax(-1)
    token = torch.arange(grid.video)
    same_frame = token[:, None] // 35 == token // 35
    same_place = token[:, None] % 35 == token % 35
    assert (probs[0] * same_frame).sum(-1).mean() > 0.99 and (probs[1] * same_place).sum(-1).mean() > 0.99
    assert (probs[2] * same_frame).sum(-1).mean() < 0.4
    assert (probs[3] * same_frame).sum(-1).mean() > 0.99, "after three heads the kinds repeat"
