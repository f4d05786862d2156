"""The oracle: against direct masked attention, against the masks that methods make, and how far a sample may be off."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.methods.auto import block_weight
from dit_sparse.methods.base import Call
from dit_sparse.methods.sol import Sol
from dit_sparse.methods.tuned import Tuned, kept_blocks
from dit_sparse.order import video_blocks
from dit_sparse.routing import lists_of_scores
from dit_sparse.selection import Rule
from dit_sparse.tuning.candidates import DENSE, PATTERNS, Candidate
from dit_sparse.tuning.headplan import HeadPlan
from dit_sparse.tuning.oracle import Errors, ordered, probe_head, probe_heads, probe_rows, sample_rows

GRIDS = [TokenGrid(5, 7, 9), TokenGrid(3, 8, 8, text=11, text_at="front"), TokenGrid(1, 9, 13, text=5, text_at="back"),
         TokenGrid(1, 1, 1)]
NAMES = {"tile": "tiles", "morton": "morton"}


def made(grid: TokenGrid, heads: int = 3, seed: int = 0) -> Call:
    return planted_call(grid, heads, head_dim=16, seed=seed)


def attended(call: Call, candidate: Candidate) -> Tensor:
    """(L, H, D): what the methods that a candidate stands for compute."""
    method = Sol(density=candidate.density, order=NAMES[candidate.order], soft=candidate.pattern in ("soft", "spread"))
    plan = method.plan(call)
    mask = plan.mask
    assert mask is not None
    if candidate.pattern == "band":
        blocks = mask.query
        at = torch.arange(blocks.blocks)
        far = -(at[:, None] - at).abs().float().expand(1, call.query.shape[2], -1, -1)
        mask = lists_of_scores(far, blocks, blocks, method.rule(call, blocks))

    if candidate.pattern == "spread":
        blocks = mask.query
        query, key = (call.block_mean(name, blocks) for name in ("query", "key"))
        scores = query @ key.mT * call.scale + block_weight(call, blocks, soft=True)[:, :, None]
        video = slice(0, video_blocks(blocks, call.grid))
        rule = Rule("top_k", kept_blocks(candidate, blocks, call.grid), rows=video, columns=video, near=1)
        mask = lists_of_scores(scores, blocks, blocks, rule)

    attend = functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)
    return plan.operator.run(call, mask, attend)[0][0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_predicts_what_the_methods_compute(grid: TokenGrid) -> None:
    call = made(grid)
    rows = sample_rows(grid, 40, 4, seed=1)
    found = probe_heads(call.query[0], call.key[0], call.value[0], rows, scale=call.scale, grid=grid,
                        budgets=(0.05, 0.2, 0.5))
    dense = attended(call, Candidate("drop", "tile", 1.0))[rows]
    for pattern in PATTERNS[1:]:
        for order in ("tile", "morton"):
            for density in (0.05, 0.2, 0.5):
                candidate = Candidate(pattern, order, density)
                off = (attended(call, candidate)[rows] - dense).square().sum((0, 2))
                err = off / dense.square().sum((0, 2))
                torch.testing.assert_close(found.of(candidate)["err"], err, rtol=2e-3, atol=1e-7, msg=str(candidate))


def test_keys_that_are_no_tokens_count_nowhere() -> None:
    grid = TokenGrid(3, 6, 6, text=12, text_at="back")
    call = made(grid)
    call.key_mask = torch.ones(1, grid.tokens, dtype=torch.bool)
    call.key_mask[0, -7:] = False
    call.value[0, -7:] = torch.nan
    rows = sample_rows(grid, 30, 5)
    found = probe_heads(call.query[0], call.key[0], call.value[0], rows, scale=call.scale, grid=grid, budgets=(0.2, 1),
                        key_mask=call.key_mask[0])
    dense = attended(call, Candidate("drop", "tile", 1.0))[rows]
    for pattern in ("drop", "soft"):
        off = (attended(call, Candidate(pattern, "tile", 0.2))[rows] - dense).square().sum((0, 2))
        torch.testing.assert_close(found.of(Candidate(pattern, "tile", 0.2))["err"], off / dense.square().sum((0, 2)),
                                   rtol=2e-3, atol=1e-7)
    assert found.err[..., -1, :].max() < 1e-6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_budget_one_is_exact_and_mass_never_falls(grid: TokenGrid) -> None:
    call = made(grid, 2)
    found = probe_heads(call.query[0], call.key[0], call.value[0], sample_rows(grid), scale=call.scale, grid=grid)
    assert (found.mass[..., -1, :] - 1).abs().max() < 1e-5 and found.err[..., -1, :].max() < 1e-6
    assert (found.mass.diff(dim=-2) >= -1e-6).all()
    assert torch.equal(found.a, found.err)


def test_soft_is_exact_where_blocks_are_constant() -> None:
    grid = TokenGrid(4, 16, 16)
    call = made(grid, 1)
    blocks = ordered(grid, ("morton",))["morton"]
    block = blocks.block_of_token.reshape(-1)
    values = torch.randn(2, blocks.blocks, 16, generator=torch.Generator().manual_seed(3))
    found = probe_head(call.query[0, :, 0], values[0][block], values[1][block], sample_rows(grid), scale=call.scale,
                       grid=grid, orders=("morton",))
    soft, drop = found.err[0, 0, 1, :, 0], found.err[0, 0, 0, :, 0]
    assert soft.max() < 1e-6 < drop[0]


def test_projection_and_gate_weigh_the_error() -> None:
    grid = TokenGrid(3, 8, 8)
    call = made(grid, 2)
    q, k, v = (x[0] for x in (call.query, call.key, call.value))
    rows = sample_rows(grid, 32)
    generator = torch.Generator().manual_seed(5)
    gate_out, stream = torch.randn(2, 16, 40, generator=generator), torch.randn(32, 40, generator=generator)
    words = {"scale": call.scale, "grid": grid, "budgets": (0.2,)}
    found = probe_heads(q, k, v, rows, gate_out=gate_out, stream=stream, **words)
    candidate = Candidate("drop", "tile", 0.2)
    off = attended(call, candidate)[rows] - attended(call, Candidate("drop", "tile", 1.0))[rows]
    added = torch.einsum("rhd,hdc->hrc", off, gate_out).square().sum((1, 2)) / stream.square().sum()
    torch.testing.assert_close(found.of(candidate)["a"], added, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(found.err, probe_heads(q, k, v, rows, **words).err)
    with pytest.raises(ValueError, match="belong together"):
        probe_heads(q, k, v, rows, gate_out=gate_out, **words)


def test_one_head_alone_equals_it_among_others_in_any_precision() -> None:
    grid = TokenGrid(3, 7, 9)
    call = made(grid, 3)
    q, k, v = (x[0].to(torch.bfloat16) for x in (call.query, call.key, call.value))
    rows = sample_rows(grid, 50)
    every = probe_heads(q, k, v, rows, scale=call.scale, grid=grid)
    one = probe_head(q[:, 1], k[:, 1], v[:, 1], rows, scale=call.scale, grid=grid)
    torch.testing.assert_close(every.err[..., 1:2], one.err)
    wide = probe_heads(q.float(), k.float(), v.float(), rows, scale=call.scale, grid=grid)
    torch.testing.assert_close(every.err, wide.err)


def test_the_worse_branch_and_tables() -> None:
    grid = TokenGrid(2, 6, 6)
    probes = []
    for seed in (0, 1):
        call = made(grid, 2, seed)
        probes.append(probe_heads(*(x[0] for x in (call.query, call.key, call.value)), sample_rows(grid, 20),
                                  scale=call.scale, grid=grid, budgets=(0.2, 0.5)))
    worse = probes[0].worse(probes[1])
    assert torch.equal(worse.a, torch.maximum(probes[0].a, probes[1].a))
    table = worse.table([DENSE, Candidate("soft", "morton", 0.5)])
    assert table["err"].shape == (2, 2) and (table["a"][:, 0] == 0).all() and (table["mass"][:, 0] == 1).all()
    with pytest.raises(ValueError, match="was not probed"):
        worse.of(Candidate("drop", "tile", 0.3))


def test_rows_are_spread_and_text_has_its_own() -> None:
    grid = TokenGrid(4, 8, 8, text=40, text_at="front")
    rows = sample_rows(grid, 64, 32, seed=3)
    video, text = rows[:64] - grid.video_start, rows[64:]
    assert torch.equal(video // 4, torch.arange(64)) and text.numel() == 32 and text.max() < 40
    assert torch.equal(rows, sample_rows(grid, 64, 32, seed=3))
    assert not torch.equal(rows, sample_rows(grid, 64, 32, seed=4))
    assert torch.equal(sample_rows(TokenGrid(1, 2, 3), 128), torch.arange(6))


def planted(spread: float, seed: int = 0) -> tuple[Call, TokenGrid]:
    """One head of 4,096 tokens: boxes of 4x4x4 belong to clusters, queries and keys lie around their centres."""
    grid = TokenGrid(16, 16, 16)
    generator = torch.Generator().manual_seed(seed)
    at = grid.coordinates().long() // 4
    cluster = torch.randint(64, (64,), generator=generator)[(at[:, 0] * 4 + at[:, 1]) * 4 + at[:, 2]]
    centre = 0.7 * torch.randn(64, 32, generator=generator)
    noise = torch.randn(3, grid.tokens, 32, generator=generator)
    q, k = (centre[cluster] + 0.7 * spread * noise[i] for i in range(2))
    return Call(*(x[None, :, None] for x in (q, k, noise[2])), grid, 32**-0.5), grid


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_a_sample_of_rows_is_near_all_rows(spread: float) -> None:
    call, grid = planted(spread)
    words = {"scale": call.scale, "grid": grid, "orders": ("morton",), "rankings": ("pooled",),
             "budgets": (0.05, 0.15, 0.3)}
    q, k, v = call.query[0], call.key[0], call.value[0]
    every = probe_rows(q, k, v, torch.arange(grid.tokens), **words)
    err, norm = (x.double().flatten(0, -2).numpy() for x in (every.err, every.norm))
    whole = err.sum(-1) / norm.sum(-1)
    for rows, allowed in ((128, 0.48), (64, 0.65), (256, 0.35)):
        picks = np.stack([sample_rows(grid, rows, seed=seed).numpy() for seed in range(400)])
        drawn = np.stack([err[:, p].sum(-1) / norm[:, p].sum(-1) for p in picks])
        off = np.abs(drawn / whole - 1)
        assert (np.quantile(off, 0.95, axis=0) <= allowed).all(), (rows, np.quantile(off, 0.95, axis=0))
    one = sample_rows(grid, 128, seed=0)
    drawn_errors: Errors = every.errors(one)
    direct = probe_heads(q, k, v, one, **words)
    torch.testing.assert_close(drawn_errors.err, direct.err, rtol=1e-3, atol=1e-6)
    # The standard error speaks of the spread over draws.
    spreads = drawn_errors.err_error / drawn_errors.err
    assert (spreads > 0.02).all() and (spreads < 0.5).all()


def test_what_is_not_allowed_is_refused() -> None:
    grid = TokenGrid(2, 4, 4)
    call = made(grid, 1)
    q, k, v = (x[0] for x in (call.query, call.key, call.value))
    rows = sample_rows(grid, 8)
    for words, expected in (({"orders": ("hilbert",)}, "orders='hilbert'"), ({"rankings": ("magic",)}, "rankings="),
                            ({"budgets": (0.0, 0.5)}, "budgets=")):
        with pytest.raises(ValueError, match=expected):
            probe_heads(q, k, v, rows, scale=call.scale, grid=grid, **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the grid's tokens"):
        probe_heads(q[:5], k, v, rows, scale=call.scale, grid=grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_plan_of_tune_keeps_what_was_judged(grid: TokenGrid) -> None:
    """All patterns side by side in one layer, as `methods.tuned` runs them."""
    chosen = tuple(Candidate(p, o, d) for p, o, d in (("drop", "tile", 0.2), ("soft", "morton", 0.05),
                                                      ("band", "morton", 0.3), ("soft", "tile", 0.1),
                                                      ("spread", "morton", 0.1), ("spread", "tile", 0.02)))
    heads = len(chosen)
    call = made(grid, heads)
    call.num_steps, rows = 1, sample_rows(grid, 40, 4)
    table = HeadPlan(chosen, (0, 1), np.arange(heads, dtype=np.uint8).reshape(1, 1, heads))
    plan = Tuned(table).plan(call)
    assert plan.mask is not None

    attend = functools.partial(block_sparse_attention, scale=call.scale)
    out = plan.operator.run(call, plan.mask, attend)[0][0, rows]
    dense = attended(call, Candidate("drop", "tile", 1.0))[rows]
    err = (out - dense).square().sum((0, 2)) / dense.square().sum((0, 2))
    found = probe_heads(call.query[0], call.key[0], call.value[0], rows, scale=call.scale, grid=grid)
    for head, candidate in enumerate(chosen):
        torch.testing.assert_close(found.of(candidate)["err"][head], err[head], rtol=2e-3, atol=1e-7)
