"""Pyramid Sparse Attention: levels by hand, the pyramid against one softmax over its keys, the method in a run."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dit_sparse.blockmask import BlockLayout
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.psa import PSA, alignments, counts_of, levels_of_ranks, threshold_ends
from dit_sparse.operators_pyramid import LEVELS, Pyramid, PyramidMask, pooled_layout
from dit_sparse.order import hilbert, layout, video_blocks


def attend(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return block_sparse_attention(*arguments)


def softmax_over_pooled_keys(call: Call, levels: torch.Tensor, query: BlockLayout, key: BlockLayout
                             ) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin: for every query one softmax over the keys of its blocks, pooled, with log h added; float64."""
    B, L, H, _ = call.query.shape
    q, k, v = (x.double().transpose(1, 2) for x in (call.query, call.key, call.value))
    out, lse = torch.zeros(B, H, L, v.shape[-1]).double(), torch.zeros(B, H, L).double()
    tokens = [x.token_of_slot.reshape(x.blocks, x.block_size) for x in (query, key)]
    real = torch.ones(B, L, dtype=torch.bool) if call.key_mask is None else call.key_mask
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(query.blocks)).tolist():
        rows, keys, values, bias = tokens[0][i], [], [], []
        rows = rows[rows >= 0]
        for j in range(key.blocks):
            level = int(levels[b, h, i, j])
            columns = tokens[1][j]
            columns = columns[columns >= 0]
            columns = columns[real[b, columns]]
            for group in columns.split(level) if level else ():
                assert len(group) == level
                keys.append(k[b, h, group].mean(0))
                values.append(v[b, h, group].mean(0))
                bias.append(math.log(level))
        score = q[b, h, rows] @ torch.stack(keys).T * call.scale + torch.tensor(bias)
        out[b, h, rows], lse[b, h, rows] = score.softmax(-1) @ torch.stack(values), score.logsumexp(-1)
    return out.transpose(1, 2), lse


def run(call: Call, levels: torch.Tensor, query: BlockLayout, key: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    pooled = [pooled_layout(key, level) for level in LEVELS[1:]]
    mask = PyramidMask.from_levels(levels, query, key, pooled)
    return Pyramid().run(call, mask, lambda *x: block_sparse_attention(*x, scale=call.scale, key_mask=call.key_mask))


# -- levels --------------------------------------------------------------------------------------------------------


def test_counts_by_rank() -> None:
    """Of 64 blocks of 64 keys at tiles of 32; of 1024 blocks of 32."""
    for count, size, ratios, want, density in (
        (64, 64, (0.10, 0.15, 0.15, 0.35), [6, 3, 0, 16], 0.1484),
        (1024, 32, (0.05, 0.10, 0.15, 0.25), [51, 52, 52, 104], 0.10059),
    ):
        grid = TokenGrid(1, count, size)
        levels = PSA(ratios=ratios, block_size=64, key_block_size=size, order="raster").ranks(grid)
        assert counts_of(levels) == want and int((levels == 0).sum()) == count - sum(want)
        assert sum(n / h for n, h in zip(want, LEVELS, strict=True)) / count == pytest.approx(density, abs=5e-5)
        assert levels.tolist() == sorted(levels.tolist(), key=lambda h: h or 99), "better ranks are read finer"


def test_ends_by_importance() -> None:
    row = torch.tensor([1, 0.5, 0.25, 0.25])
    assert (row.cumsum(0) / row.sum()).tolist() == [0.5, 0.75, 0.875, 1]
    for ratio, end in ((0.8, 3), (0.5, 2), (0.4, 0)):
        ends = threshold_ends(row, (0.5, ratio, 0.9, 1.0))
        assert int(ends[1]) == end
    assert int(threshold_ends(row, (0.4, 0.5, 0.6, 0.8))[0]) == int(0.06 * 4) + 1 == 1
    assert threshold_ends(row, (0.8, 0.8, 0.9, 1.0)).tolist() == [3, 3, 4, 4]


def test_intervals_are_whole_tiles() -> None:
    assert alignments(32, 32) == (1, 2, 4, 8) and alignments(64, 32) == (1, 1, 2, 4) and alignments(128, 32)[3] == 2
    levels = levels_of_ranks(torch.tensor([3, 3, 5, 10]), 14, (1, 2, 4, 8))
    assert levels.tolist() == [1] * 3 + [4] * 4 + [0] * 7, "8 do not fit any more: rounded down"
    levels = levels_of_ranks(torch.tensor([[0, 1, 1, 9]]), 16, (1, 2, 4, 8))
    assert levels.tolist() == [[2] * 2 + [8] * 8 + [0] * 6]


# -- the pyramid ---------------------------------------------------------------------------------------------------


def test_constant_groups_lose_nothing(make_call) -> None:
    """Keys and values equal in groups of 8: any map without 0 is dense attention; all at level 1 is, for any data."""
    grid = TokenGrid(1, 16, 20)
    call = make_call(grid, head_dim=16)
    for x in (call.key, call.value):
        x.copy_(x[:, ::8].repeat_interleave(8, 1))
    blocks = BlockLayout.raster(320, 64)
    levels = torch.tensor(LEVELS, dtype=torch.uint8)[torch.randint(4, (1, 2, 5, 5))]
    want = attention_reference(call.query, call.key, call.value, scale=call.scale)
    for got, expected in zip(run(call, levels, blocks, blocks), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    call = make_call(grid, head_dim=16)
    want = attention_reference(call.query, call.key, call.value, scale=call.scale)
    for got, expected in zip(run(call, torch.ones_like(levels), blocks, blocks), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key_size", [16, 32, 64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_pyramid_is_one_softmax(key_size: int, dtype: torch.dtype, tolerance: float, make_call) -> None:
    """Random levels, level 8 at small blocks and a ragged end included, in an order that is not the model's."""
    grid = TokenGrid(3, 9, 11, text=30, text_at="front")
    call = make_call(grid, head_dim=16)
    call.query, call.key, call.value = (x.to(dtype) for x in (call.query, call.key, call.value))
    order = hilbert(TokenGrid(*grid.sizes))
    query, key = layout(grid, order, 32), layout(grid, order, key_size)
    levels = torch.tensor([0, *LEVELS], dtype=torch.uint8)[torch.randint(5, (1, 2, query.blocks, key.blocks))]
    levels[..., 0] = 1
    levels = torch.where(key.lengths == key_size, levels, levels.clamp(max=1))
    out, lse = run(call, levels, query, key)
    want, want_lse = softmax_over_pooled_keys(call, levels, query, key)
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=tolerance)
    assert out.dtype == dtype and lse.dtype == torch.float32


# -- the method ----------------------------------------------------------------------------------------------------


def importance_by_hand(call: Call, query: BlockLayout, key: BlockLayout, every: int) -> torch.Tensor:
    """The paper's map as loops: max over sampled keys, relative to the row's max, max over sampled rows."""
    tokens = [x.token_of_slot.reshape(x.blocks, x.block_size) for x in (query, key)]
    lengths = [x.lengths.tolist() for x in (query, key)]

    def sample(which: int, i: int) -> torch.Tensor:
        place = torch.arange(0, tokens[which].shape[1], every) + call.step % every
        return tokens[which][i][place.clamp(max=lengths[which][i] - 1)]

    scores = torch.einsum("bqhd,bkhd->bhqk", call.query, call.key) * call.scale
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None], -torch.inf)
    found = torch.zeros(*scores.shape[:2], query.blocks, key.blocks)
    for i in range(query.blocks):
        rows = scores[:, :, sample(0, i)]
        best = torch.stack([rows[..., sample(1, j)].amax(-1) for j in range(key.blocks)], -1)
        found[:, :, i] = (best - best.amax(-1, keepdim=True)).exp().amax(2)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "threshold", "ratios": (0.3, 0.5, 0.6, 0.9), "order": "raster"},
        {"key_block_size": 16, "similarity": (0.1, 0.0, 0.05)},
        {"density": 0.3, "sample_every": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
def test_call_equals_the_formula(options: dict, masked: bool, make_call) -> None:
    grid = TokenGrid(5, 9, 11, text=30, text_at="back")
    call = make_call(grid, head_dim=16, step=2)
    if masked:
        key_mask = torch.rand(1, grid.tokens) < 0.98
        call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
        call = dataclasses.replace(call, key_mask=key_mask)
    method = build("psa", block_size=32, **options)
    plan = method.plan(call)
    query, key = method.layouts(grid)
    vq, vk = video_blocks(query, grid), video_blocks(key, grid)
    clean = dataclasses.replace(call, key=call.key.nan_to_num(0), value=call.value.nan_to_num(0))

    want = torch.ones(1, 2, query.blocks, key.blocks, dtype=torch.uint8)
    scores = importance_by_hand(clean, query, key, method.sample_every)[..., :vq, :vk]
    value, place = torch.sort(scores, dim=-1, descending=True, stable=True)
    align = alignments(key.block_size, 32)
    for i in torch.cartesian_prod(torch.arange(2), torch.arange(vq)):
        at = (0, *i.tolist())
        levels = (levels_of_ranks(threshold_ends(value[at], method.ratios), vk, align) if method.mode == "threshold"
                  else method.ranks(grid))
        want[(*at, slice(0, vk))] = torch.empty_like(levels).scatter_(0, place[at], levels)
    tokens = key.token_of_slot.reshape(key.blocks, -1)
    for h, j in torch.cartesian_prod(torch.arange(2), torch.arange(key.blocks)).tolist():
        cap = 8
        if method.similarity is not None:
            x = clean.key[0, :, h][tokens[j].clamp(min=0)]
            cap = 1
            for level, least in zip(LEVELS[1:], method.similarity, strict=True):
                cosine = torch.cosine_similarity(x[::level], x[level - 1 :: level], dim=-1).mean()
                cap = level if cosine > least else cap
        if (tokens[j] < 0).any() or (call.key_mask is not None and not call.key_mask[0, tokens[j]].all()):
            cap = 1
        want[:, h, :, j] = want[:, h, :, j].clamp(max=cap)

    got = plan.mask.to_dense().to(torch.uint8)
    for level, coarse in plan.mask.coarse:
        got = got + level * coarse.to_dense().to(torch.uint8)
    assert torch.equal(got, want)
    out, lse = plan.operator.run(
        call, plan.mask, lambda *x: block_sparse_attention(*x, scale=call.scale, key_mask=call.key_mask))
    true, true_lse = softmax_over_pooled_keys(dataclasses.replace(clean, key_mask=call.key_mask), want, query, key)
    torch.testing.assert_close(out.double(), true, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)
    # A pooled block counts its pooled keys.
    share = sum((want == h).double() * key.lengths / h for h in LEVELS) * query.lengths[:, None]
    assert float(plan.operator.density(plan.mask)) == pytest.approx(float(share.sum((-2, -1)).mean()) / grid.tokens**2)


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(13, 30, 45, text=226, text_at="front")],
    ids=str,
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    for density in (0.1, 0.25, 0.5, 0.9):
        plan = build("psa").at_density(density).plan(call)
        assert abs(float(plan.operator.density(plan.mask)) - density) <= 0.03


def test_pyramid_is_nearer_than_dropping_at_equal_density(make_call) -> None:
    """Smooth keys and values, as in video: means lose less than blocks left out."""
    grid = TokenGrid(4, 16, 16)
    call = make_call(grid, head_dim=16)
    for x in (call.key, call.value):
        x.copy_(torch.nn.functional.avg_pool1d(x.permute(0, 2, 3, 1).flatten(0, 1), 33, 1, 16).unflatten(
            0, (1, 2)).permute(0, 3, 1, 2) * 6)
    want, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)
    errors = []
    for name in ("psa", "sol"):
        options = {"order": "raster"} | ({"soft": False} if name == "sol" else {})
        plan = build(name, density=0.25, block_size=64, **options).plan(call)
        out, _ = plan.operator.run(call, plan.mask, lambda *x: block_sparse_attention(*x, scale=call.scale))
        errors.append(float((out - want).norm() / want.norm()))
    assert errors[0] < errors[1]


def test_remembered_levels_take_fresh_keys(make_call) -> None:
    """`refresh` keeps levels, never keys: through a run, whose density counts the pyramid."""
    from dit_sparse.bridge import ForwardInfo
    from dit_sparse.processor import SparseProc
    from dit_sparse.report import summarize
    from dit_sparse.session import RunSession

    grid = TokenGrid(5, 9, 11)
    session = RunSession(SparseProc("psa", block_size=32, refresh=4, strict=True, dense_layers=0, offload=True))
    session.layers = 1
    session.begin_forward(
        ForwardInfo(grid=grid, reason="", step=5, num_steps=10, branch="cond", new_run=False, family="wan"))
    first, second = make_call(grid, head_dim=16, step=5), make_call(grid, head_dim=16, seed=1, step=5)
    session.attention(0, first.query, first.key, first.value, None, first.scale)
    out = session.attention(0, second.query, second.key, second.value, None, second.scale)
    assert session.report.records[1].reused
    plan = build("psa", block_size=32).plan(first)
    want, _ = plan.operator.run(second, plan.mask, attend)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)
    found = summarize("psa", [session.report])
    assert found.sparse_density == pytest.approx(float(plan.operator.density(plan.mask)), abs=1e-6)


def test_planning_and_pooling_never_wait(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    for options in ({}, {"mode": "threshold"}, {"similarity": (0.1, 0.1, 0.1)}):
        call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.9)
        method = build("psa", **options)
        method.plan(call)
        out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, grid.tokens)
        plain = dataclasses.replace(call, key_mask=None)
        with no_waiting():
            plan = method.plan(call)
            plan.operator.run(plain, plan.mask, lambda *_: (out, lse))  # noqa: B023
            plan.operator.density(plan.mask)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mode": "top"}, "topk, threshold"),
        ({"density": 0}, "density=0"),
        ({"ratios": (0.1, 0.2, 0.3)}, "4 numbers"),
        ({"ratios": (0.3, 0.2, 0.3, 0.4)}, "rising"),
        ({"ratios": (0.1, 0.2, 0.3, 1.4)}, "ratios=1.4"),
        ({"similarity": (0.1,)}, "3 numbers"),
        ({"order": "gilbert"}, "hilbert, raster"),
        ({"sample_every": 0}, "sample_every=0"),
        ({"tile": True}, "tile=True"),
        ({"key_block_size": 48}, "key_block_size=48"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("psa", **options)
    assert "\n" not in str(caught.value)
