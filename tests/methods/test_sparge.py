"""SpargeAttn: the cdf rule and the test of likeness by hand, the mask against the paper's loop, the second filter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_sparse.blockmask import BlockLayout
from dit_sparse.gilbert import gilbert
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.sparge import Sparge, similarity
from dit_sparse.operators import Drop, SkipBlocks
from dit_sparse.order import video_blocks
from dit_sparse.selection import select_top_p

GRIDS = [
    TokenGrid(5, 7, 9),
    TokenGrid(3, 9, 11, text=40, text_at="front"),
    TokenGrid(1, 20, 23, text=5, text_at="back"),
    TokenGrid(1, 1, 1, text=3, text_at="front"),
]


def attend(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The sparse kernel with the scale of the calls here."""
    return block_sparse_attention(*arguments, scale=16**-0.5)


# -- the rules by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau, count", [(0.3, 1), (0.84, 2), (0.86, 3), (0.96, 4), (1.0, 5)])
def test_cdf_by_hand(tau: float, count: int) -> None:
    """The block that takes the sum beyond tau is not kept."""
    shares = torch.tensor([[0.15, 0.5, 0.05, 0.2, 0.1]])
    keep = select_top_p(shares, tau, crossing=False)
    assert int(keep.sum()) == count and torch.equal(keep, shares >= shares.sort(descending=True).values[:, count - 1])


def test_top_k_counts_down(make_call) -> None:
    """Half of nine blocks are four."""
    method = Sparge(density=0.5, count_forced=False, block_size=32, key_block_size=32)
    mask = method.plan(make_call(TokenGrid(1, 9, 32))).mask
    assert (mask.work() == 4).all()


def test_likeness_of_blocks() -> None:
    """1 for equal tokens, 1 / n for tokens at random, 1/2 for two kinds; short blocks and zeros are no NaN."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 128, generator=generator)
    kinds[1] -= kinds[0] * (kinds[0] @ kinds[1]) / kinds[0].square().sum()
    blocks = BlockLayout.raster(194, 64)
    x = torch.cat((kinds[:1].expand(64, -1), torch.randn(64, 128, generator=generator), kinds.repeat_interleave(32, 0),
                   torch.zeros(2, 128)))[None, :, None]
    found = similarity(x, blocks)[0, 0]
    assert found.tolist() == pytest.approx([1, 1 / 64, 0.5, 0], abs=0.005)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(similarity(x.to(dtype), blocks)[0, 0], found, atol=1e-2, rtol=0)
    assert similarity(torch.randn(1, 130, 2, 8), BlockLayout.raster(130, 64)).isfinite().all()


@pytest.mark.parametrize("centre", [False, True])
def test_likeness_is_the_mean_cosine(centre: bool) -> None:
    x, blocks = torch.randn(2, 113, 3, 8) + 1, BlockLayout.raster(113, 32)
    mask = torch.rand(2, 113) < 0.7
    spoilt = x.masked_fill(~mask[..., None, None], torch.nan)
    got = similarity(spoilt, blocks, centre=centre, mask=mask)
    for b in range(2):
        for i in range(4):
            chosen = torch.arange(113)[mask[b] & (torch.arange(113) // 32 == i)]
            for h in range(3):
                rows = x[b, chosen, h] - (x[b, mask[b], h].mean(0) if centre else 0)
                cosine = torch.cosine_similarity(rows[:, None], rows, dim=-1)
                torch.testing.assert_close(got[b, h, i], cosine.mean(), atol=1e-5, rtol=1e-4)


# -- the mask ------------------------------------------------------------------------------------------------------


def _block_map(call: Call, method: Sparge, queries: BlockLayout, keys: BlockLayout) -> torch.Tensor:
    """bool (B, H, nq, nk): the paper's algorithm, block by block; text on top."""
    made = torch.zeros(call.query.shape[0], call.query.shape[2], queries.blocks, keys.blocks, dtype=torch.bool)
    for b, h in torch.cartesian_prod(*map(torch.arange, made.shape[:2])).tolist():
        real = torch.ones(call.grid.tokens, dtype=torch.bool) if call.key_mask is None else call.key_mask[b]
        smooth = call.key[b, real, h].mean(0) if method.smooth else 0

        def tokens(blocks: BlockLayout, block: int, real: torch.Tensor) -> torch.Tensor:
            token = blocks.token_of_slot[block * blocks.block_size : (block + 1) * blocks.block_size]
            return token[(token >= 0) & real[token]]

        def trusted(x: torch.Tensor) -> bool:
            return bool(torch.cosine_similarity(x[:, None], x, dim=-1).mean() > method.theta)

        every = torch.ones_like(real)
        q = [call.query[b, tokens(queries, i, every), h] for i in range(queries.blocks)]
        k = [call.key[b, tokens(keys, j, real), h] for j in range(keys.blocks)]
        good = torch.tensor([trusted(x - smooth) for x in k])
        for i, rows in enumerate(q):
            scores = torch.stack([rows.mean(0) @ x.mean(0) * call.scale for x in k]).masked_fill(~good, -torch.inf)
            shares = scores.softmax(-1).nan_to_num(0)
            value, place = shares.sort(descending=True, stable=True)
            count = int((value.cumsum(0) <= method.tau).sum())
            if method.density is not None:
                place, count = scores.sort(descending=True, stable=True).indices, int(method.density * keys.blocks)
            made[b, h, i, place[: max(count, 1)]] = True
            made[b, h, i] |= ~good | (not trusted(rows))
    made[..., video_blocks(queries, call.grid) :, :] = made[..., video_blocks(keys, call.grid) :] = True
    return made


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"density": None, "tau": 0.7},
        {"density": None, "tau": 0.6, "theta": 0.12},
        {"density": None, "tau": 0.6, "theta": 0.12, "smooth": False, "order": "gilbert"},
        {"density": 0.4, "theta": 0.12, "count_forced": False},
        {"density": 0.4, "count_forced": False, "order": "gilbert"},
    ],
    ids=str,
)
def test_mask_is_the_algorithm(grid: TokenGrid, options: dict, make_call) -> None:
    call = make_call(grid, batch=2, head_dim=16)
    alike = torch.arange(grid.tokens) // 20 % 2 == 0  # some blocks pass the test, others do not
    call.query[:, alike] += 0.6
    call.key[:, alike] += 0.6
    method = Sparge(block_size=32, **options)
    plan = method.plan(call)
    want = _block_map(call, method, plan.mask.query, plan.mask.key)
    assert torch.equal(plan.mask.to_dense(), want)
    assert plan.mask.query.block_size == 32 and plan.mask.key.block_size == 16 and plan.operator == Drop()


def test_masked_keys(make_call) -> None:
    """Keys that are no tokens, NaN here, take part in nothing."""
    grid = TokenGrid(3, 9, 11, text=9, text_at="back")
    call = make_call(grid, batch=2, head_dim=16)
    key_mask = torch.rand(2, grid.tokens) < 0.8
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    call = dataclasses.replace(call, key_mask=key_mask)
    for options in ({"theta": 0.1}, {"theta": 0.1, "tau": 0.5, "density": None}):
        method = Sparge(block_size=32, count_forced=False, **options)
        mask = method.plan(call).mask
        assert torch.equal(mask.to_dense(), _block_map(call, method, mask.query, mask.key))
    out, _ = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale, key_mask=key_mask)
    assert out.isfinite().all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_everything_kept_is_dense(grid: TokenGrid, make_call) -> None:
    """All of the blocks, no block trusted, or a share of 1."""
    call = make_call(grid, head_dim=16)
    want, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)
    every = {"density": 1.0}
    for options in (every, {**every, "count_forced": False}, {"theta": 1.0}, {"density": None, "tau": 1}):
        mask = Sparge(block_size=32, **options).plan(call).mask
        assert mask.token_mask().all(), options
        torch.testing.assert_close(attend(call.query, call.key, call.value, mask)[0], want, atol=1e-5, rtol=1e-5)


def test_few_heads_at_a_time_give_the_same(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(TokenGrid(4, 8, 8, text=20, text_at="back"), batch=2, heads=3)
    for options in ({"density": None, "tau": 0.6}, {"theta": 0.16}):
        masks = []
        for numbers in (2**26, 500):
            monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", numbers)
            masks.append(Sparge(block_size=32, **options).plan(dataclasses.replace(call)).mask)
        assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


def test_no_variant_waits(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    for options in ({"density": None, "theta": 0.3}, {"theta": 0.3}, {"density": None}):
        method = Sparge(block_size=32, **options)
        method.plan(call)
        with no_waiting():
            method.plan(dataclasses.replace(call)).mask.density()


# -- the second filter ---------------------------------------------------------------------------------------------


def test_second_filter_leaves_out_what_is_lost(make_call) -> None:
    """At 50 nothing changes; a low number leaves out blocks, and a row loses less than 2^-skip for every key."""
    call = make_call(TokenGrid(4, 8, 8), head_dim=16)
    call.query[..., 0] = call.key[:, :16, :, 0] = 8
    mask = Sparge(block_size=32).plan(call).mask
    full, full_lse = attend(call.query, call.key, call.value, mask)
    for skip in (50, 10):
        plan = Sparge(block_size=32, skip=skip).plan(call)
        assert plan.operator == SkipBlocks(2.0**-skip, first="list") and torch.equal(plan.mask.lists, mask.lists)
        out, lse = plan.operator.run(call, plan.mask, attend)
        lost = 1 - (lse - full_lse).exp()
        assert lost.max() <= 2.0**-skip * 256 + 1e-5
        computed = float(plan.operator.computed(call, plan.mask))
        if skip == 50:
            torch.testing.assert_close(out, full, atol=1e-5, rtol=1e-5)
            assert computed == pytest.approx(float(mask.density()))
        else:
            assert computed < float(mask.density())


# -- the curve -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(21, 45, 80), (3, 7, 5), (21, 30, 52), (8, 8, 8)], ids=str)
def test_curve_visits_every_cell_once(sizes: tuple[int, int, int]) -> None:
    grid = TokenGrid(*sizes)
    order = gilbert(grid)
    assert torch.equal(order.sort().values, torch.arange(grid.video))
    at = grid.coordinates()[order].long()
    steps = (at[1:] - at[:-1]).abs().sum(1)
    assert steps.max() <= 2
    if sizes == (8, 8, 8):
        assert steps.max() == 1
    if sizes == (21, 45, 80):
        assert int((steps == 2).sum()) == 360
        place = torch.empty_like(order).scatter_(0, order, torch.arange(grid.video)).reshape(sizes)
        assert [int(place[t, y, x]) for x, y, t in [(0, 1, 0), (0, 0, 1), (40, 22, 10), (79, 44, 20)]] == [
            3, 7, 51127, 63395]
        assert int(place[0, 0, 79]) == 75599


def test_curve_makes_compact_blocks() -> None:
    """Extents of blocks of 128 tokens, frames, rows and columns added up: 18.4, in raster order 84.7."""
    grid = TokenGrid(21, 45, 80)

    def extent(order: torch.Tensor) -> float:
        blocks = grid.coordinates()[order][: 590 * 128].reshape(590, 128, 3)
        return float((blocks.amax(1) - blocks.amin(1) + 1).sum(-1).double().mean())

    assert extent(gilbert(grid)) == pytest.approx(18.4, abs=0.1)
    assert extent(torch.arange(grid.video)) == pytest.approx(84.7, abs=0.1)


# -- densities and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(5, 20, 30, text=226, text_at="front")], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    text = 1 - (grid.video / grid.tokens) ** 2
    for density in (0.15, 0.5):
        got = float(Sparge().at_density(density).plan(make_call(grid, heads=1)).mask.density())
        assert abs(got - max(density, text + (1 - text) * density / 2)) <= 0.03, density


def test_blocks_that_fail_are_part_of_the_density(make_call) -> None:
    """One token in sixteen is like no other: its blocks take rows and columns, the others share what is left."""
    grid = TokenGrid(9, 16, 16)
    call = make_call(grid, head_dim=32)
    for x in (call.query, call.key):
        x[:, grid.tokens // 16 :] += 1.5
    method = Sparge(theta=0.3, smooth=False)
    rows, columns = method.untrusted(call, *method.layouts(grid))
    assert 0.04 < float(rows.double().mean()) < 0.1 and 0.04 < float(columns.double().mean()) < 0.1
    assert float(method.plan(call).mask.density()) == pytest.approx(0.5, abs=0.03)
    on_top = dataclasses.replace(method, count_forced=False).plan(call).mask.density()
    assert 0.53 < float(on_top) < 0.6


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, "density=0"),
        ({"tau": 2}, "tau=2"),
        ({"theta": -2}, "theta=-2"),
        ({"skip": -1}, "skip=-1"),
        ({"count_forced": 1}, "True or False"),
        ({"smooth": None}, "True or False"),
        ({"order": "hilbert"}, "raster, gilbert"),
        ({"block_size": 48}, "block_size=48"),
        ({"key_block_size": 8}, "key_block_size=8"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("sparge", **options)
    assert "\n" not in str(caught.value)
