"""Jenga's block carving: counts of the paper, blocks that touch, stages and warm-up, densities."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.blockmask import BlockLayout
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import build, family_options
from dit_sparse.methods.jenga import Jenga
from dit_sparse.order import layout, morton, tile, video_blocks
from dit_sparse.patterns import touching_blocks
from dit_sparse.scoring import pooled_scores

GRID = TokenGrid(4, 9, 11, text=40, text_at="front")


@pytest.mark.parametrize("p, drop, kept", [(0.3, 0.75, 1), (0.85, 0.75, 3), (0.3, 0.2, 4), (0.95, 0.9, 4)])
def test_count_of_a_row(p: float, drop: float, kept: int) -> None:
    """max(int((1 - drop) n), #{cumulated share <= p} + 1)."""
    shares = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    assert max(int((1 - drop) * 5), int((shares.cumsum(0) <= p).sum()) + 1) == kept
    rule = Jenga(drop=drop, p=p).rule(BlockLayout.raster(80, 16), TokenGrid(1, 1, 80), drop)
    keep = rule.keep(shares.log().expand(1, 1, 5, 5))
    assert keep[0, 0, 0].tolist() == [i < kept for i in range(5)]


@pytest.mark.parametrize("grid, blocks, counts", [(TokenGrid(33, 45, 80), 929, (232, 139)),
                                                  (TokenGrid(21, 45, 80), 591, (147, 88))], ids=str)
def test_counts_at_720p(grid: TokenGrid, blocks: int, counts: tuple[int, int]) -> None:
    """Of 929 and 591 blocks 232/139 and 147/88 are kept at a drop of .75/.85, and those that touch."""
    for drop, count in zip((0.75, 0.85), counts, strict=True):
        method = Jenga(drop=drop, p=0.0)
        made = method.layout(grid)
        assert made.blocks == blocks and made.block_size == 128
        assert int(method.rule(made, grid, drop).keep(torch.randn(1, 1, 1, blocks)).sum()) == count


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 7, 9), TokenGrid(3, 1, 13, text=5, text_at="back")], ids=str)
@pytest.mark.parametrize("order", ["raster", "morton", "tiles"])
def test_touching_blocks_are_those_with_neighbouring_tokens(grid: TokenGrid, order: str) -> None:
    video = TokenGrid(*grid.sizes)
    if order == "tiles":
        places, lengths = tile(video, (2, 2, 4))
        blocks = layout(grid, places, 16, lengths=lengths)
    else:
        blocks = layout(grid, morton(video) if order == "morton" else None, 16)
    at, block = grid.coordinates(), blocks.block_of_token.reshape(-1)[grid.video_slice]
    near = ((at[:, None] - at).abs() <= 1).all(-1)
    want = torch.zeros(blocks.blocks, blocks.blocks, dtype=torch.bool)
    for i, j in near.nonzero().tolist():
        want[block[i], block[j]] = True
    got = touching_blocks(blocks, grid)
    assert torch.equal(got, want) and torch.equal(got, got.T)


@pytest.mark.parametrize("options", [{}, {"drop": 0.9, "p": 0.7, "order": "raster"}, {"density": 0.5}], ids=str)
def test_mask_is_the_formula(options: dict, make_call) -> None:
    """Row by row: the best blocks, those that touch, and text."""
    key_mask = torch.rand(2, GRID.tokens) < 0.8
    call = make_call(GRID, batch=2, head_dim=16, key_mask=key_mask)
    call.key[~key_mask] = torch.nan
    method = Jenga(block_size=32, **options)
    mask = method.plan(call).mask
    blocks, video = mask.query, video_blocks(mask.query, GRID)
    clean = call.key.masked_fill(~key_mask[..., None, None], 0)
    scores = pooled_scores(call.query, clean, blocks, blocks, call.scale, key_mask=key_mask)[..., :video, :video]
    touching, got = touching_blocks(blocks, GRID)[:video, :video], mask.to_dense()
    drop = 0.85 if "drop" not in options else 0.9
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(video)).tolist():
        share, place = scores[b, h, i].softmax(-1).sort(descending=True, stable=True)
        if method.density is None:
            count = max(int((1 - drop) * video), int((share.cumsum(0) <= method.p).sum()) + 1)
            want = set(place[:count].tolist()) | set(touching[i].nonzero()[:, 0].tolist())
            assert set(got[b, h, i, :video].nonzero()[:, 0].tolist()) == want
        else:
            near = set(touching[i].nonzero()[:, 0].tolist())
            kept = set(got[b, h, i, :video].nonzero()[:, 0].tolist())
            others = [int(j) for j in place if int(j) not in near]
            assert near <= kept and kept - near == set(others[: len(kept - near)])
    assert got[..., video:, :].all() and got[..., video:].all()


def test_stages_and_warm_up() -> None:
    method = Jenga(drop=(0.7, 0.8), p=0.3)
    drops = [method.drop_at(step, 50) for step in range(50)]
    assert drops[0] == 0 and drops[2] == pytest.approx(0.7 * 10 * 2 / 49) and drops[5:25] == [0.7] * 20
    assert drops[25:] == [0.8] * 25
    assert Jenga(drop=(0.75, 0.8, 0.85), warm_up=False).drop_at(14, 50) == 0.75
    assert [Jenga(drop=(0.75, 0.8, 0.85)).drop_at(step, 50) for step in (15, 24, 25)] == [0.8, 0.8, 0.85]
    assert Jenga(drop=0.6).drop_at(3, None) == 0.6 and Jenga(drop=0.6).drop_at(0, 1) == 0.6
    assert build("jenga", drop=[0.7, 0.8]).drop == (0.7, 0.8)


def test_a_small_drop_is_dense(make_call) -> None:
    """As in the reference on Wan: up to .25 no mask is made."""
    method = Jenga(drop=0.75, block_size=32)
    kinds = [method.plan(make_call(GRID, step=step, num_steps=50)).mask is None for step in range(6)]
    assert kinds == [True, True, False, False, False, False]  # 0, .153, .306 ...
    assert Jenga(density=0.3, block_size=32).plan(make_call(GRID, step=0, num_steps=50)).mask is not None


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(21, 45, 80), TokenGrid(17, 32, 32), TokenGrid(1, 64, 64), TokenGrid(9, 16, 16),
     TokenGrid(13, 30, 45, text=226, text_at="front")],
    ids=str,
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    method = build("jenga")
    blocks = method.layout(grid)
    video = video_blocks(blocks, grid)
    forced = float(touching_blocks(blocks, grid).sum()) / blocks.blocks**2 + 1 - (video / blocks.blocks) ** 2
    for density in (0.15, 0.25, 0.5):
        got = float(method.at_density(density).plan(call).mask.density())
        assert abs(got - max(density, forced)) <= 0.03


def test_family_defaults() -> None:
    assert family_options("jenga", "wan")["p"] == 0.9 and family_options("jenga", "hunyuan")["drop"] == (0.75, 0.85)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"drop": 1.5}, "drop=1.5"),
        ({"drop": (0.5, 0.6, 0.7, 0.8)}, "2 or 3 stages"),
        ({"p": -1}, "p=-1"),
        ({"density": 0}, "density=0"),
        ({"warm_up": 1}, "True or False"),
        ({"order": "gilbert"}, "hilbert, raster"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("jenga", **options)
    assert "\n" not in str(caught.value)
