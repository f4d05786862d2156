"""RainFusion2.0: the tile order, the counts of the published settings, ties, and forced blocks."""

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.rainfusion2 import RainFusion2, frame_tile_order, rows_kept
from dit_sparse.order import inverse, video_blocks


def test_golden_order() -> None:
    order = frame_tile_order(TokenGrid(3, 30, 52))
    assert torch.equal(order.sort().values, torch.arange(4680))
    places = (0, 7, 8, 63, 64, 1151, 1152, 1463, 1464, 1559)
    assert [int(order[p]) for p in places] == [0, 7, 52, 371, 8, 1243, 1248, 1559, 48, 1247]


@pytest.mark.parametrize("height, width", [(8, 8), (7, 7), (45, 80), (9, 17), (30, 52), (3, 40)])
@pytest.mark.parametrize("frames", [1, 3])
def test_order_and_inverse_on_any_size(height, width, frames) -> None:
    grid = TokenGrid(frames, height, width)
    order = frame_tile_order(grid)
    want = []
    tall, wide = height // 8, width // 8
    for f in range(frames):
        base = f * height * width
        for a in range(tall):
            for b in range(wide):
                want += [base + (a * 8 + i) * width + b * 8 + j for i in range(8) for j in range(8)]
        want += [base + i * width + j for i in range(tall * 8, height) for j in range(width)]
        want += [base + i * width + j for i in range(tall * 8) for j in range(wide * 8, width)]
    assert order.tolist() == want
    x = torch.randn(grid.video)
    assert torch.equal(x[order][inverse(order)], x)


@pytest.mark.parametrize(
    "grid, blocks, keep, sink, text, low, high",
    [
        (TokenGrid(21, 45, 80), 591, 119, 29, 0, 0.24054, 0.28720),
        (TokenGrid(21, 30, 52), 256, 52, 13, 0, 0.24359, 0.29179),
        (TokenGrid(33, 45, 80, text=256, text_at="back"), 929, 186, 29, 2, 0.22471, 0.25697),
    ],
    ids=["wan-720", "wan-480", "hunyuan"],
)
def test_published_counts(grid, blocks, keep, sink, text, low, high, make_call) -> None:
    method = RainFusion2(density=0.2, count_forced=False)
    call = make_call(grid, heads=1, head_dim=4)
    mask = method.plan(call).mask
    assert video_blocks(mask.query, grid) == blocks and mask.query.blocks == blocks + text
    assert rows_kept(0.2, blocks, sink, text, count_forced=False) == keep
    rows = mask.work()[0, 0]
    assert (rows[:sink] == blocks + text).all() and (rows[blocks:] == blocks + text).all()
    plain = rows[sink:blocks] - text
    assert plain.min() >= keep and plain.max() <= keep + sink
    assert low <= float(mask.density()) <= high


def test_published_counts_at_ninety_percent(make_call) -> None:
    mask = (
        RainFusion2(density=0.1, count_forced=False)
        .plan(make_call(TokenGrid(21, 45, 80), heads=1, head_dim=4))
        .mask
    )
    assert 0.1456 <= float(mask.density()) <= 0.1923


def test_counted_sink_leaves_equal_rows(make_call) -> None:
    """With the sink inside the density every other row keeps the same number: balanced work."""
    grid = TokenGrid(21, 30, 52)
    mask = RainFusion2(density=0.25).plan(make_call(grid, heads=2, head_dim=4)).mask
    rows = mask.work()[0, :, 13:]
    assert (rows == rows[0, 0]).all() and float(mask.density()) == pytest.approx(0.25, abs=0.005)


def test_density_one_is_dense_and_ties_keep_exactly_k(make_call) -> None:
    for grid in (TokenGrid(3, 9, 17), TokenGrid(5, 16, 16, text=30, text_at="front")):
        call = make_call(grid)
        assert RainFusion2(density=1.0, count_forced=False).plan(call).mask.token_mask().all()
        call.query, call.key = torch.ones_like(call.query), torch.ones_like(call.key)
        method = RainFusion2(density=0.3, sink=False, count_forced=False, block_size=32)
        mask = method.plan(call).mask
        video = video_blocks(mask.query, grid)
        kept = mask.to_dense()[..., :video, :video].sum(-1)
        assert (kept == rows_kept(0.3, video, 0, 0, count_forced=False)).all()


def test_best_blocks_are_those_of_the_pooled_scores(make_call) -> None:
    grid = TokenGrid(3, 16, 16, text=10, text_at="front")
    call = make_call(grid, batch=2)
    method = RainFusion2(density=0.3, sink=False, count_forced=False, block_size=64)
    mask = method.plan(call).mask
    order = frame_tile_order(TokenGrid(3, 16, 16)) + 10
    # (B, 12 blocks, H, D)
    means = [x[:, order].unflatten(1, (12, 64)).mean(2) for x in (call.query, call.key)]
    scores = torch.einsum("bqhd,bkhd->bhqk", *means)
    top = scores.topk(4, dim=-1).indices
    want = torch.zeros(2, 2, 12, 12, dtype=torch.bool).scatter_(-1, top, True)
    assert torch.equal(mask.to_dense()[..., :12, :12], want)
    assert not torch.equal(want[0], want[1]), "masks are per batch element"


def test_image_has_no_sink(make_call) -> None:
    mask = RainFusion2(density=0.25).plan(make_call(TokenGrid(1, 64, 64), heads=1)).mask
    assert float(mask.density()) == pytest.approx(0.25, abs=0.01)
