"""PAROAttention: the six orders, planted patterns, masks, and the choice at run time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dit_sparse.axisorders import (
    AXES,
    axis_layouts,
    block_statistics,
    block_sums,
    choose_order,
    order_statistics,
    static_keep,
)
from dit_sparse.bits import pack_bits, unpack_bits
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.paro import Paro
from dit_sparse.order import axis_order, inverse, per_head

CODES = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")


# -- orders --------------------------------------------------------------------------------------------------------


def test_the_six_orders_and_their_inverses() -> None:
    sizes = (3, 4, 5)
    grid = TokenGrid(*sizes)
    x = torch.randn(60)
    undone_by = {0: 0, 1: 1, 2: 5, 3: 3, 4: 4, 5: 2}
    for code, axes in enumerate(AXES):
        turn = ["FHW".index(letter) for letter in CODES[code]]
        order = axis_order(grid, axes)
        assert torch.equal(order, torch.arange(60).reshape(sizes).permute(turn).flatten())
        assert torch.equal(order.sort().values, torch.arange(60))
        assert torch.equal(x[order][inverse(order)], x)
        turned = TokenGrid(*(sizes[i] for i in turn))
        assert torch.equal(x[order][axis_order(turned, AXES[undone_by[code]])], x)


@pytest.mark.parametrize("text_at", ["front", "back"])
def test_text_stays_outside_of_the_orders(text_at: str) -> None:
    grid = TokenGrid(3, 4, 5, text=7, text_at=text_at)
    for blocks, axes in zip(axis_layouts(grid, 16), AXES, strict=True):
        token = blocks.token_of_slot
        assert torch.equal(token[:60], axis_order(grid, axes) + grid.video_start)
        assert torch.equal(token[64:71], torch.arange(7) + grid.text_start)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_dense_attention_does_not_see_the_order(dtype: torch.dtype, tolerance: float, make_call) -> None:
    grid = TokenGrid(3, 7, 5, text=6, text_at="front")
    call = make_call(grid, heads=6)
    blocks = per_head(axis_layouts(grid, 32), torch.arange(6)[None])
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    out, _ = block_sparse_attention(query, key, value, BlockMask.full(blocks, blocks), scale=call.scale)
    want, _ = attention_reference(query.float(), key.float(), value.float(), scale=call.scale)
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)


# -- what tells orders apart ---------------------------------------------------------------------------------------


def _planted(alike: str) -> Tensor:
    """Maps of an 8x8x8 grid, (6, 512, 512), one per order: even weights on the keys that agree in these axes."""
    grid = TokenGrid(8, 8, 8)
    at = grid.coordinates()[:, ["tyx".index(a) for a in alike]]
    weights = (at[:, None] == at).all(-1).to(torch.float32)
    weights = weights / weights.sum(-1, keepdim=True)
    orders = [axis_order(grid, axes) for axes in AXES]
    return torch.stack([weights[order][:, order] for order in orders])


@pytest.mark.parametrize(
    "alike, skipped",
    [
        ("yx", [0.875, 0.875, 0.984, 0.875, 0.984, 0.875]),
        ("t", [0.875, 0.875, 0, 0.875, 0, 0.875]),
        ("x", [0, 0.875, 0.875, 0, 0.875, 0.875]),
        ("y", [0.875, 0, 0.875, 0.875, 0.875, 0]),
    ],
)
def test_planted_patterns_are_recovered(alike: str, skipped: list[float]) -> None:
    lengths = torch.full((64,), 8)
    found = torch.stack([block_statistics(x[None, None], lengths, lengths, 1e-3, 0.9, 0.5) for x in _planted(alike)])
    assert (found[:, 0] / found[:, 1])[:, 0].tolist() == pytest.approx(skipped, abs=1e-3)
    assert int(choose_order(found, 1.0, "skip")) == skipped.index(max(skipped))


def test_unevenness_of_blocks() -> None:
    one = torch.tensor([64])

    def psi(weights: Tensor, lengths: Tensor) -> float:
        found = block_statistics(weights[None, None], lengths, lengths, 1e-3, 0.9, 0.5)[:, 0]
        _, _, total, number, _ = found.tolist()
        return total / number if number else math.nan

    hot = torch.zeros(64, 64)
    hot[3, 5] = 0.7
    assert psi(torch.full((64, 64), 0.2), one) == pytest.approx(1.0)
    assert psi(hot, one) == pytest.approx(4096)
    assert math.isnan(psi(torch.zeros(64, 64), one)), "blocks of zeros do not count"
    maps, lengths = _planted("yx"), torch.full((64,), 8)
    assert psi(maps[0], lengths) == pytest.approx(8) and psi(maps[2], lengths) == pytest.approx(1)


def test_short_blocks_are_judged_by_their_real_tokens() -> None:
    """Padding neither counts as weights near zero nor thins the mean out."""
    lengths = torch.tensor([8, 3])
    real = (torch.arange(8) < lengths[:, None]).flatten()
    weights = torch.full((16, 16), 0.5) * real[:, None] * real
    found = block_statistics(weights[None, None], lengths, lengths, 1e-3, 0.05, 0.5)[:, 0].tolist()
    assert found == pytest.approx([0, 4, 4, 4, 2 * 8 * 0.5])


def test_alpha_weighs_blocks_to_skip_against_even_weights() -> None:
    """Order 1 has most blocks to skip, order 4 the most even ones."""
    found = torch.ones(6, 5, 1)
    found[:, 0, 0], found[:, 1, 0] = torch.tensor([1.0, 9, 2, 2, 5, 2]), 10
    found[:, 2, 0] = torch.tensor([9.0, 9, 8, 8, 1, 8])
    assert [int(choose_order(found, alpha, "skip")) for alpha in (1.0, 0.5, 0.0)] == [1, 4, 4]


def _batch_sums(weights: Tensor, size: int, blocks: int) -> Tensor:
    """(B, H, nq, nk) mass of blocks, mean over a block's rows."""
    rows = [[weights[:, :, i * size : i * size + size, j * size : j * size + size].sum(-1).mean(-1)
             for j in range(blocks)] for i in range(blocks)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("text_at", ["front", "back"])
def test_measures_equal_those_of_the_whole_map(text_at: str, make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(3, 7, 5, text=6, text_at=text_at)
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[1, grid.text_start : grid.text_start + 3] = False
    call = dataclasses.replace(make_call(grid, batch=2, heads=3), key_mask=key_mask)
    call.query.mul_(3)
    layouts = axis_layouts(grid, 16)
    monkeypatch.setattr("dit_sparse.axisorders._NUMBERS_AT_ONCE", 5000)
    found = order_statistics(call, layouts, 99, 0.005, 0.9, 0.3)
    logits = torch.einsum("bqhd,bkhd->bhqk", call.query, call.key) * call.scale
    weights = logits.masked_fill(~key_mask[:, None, None], -torch.inf).softmax(-1)
    weights = weights[:, :, grid.video_slice, grid.video_slice]
    for code, axes in enumerate(AXES):
        order = axis_order(grid, axes)
        mine, skipped = weights[:, :, order][..., order], torch.zeros(3)
        for i in range(7):
            for j in range(7):
                part = mine[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                skipped += ((part < 0.005).float().mean((-2, -1)) >= 0.9).float().sum(0)
        assert found[code, 0].tolist() == skipped.tolist() and (found[code, 1] == 2 * 49).all()
        sums = block_sums(call, layouts[code], 16)
        best = _batch_sums(mine, 16, 7).topk(3).values.sum((0, 2, 3))
        torch.testing.assert_close(found[code, 4], best, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sums, _batch_sums(mine, 16, 7).mean(0), atol=1e-6, rtol=1e-4)
    choice = torch.tensor([[5, 0, 2]])
    sums = block_sums(call, per_head(layouts, choice), 16)
    for head, code in enumerate(choice[0]):
        order = axis_order(grid, AXES[code])
        want = _batch_sums(weights[:, :, order][..., order], 16, 7).mean(0)[head]
        torch.testing.assert_close(sums[head], want, atol=1e-6, rtol=1e-4)


# -- masks ---------------------------------------------------------------------------------------------------------


def test_published_size_of_a_mask() -> None:
    sums = torch.rand(278, 278)
    keep = static_keep(sums, math.ceil(0.5 * 278**2), own_counts=False)
    diagonal = torch.eye(278, dtype=torch.bool)
    best = torch.zeros(278**2, dtype=torch.bool)
    best[sums.flatten().topk(38_642).indices] = True
    assert torch.equal(keep, best.reshape(278, 278) | diagonal)
    assert int(static_keep(sums, 38_642, own_counts=True).sum()) == 38_642
    packed = pack_bits(keep)
    assert packed.numel() == 9_661 and torch.equal(unpack_bits(packed, 278).bool(), keep)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 9])
def test_bits_and_back(blocks: int) -> None:
    keep = torch.rand(2, 3, blocks, blocks) < 0.5
    assert torch.equal(unpack_bits(pack_bits(keep), blocks).bool(), keep)


def test_a_mask_without_blocks_gives_zeros() -> None:
    query, key, value = torch.randn(3, 1, 40, 2, 8).unbind(0)
    keep = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    keep[0, 1] = False
    blocks = BlockLayout.raster(40, 16)
    mask = BlockMask.from_dense(keep, blocks, blocks)
    out, lse = block_sparse_attention(query, key, value, mask)
    assert (out[:, :, 1] == 0).all() and (lse[:, 1] == -torch.inf).all()
    want, _ = attention_reference(query, key, value)
    torch.testing.assert_close(out[:, :, 0], want[:, :, 0])


# -- the choice of a run -------------------------------------------------------------------------------------------


def test_planted_heads_get_their_orders() -> None:
    """Heads that look at their frame keep time first, those that look at their place put it last."""
    plan = Paro(density=0.25, measure="mass", block_size=32).plan(planted_call(TokenGrid(8, 8, 8), heads=6))
    order = plan.notes["order"][0].tolist()
    assert all(AXES[order[head]][0] == "t" for head in (0, 3))
    assert all(AXES[order[head]][2] == "t" for head in (1, 4))


def test_measures_differ_on_thin_diagonals() -> None:
    """One key per frame: in the model's order a block in which every query sees one key of 32 counts as skippable."""
    found = Paro(density=0.25, block_size=32)
    call = planted_call(TokenGrid(8, 8, 8), heads=2)
    statistics = order_statistics(call, axis_layouts(call.grid, 32), 99, None, 0.9, 0.25)
    assert found.measure == "skip" and float(statistics[0, 0, 1] / statistics[0, 1, 1]) > 0.99
    assert int(choose_order(statistics, 1.0, "skip")[1]) == 0
    assert AXES[int(choose_order(statistics, 1.0, "mass")[1])][2] == "t"


def test_mask_of_a_run_is_that_of_the_measures(make_call) -> None:
    grid = TokenGrid(3, 8, 8, text=10, text_at="front")
    call = make_call(grid, heads=3)
    call.query.mul_(3)
    plan = Paro(density=0.3, count_forced=False, block_size=16, sample=99, rows=16).plan(call)
    layouts = axis_layouts(grid, 16)
    order = choose_order(order_statistics(call, layouts, 99, None, 0.9, 0.3), 1.0, "skip")
    assert torch.equal(plan.notes["order"][0], order)
    sums = block_sums(call, per_head(layouts, order[None]), 16)
    got = plan.mask.to_dense()[0]
    for head in range(3):
        best = torch.zeros(144, dtype=torch.bool)
        best[sums[head].flatten().topk(math.ceil(0.3 * 144)).indices] = True
        assert torch.equal(got[head, :12, :12], best.reshape(12, 12) | torch.eye(12, dtype=torch.bool))
    assert got[:, 12:].all() and got[..., 12:].all()
    out, _ = block_sparse_attention(call.query, call.key, call.value, plan.mask, scale=call.scale)
    want, _ = block_sparse_reference(call.query, call.key, call.value, plan.mask, call.scale)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_choice_is_kept_per_layer_and_branch(make_call) -> None:
    grid, memory, method = TokenGrid(3, 8, 8), Memory(), Paro(density=0.3, block_size=16)

    def mask(step: int, place: object, seed: int) -> Tensor:
        call = make_call(grid, seed=seed)
        call.query.mul_(3)
        return method.plan(dataclasses.replace(call, step=step, state=State(memory, place, step=step))).mask.to_dense()

    first = mask(10, (0, "cond"), 1)
    assert torch.equal(mask(11, (0, "cond"), 2), first) and torch.equal(mask(40, (0, "cond"), 3), first)
    assert not torch.equal(mask(10, (0, "uncond"), 2), first) and not torch.equal(mask(10, (1, "cond"), 2), first)
    assert memory.nbytes < 3 * 2 * (8 + 18) + 100, "bits, not lists"
    memory.reset()
    assert not torch.equal(mask(0, (0, "cond"), 2), first)


@pytest.mark.parametrize(
    "grid", [TokenGrid(13, 10, 15, text=226, text_at="front"), TokenGrid(9, 16, 16), TokenGrid(1, 64, 64)], ids=str)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    for density in (0.25, 0.5):
        call = make_call(grid, heads=1, head_dim=4)
        text = 1 - (grid.video / grid.tokens) ** 2
        asked = max(density, text + (1 - text) * density / 2)
        assert abs(float(Paro(density).plan(call).mask.density()) - asked) <= 0.03


def test_measuring_never_waits(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = Paro()
    method.plan(call)
    fresh = dataclasses.replace(call, state=State())
    with no_waiting():
        method.plan(fresh)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, r"density=0 .*\(0, 1\]"),
        ({"calibration": 3}, "calibration=3"),
        ({"calibration": "/no/such/file"}, "not a file"),
        ({"count_forced": 1}, "True or False"),
        ({"measure": "psi"}, "skip, mass"),
        ({"alpha": 2}, "alpha=2"),
        ({"alpha": None}, "alpha=None"),
        ({"eps": 0}, "eps=0"),
        ({"sigma": 1.5}, "sigma=1.5"),
        ({"sample": 0}, "sample=0"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"block_size": 48}, "block_size=48"),
        ({"order": "tyx"}, "density, calibration"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("paro", **options)
    assert "\n" not in str(caught.value)
