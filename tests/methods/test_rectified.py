"""Rectified SpaAttn: the curve and its neighbours, shares of means, the correction against its formula."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.gilbert import gilbert, neighbour_blocks
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.rectified import Rectified
from dit_sparse.operators import Drop
from dit_sparse.operators_rectified import Rectify, pooled_shares
from dit_sparse.order import layout, video_blocks
from dit_sparse.processor import SparseProc
from dit_sparse.scoring import mean_deviation, pool
from dit_sparse.session import RunSession


def _attend(call: Call) -> functools.partial:
    return functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)


# -- the curve -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, blocks, mean, most",
    [((21, 45, 80), 591, 17.30, 29), ((33, 45, 80), 929, 18.86, 33), ((21, 30, 52), 256, 17.08, None),
     ((1, 256, 256), 512, 8.07, None)],
)
def test_published_neighbours(sizes: tuple, blocks: int, mean: float, most: int | None) -> None:
    grid = TokenGrid(*sizes)
    near = neighbour_blocks(grid, gilbert(grid), 128)
    assert near.shape == (blocks, blocks) and torch.equal(near, near.T)
    counts = near.sum(1)
    assert float(counts.float().mean()) == pytest.approx(mean, abs=0.005)
    assert most is None or int(counts.max()) == most


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (17, 2, 3), (1, 1, 9), (9, 1, 1), (2, 3, 2), (5, 16, 11)])
def test_curve_visits_every_cell_and_stays_near(sizes: tuple) -> None:
    grid = TokenGrid(*sizes)
    order = gilbert(grid)
    assert torch.equal(order.sort().values, torch.arange(grid.video))
    at = grid.coordinates()[order].long()
    assert not len(at[1:]) or int((at[1:] - at[:-1]).abs().max()) <= 3


def test_neighbours_are_those_of_the_cells() -> None:
    grid = TokenGrid(3, 5, 7)
    order = gilbert(grid)
    block = torch.empty(105, dtype=torch.int64)
    block[order] = torch.arange(105) // 16
    at = grid.coordinates().long()
    want = torch.zeros(7, 7, dtype=torch.bool)
    for i in range(105):
        for j in ((at - at[i]).abs().amax(1) <= 1).nonzero()[:, 0]:
            want[block[i], block[j]] = True
    assert torch.equal(neighbour_blocks(grid, order, 16), want)


# -- shares --------------------------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """Two blocks of 128 keys with score 0 and one text key with score log 128 hold a third each."""
    grid = TokenGrid(2, 8, 16, text=1, text_at="back")
    key = torch.zeros(1, 257, 1, 1)
    key[:, 256] = math.log(128)
    call = Call(torch.ones(1, 257, 1, 1), key, key, grid, 1.0)
    mass = pooled_shares(call, layout(grid, None, 128), slice(0, 1), True)
    torch.testing.assert_close(mass, torch.full((1, 1, 2, 3), 1 / 3))
    naive = pooled_shares(call, layout(grid, None, 128), slice(0, 1), False)
    torch.testing.assert_close(naive[0, 0, 0], torch.tensor([1, 1, 128]) / 130)


@pytest.mark.parametrize("text_at", ["front", "back"])
def test_shares_equal_reallocation_by_hand(text_at: str, make_call) -> None:
    """p over means and text keys, times the keys of each block, over the sum: rows add up to 1; masked text is out."""
    grid = TokenGrid(2, 8, 16, text=9, text_at=text_at)
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[1, grid.text_start + 5 : grid.text_start + 9] = False
    call = dataclasses.replace(make_call(grid, batch=2, heads=2), key_mask=key_mask)
    call.key[~key_mask] = torch.nan
    blocks = layout(grid, None, 64)
    mass = pooled_shares(call, blocks, slice(0, 2), True)
    video = [x[:, grid.video_slice].unflatten(1, (4, 64)).mean(2) for x in (call.query, call.key)]
    for b, words in ((0, 9), (1, 5)):
        text = call.key[b, grid.text_start : grid.text_start + words]
        logits = torch.cat((torch.einsum("qhd,khd->hqk", video[0][b], video[1][b]),
                            torch.einsum("qhd,khd->hqk", video[0][b], text)), -1) * call.scale
        p = logits.softmax(-1)
        total = 64 * p[..., :4].sum(-1) + p[..., 4:].sum(-1)
        want = torch.cat((64 * p[..., :4], p[..., 4:].sum(-1, keepdim=True)), -1) / total[..., None]
        torch.testing.assert_close(mass[b], want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2, 4))


def test_short_blocks_weigh_the_keys_they_have(make_call) -> None:
    call = make_call(TokenGrid(3, 5, 7), heads=1)
    call.query, call.key = torch.zeros_like(call.query), torch.zeros_like(call.key)
    mass = pooled_shares(call, layout(call.grid, None, 64), slice(0, 1), True)
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor([64, 41, 0]) / 105)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_mean_deviation_is_the_mean_of_distances(masked: bool, order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 45, 3, 4)
    blocks = BlockLayout.from_order(torch.randperm(45), 16) if order else BlockLayout.raster(45, 16)
    mask = torch.rand(2, 45) < 0.7 if masked else None
    mean = pool(x, blocks, mask=mask)
    if masked:
        x[~mask] = torch.nan
    for most in (2**26, 4 * 16 * 24):
        monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", most)
        got = mean_deviation(x, blocks, mean, mask=mask)
        for b in range(2):
            for i in range(3):
                token = blocks.token_of_slot[16 * i : 16 * i + 16]
                token = token[token >= 0]
                part = x[b, token if mask is None else token[mask[b, token]]]
                torch.testing.assert_close(got[b, :, i], (part - part.mean(0)).abs().mean(0), atol=1e-6, rtol=1e-5)


# -- the correction ------------------------------------------------------------------------------------------------


def rectify(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, words: Tensor, worth: Tensor, scale: float,
            gapr: bool) -> Tensor:
    """The paper's steps for one head, blocks of equal size in order, text behind: (L, D) each; kept is (nb, nb).

    Args:
        words: (T, D) text keys; worth: (T, D) text values.
    """
    nb = len(kept)
    qp, kp, vp = (x.unflatten(0, (nb, -1)).mean(1) for x in (query, key, value))
    size = len(query) // nb
    logits = torch.cat((qp @ kp.T * scale + math.log(size), qp @ words.T * scale), -1)
    u = logits.softmax(-1)
    u = torch.cat((u[:, :nb], u[:, nb:].sum(-1, keepdim=True)), -1)
    good = torch.ones_like(kept)
    if gapr:
        dq, dk = ((x.unflatten(0, (nb, -1)) - p[:, None]).abs().mean(1) for x, p in ((query, qp), (key, kp)))
        good = (qp @ kp.T).abs() > (dq @ kp.T).abs() + (qp @ dk.T).abs()
    held = torch.cat((kept | ~good, torch.ones(nb, 1, dtype=torch.bool)), -1)
    share, addend = (u * held).sum(-1), (u * ~held)[:, :nb] @ vp
    seen = torch.cat((kept.repeat_interleave(size, 0).repeat_interleave(size, 1),
                      torch.ones(len(query), len(words), dtype=torch.bool)), -1)
    scores = (query @ torch.cat((key, words)).T * scale).masked_fill(~seen, -torch.inf)
    out = scores.softmax(-1) @ torch.cat((value, worth))
    return share.repeat_interleave(size)[:, None] * out + addend.repeat_interleave(size, 0)


@pytest.mark.parametrize("text_at, text", [("none", 0), ("front", 9), ("back", 40)])
@pytest.mark.parametrize("gapr", [True, False])
def test_output_is_that_of_the_paper(text_at: str, text: int, gapr: bool, make_call) -> None:
    grid = TokenGrid(2, 16, 16, text=text, text_at=text_at)
    call = make_call(grid, batch=2, heads=2, head_dim=16)
    video = slice(grid.video_start, grid.video_start + grid.video)
    # Means that stand out from the spread for some pairs of blocks, in the order of the curve.
    call.query[:, video] = 0.3 * call.query[:, video] + _names(grid, 64, 2, 2, 16)
    call.key[:, video] = 0.3 * call.key[:, video] + _names(grid, 64, 2, 2, 16, 1)
    plan = Rectified(block_size=64, drop_rate=0.7, gapr=gapr).plan(call)
    out, lse = plan.operator.run(call, plan.mask, _attend(call))
    order, kept = gilbert(TokenGrid(2, 16, 16)), plan.mask.to_dense()[..., :8, :8]
    assert not kept.all()
    for b in range(2):
        for h in range(2):
            parts = [x[b, video, h][order] for x in (call.query, call.key, call.value)]
            words, worth = call.key[b, grid.text_slice, h], call.value[b, grid.text_slice, h]
            want = rectify(*parts, kept[b, h], words, worth, call.scale, gapr)
            torch.testing.assert_close(out[b, video, h][order], want, atol=2e-6, rtol=1e-4)
    dense, dense_lse = attention_reference(call.query, call.key, call.value, scale=call.scale)
    torch.testing.assert_close(out[:, grid.text_slice], dense[:, grid.text_slice], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(lse[..., grid.text_slice], dense_lse[..., grid.text_slice])


def _names(grid: TokenGrid, size: int, batch: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    """(B, video, H, D): one random vector for every block of the curve."""
    order = gilbert(TokenGrid(*grid.sizes))
    generator = torch.Generator().manual_seed(size + grid.video + seed)
    vectors = torch.randn(batch, -(-grid.video // size), heads, dim, generator=generator)
    found = torch.empty(batch, grid.video, heads, dim)
    found[:, order] = vectors.repeat_interleave(size, 1)[:, : grid.video]
    return found


@pytest.mark.parametrize("grid", [TokenGrid(2, 16, 16), TokenGrid(3, 9, 11, text=7, text_at="back"),
                                  TokenGrid(2, 7, 13, text=40, text_at="front")], ids=str)
@pytest.mark.parametrize("gapr", [True, False])
def test_equal_tokens_in_every_block_are_recovered(grid: TokenGrid, gapr: bool, make_call) -> None:
    """Whatever is listed, text excepted, the output is dense attention; short blocks and all."""
    call = make_call(grid, batch=2, heads=2, head_dim=16)
    for seed, x in enumerate((call.query, call.key, call.value)):
        x[:, grid.video_slice] = _names(grid, 32, 2, 2, 16, seed)
    blocks = layout(grid, gilbert(TokenGrid(*grid.sizes)), 32)
    video = video_blocks(blocks, grid)
    keep = torch.rand(2, 2, blocks.blocks, blocks.blocks) < 0.3
    keep[..., video:], keep[..., video:, :] = True, True
    keep |= torch.eye(blocks.blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, blocks, blocks)
    out, lse = Rectify(gapr=gapr).run(call, mask, _attend(call))
    want, want_lse = attention_reference(call.query, call.key, call.value, scale=call.scale)
    assert float((out - want).abs().sum() / want.abs().sum()) <= 1e-5
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-5)


def test_limits(make_call) -> None:
    """All blocks: dense attention, unchanged. Means of 0, which are never worth it: plain sparse attention."""
    grid = TokenGrid(2, 16, 16, text=5, text_at="front")
    call = make_call(grid, head_dim=16)
    plan = Rectified(density=1.0, block_size=64).plan(call)
    share, addend = plan.operator.correction(call, plan.mask)
    torch.testing.assert_close(share, torch.ones_like(share))
    assert (addend == 0).all()
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    want, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)

    blocks = layout(grid, gilbert(TokenGrid(2, 16, 16)), 64)
    query = call.query.clone()
    token = blocks.token_of_slot[: 8 * 64].reshape(8, 32, 2)
    query[:, token[..., 1]] = -query[:, token[..., 0]]
    call = dataclasses.replace(call, query=query)
    plan = Rectified(density=0.3, block_size=64).plan(call)
    share, addend = plan.operator.correction(call, plan.mask)
    torch.testing.assert_close(share, torch.ones_like(share))
    assert (addend == 0).all()
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    want, _ = block_sparse_reference(call.query, call.key, call.value, plan.mask, call.scale)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)


def test_correction_beats_dropping_on_blocky_data(make_call) -> None:
    """Attention over blocks of their own kind: the naive weight of the means spoils what the true one mends."""
    grid = TokenGrid(4, 16, 16, text=20, text_at="back")
    call = make_call(grid, head_dim=32)
    video = slice(0, grid.video)
    for seed, x in enumerate((call.query, call.key, call.value)):
        x[:, video] = 0.2 * x[:, video] + _names(grid, 64, 1, 2, 32, seed)
    want, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)

    def error(operator: Rectify | None, mask: BlockMask) -> float:
        out, _ = (operator or Drop()).run(call, mask, _attend(call))
        return float((out - want)[:, video].norm() / want[:, video].norm())

    mask = Rectified(density=0.3, block_size=64).plan(call).mask
    dropped, naive = error(None, mask), error(Rectify(ipar=False, gapr=False), mask)
    put_back, gained = error(Rectify(gapr=False), mask), error(Rectify(), mask)
    assert put_back < 0.2 < gained < 0.5 < naive < 1 < dropped


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [TokenGrid(5, 7, 9), TokenGrid(3, 11, 31, text=17, text_at="front")], ids=str)
def test_half_precision_costs_no_more_than_in_dense_attention(grid: TokenGrid, dtype: torch.dtype, make_call) -> None:
    """At most twice the error that PyTorch's own attention makes in the same dtype."""
    call = make_call(grid, head_dim=32)
    half = Call(*(x.to(dtype) for x in (call.query, call.key, call.value)), grid, call.scale)
    full = Call(*(x.float() for x in (half.query, half.key, half.value)), grid, call.scale)
    mask = Rectified(density=0.4, block_size=32).plan(full).mask
    # Whether a block is worth it may turn on a rounding: the sums are compared, not the choice.
    operator = Rectify(gapr=False)
    error = _relative(operator.run(half, mask, _attend(half))[0], operator.run(full, mask, _attend(full))[0])
    rows = [x.transpose(1, 2) for x in (half.query, half.key, half.value)]
    plain = torch.nn.functional.scaled_dot_product_attention(*rows, scale=call.scale).transpose(1, 2)
    dense, _ = attention_reference(full.query, full.key, full.value, scale=call.scale)
    assert error <= 2 * _relative(plain, dense)


def test_correction_in_pieces_is_the_same(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(TokenGrid(3, 9, 11, text=7, text_at="front"), batch=2, head_dim=16)
    plan, outs = Rectified(density=0.3, block_size=32).plan(call), []
    for most in (2**24, 2 * 2 * 16 * 7):
        monkeypatch.setattr("dit_sparse.operators._NUMBERS_AT_ONCE", most)
        outs.append(plan.operator.run(call, plan.mask, _attend(call))[0])
    assert torch.equal(*outs)


# -- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, 12])
@pytest.mark.parametrize("p_remain", [0.0, 0.6])
def test_mask_is_that_of_the_paper(text: int, p_remain: float, make_call) -> None:
    grid = TokenGrid(4, 8, 16, text=text, text_at="back" if text else "none")
    call = make_call(grid, head_dim=16)
    call.query.mul_(3)
    method = Rectified(drop_rate=0.8, p_remain=p_remain, first_frame=True, block_size=32)
    mask = method.plan(call).mask.to_dense()
    blocks, near = method.build(grid)
    mass = pooled_shares(call, blocks, slice(0, 2), True)
    top, widest = round(0.2 * 16), 0
    for h in range(2):
        for i in range(16):
            value, place = mass[0, h, i].sort(descending=True)
            n = max(int((value.cumsum(0) <= p_remain).sum()) + 1, top)
            want = set(place[:n].tolist()) | set(near[i].nonzero()[:, 0].tolist())
            want |= set(range(4)) if i < 4 else set()
            assert set(mask[0, h, i, :16].nonzero()[:, 0].tolist()) == want - {16}
            widest = max(widest, n)
    assert (widest > top) == (p_remain > 0)
    assert mask[..., 16:].all() and mask[..., 16:, :].all()


def test_count_is_rounded() -> None:
    """Where the reference cuts (1 - .8) * 900 = 179.99... down to 179."""
    assert round((1 - 0.8) * 900) == 180 and int((1 - 0.8) * 900) == 179


@pytest.mark.parametrize(
    "grid", [TokenGrid(21, 30, 52), TokenGrid(13, 30, 45, text=226, text_at="front"), TokenGrid(9, 16, 16),
             TokenGrid(1, 64, 64)], ids=str)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    for density in (0.15, 0.25, 0.5):
        assert abs(float(Rectified(density=density).plan(call).mask.density()) - density) <= 0.03


# -- in a run ------------------------------------------------------------------------------------------------------


def test_masked_keys_never_matter(make_call) -> None:
    """Padded text that is NaN: the output equals that of the sequence without it."""
    grid = TokenGrid(3, 9, 11, text=20, text_at="back")
    call = make_call(grid, batch=1, head_dim=16)
    short = Call(*(x[:, :-8].contiguous() for x in (call.query, call.key, call.value)),
                 dataclasses.replace(grid, text=12), call.scale)
    key_mask = torch.ones(1, grid.tokens, dtype=torch.bool)
    key_mask[:, -8:] = False
    call.key[:, -8:], call.value[:, -8:] = torch.nan, torch.nan
    method, outs = Rectified(block_size=32), []
    for each in (dataclasses.replace(call, key_mask=key_mask), short):
        plan = method.plan(each)
        outs.append(plan.operator.run(each, plan.mask, _attend(each))[0][:, : grid.video + 12])
    torch.testing.assert_close(*outs, atol=2e-6, rtol=1e-4)


def test_a_run_is_sparse_and_says_what_it_computes(make_call) -> None:
    grid = TokenGrid(3, 9, 11)
    call = make_call(grid, head_dim=16)
    session = RunSession(SparseProc("rectified", block_size=32, strict=True))
    session.layers = 3
    session.begin_forward(ForwardInfo(grid=grid, reason="", step=5, num_steps=10, branch="", new_run=False,
                                      family="wan"))
    out = session.attention(1, call.query, call.key, call.value, None, call.scale)
    plan = Rectified(block_size=32).plan(call)
    want, _ = plan.operator.run(call, plan.mask, _attend(call))
    torch.testing.assert_close(out, want)
    assert session.report.records[0].operator == Rectify.title


def test_planning_and_correcting_never_wait(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = build("rectified")
    mask = method.plan(call).mask
    out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, grid.tokens)
    with no_waiting():
        fresh = dataclasses.replace(call)
        plan = method.plan(fresh)
        plan.operator.run(fresh, mask, lambda *_: (out, lse))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"drop_rate": 1.5}, "drop_rate=1.5"),
        ({"p_remain": "a"}, "p_remain='a'"),
        ({"density": 0}, r"density=0 .*\(0, 1\]"),
        ({"ipar": 1}, "True or False"),
        ({"gapr": None}, "True or False"),
        ({"first_frame": "yes"}, "True or False"),
        ({"block_size": 48}, "block_size=48"),
        ({"order": "raster"}, "drop_rate, p_remain, density"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("rectified", **options)
    assert "\n" not in str(caught.value)
