"""SparseD: exact importance, the paper's counts, one pattern for a run, groups of text and video, limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_sparse import routing
from dit_sparse.blockmask import BlockLayout
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.sparsed import SparseD, sampled_layout
from dit_sparse.order import layout, video_blocks
from dit_sparse.processor import SparseProc
from dit_sparse.scoring import block_mass
from dit_sparse.session import RunSession

GRID = TokenGrid(3, 9, 11, text=40, text_at="front")


def twin(call: Call, blocks: BlockLayout, kept: int) -> torch.Tensor:
    """The paper's pattern, block by block: mean softmax, the best video blocks, and the text blocks beside them."""
    video = video_blocks(blocks, call.grid)
    real = torch.ones(call.query.shape[:2], dtype=torch.bool) if call.key_mask is None else call.key_mask
    slots = blocks.token_of_slot.unflatten(0, (blocks.blocks, -1))
    keep = torch.ones(call.query.shape[0], call.query.shape[2], blocks.blocks, blocks.blocks, dtype=torch.bool)
    for b, h in torch.cartesian_prod(*map(torch.arange, keep.shape[:2])).tolist():
        scores = call.query[b, :, h].double() @ call.key[b, :, h].double().mT * call.scale
        weights = scores.masked_fill(~real[b], -torch.inf).softmax(-1)
        for i in range(video):
            rows = weights[slots[i][slots[i] >= 0]].mean(0)
            mass = torch.stack([rows[s[s >= 0]].sum() for s in slots])
            best = mass[:video].argsort(descending=True, stable=True)[:kept]
            keep[b, h, i, :video] = False
            keep[b, h, i, best] = True
    return keep


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 9, 11), TokenGrid(1, 20, 23, text=5, text_at="back")], ids=str)
def test_pattern_is_the_formula(grid: TokenGrid, make_call) -> None:
    key_mask = torch.rand(2, grid.tokens) < 0.8
    call = make_call(grid, batch=2, head_dim=16, key_mask=key_mask)
    method = SparseD(block_size=32)
    mask = method.plan(call).mask
    kept = method.kept_blocks(grid, mask.query)
    assert kept == int(video_blocks(mask.query, grid) * 0.3) + 1
    assert torch.equal(mask.to_dense(), twin(call, mask.query, kept))


def test_counts_of_the_paper() -> None:
    """64 blocks, select .3: int(19.2) + 1 = 20."""
    grid = TokenGrid(16, 16, 32)
    for select, kept in ((0.3, 20), (0.5, 33), (1.0, 64), (0.01, 1)):
        assert SparseD(select=select).kept_blocks(grid, BlockLayout.raster(grid.tokens, 128)) == kept
    ten = TokenGrid(1, 1, 320)
    assert SparseD(select=0.7).kept_blocks(ten, BlockLayout.raster(320, 32)) == 8


@pytest.mark.parametrize("grid", [GRID, TokenGrid(4, 5, 7)], ids=str)
def test_select_one_is_dense_attention(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, batch=2, head_dim=16)
    mask = SparseD(select=1.0).plan(call).mask
    out, _ = block_sparse_reference(call.query, call.key, call.value, mask, call.scale)
    want, _ = attention_reference(call.query, call.key, call.value, None, call.scale)
    assert mask.token_mask().all()
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


def _at(call: Call, step: int, memory: Memory, branch: str = "cond") -> Call:
    return dataclasses.replace(call, step=step, state=State(memory, (0, branch), step=step, shape=call.grid))


def test_one_pattern_per_run_layer_and_branch(make_call) -> None:
    """Later steps keep the first pattern whatever their scores; another branch, and a new run, make their own."""
    first, later = make_call(GRID, head_dim=16), make_call(GRID, head_dim=16, seed=1)
    method, memory = SparseD(block_size=32), Memory()
    fresh = [method.plan(call).mask.to_dense() for call in (first, later)]
    assert not torch.equal(*fresh)
    assert torch.equal(method.plan(_at(first, 4, memory)).mask.to_dense(), fresh[0])
    for step in (5, 9, 40):
        assert torch.equal(method.plan(_at(later, step, memory)).mask.to_dense(), fresh[0])
    assert torch.equal(method.plan(_at(later, 5, memory, "uncond")).mask.to_dense(), fresh[1])
    memory.reset()
    assert torch.equal(method.plan(_at(later, 0, memory)).mask.to_dense(), fresh[1])


def test_every_counts_true_steps(make_call) -> None:
    """With every=3 a pattern of step 2 serves 2, 3 and 4, also when steps are skipped."""
    first, later = make_call(GRID, head_dim=16), make_call(GRID, head_dim=16, seed=1)
    method, memory = SparseD(block_size=32, every=3), Memory()
    fresh = [method.plan(call).mask.to_dense() for call in (first, later)]
    kept = [method.plan(_at(call, step, memory)).mask.to_dense()
            for call, step in ((first, 2), (later, 4), (later, 5), (first, 7), (first, 9))]
    assert all(torch.equal(kept[i], fresh[j]) for i, j in enumerate((0, 0, 1, 1, 0)))


def test_what_is_kept_is_small(make_call) -> None:
    """A bit for every pair of blocks."""
    call, memory = make_call(GRID, head_dim=16), Memory()
    mask = SparseD(block_size=32).plan(_at(call, 0, memory)).mask
    assert memory.nbytes == 2 * -(-video_blocks(mask.query, GRID) ** 2 // 8)


def test_run_keeps_the_pattern_of_its_first_sparse_step(make_call) -> None:
    """Steps 0 and 1 of 10 are dense; step 2 makes the pattern; a new run starts anew."""
    calls = [make_call(GRID, head_dim=16, seed=seed) for seed in range(5)]
    session = RunSession(SparseProc("sparsed", block_size=32, strict=True, dense_steps=0.2, dense_layers=0))
    session.layers = 1
    video = dataclasses.replace(GRID, text=0)

    def forward(call: Call, step: int) -> torch.Tensor:
        info = ForwardInfo(grid=video, reason="", step=step, num_steps=10, branch="cond", new_run=step == 0,
                           family="wan")
        session.begin_forward(info)
        return session.attention(0, call.query, call.key, call.value, None, call.scale)

    for start in (0, 1):
        maker = calls[2 + start]
        mask = SparseD(block_size=32).plan(maker).mask
        for step in range(5):
            call = maker if step == 2 else calls[(step + start) % 5]
            out = forward(call, step)
            want, _ = (attention_reference(call.query, call.key, call.value, None, call.scale) if step < 2
                       else block_sparse_reference(call.query, call.key, call.value, mask, call.scale))
            torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)


def test_sampled_rows(make_call) -> None:
    """Rows at regular distances, fewer in short blocks; their importance is that of those rows alone."""
    grid = TokenGrid(2, 5, 7, text=3, text_at="front")
    blocks = layout(grid, None, 32)
    tokens, rows = sampled_layout(blocks, 8)
    assert blocks.lengths.tolist() == [32, 32, 6, 3] and rows.lengths.tolist() == [8, 8, 6, 3]
    assert tokens.tolist() == [3 + 4 * i for i in range(16)] + list(range(67, 73)) + [0, 1, 2]
    call = make_call(grid, batch=2, head_dim=16)
    found = SparseD(rows=8, block_size=32).importance(call, blocks, slice(None))
    scores = (call.query[:, tokens].transpose(1, 2) @ call.key.permute(0, 2, 3, 1) * call.scale).softmax(-1)
    slots = blocks.token_of_slot.unflatten(0, (4, 32))
    for j in range(4):
        column = scores[..., slots[j][slots[j] >= 0]].sum(-1)
        want = torch.stack([part.mean(-1) for part in column.split(rows.lengths.tolist(), -1)], -1)
        torch.testing.assert_close(found[..., j], want, atol=1e-6, rtol=1e-4)
    whole = SparseD(block_size=32).plan(call).mask.to_dense()
    again = SparseD(rows=64, block_size=32).plan(dataclasses.replace(call, state=State())).mask.to_dense()
    assert torch.equal(again, whole)


def test_exact_pattern_holds_more_mass_than_pooled_scores(make_call) -> None:
    call = make_call(TokenGrid(9, 16, 16), head_dim=16)
    call.query *= 2
    mask = SparseD(block_size=64).plan(call).mask
    mass = block_mass(call.query, call.key, mask.query, mask.key, call.scale)
    kept = int(mask.work()[0, 0, 0])
    pooled = routing.route(call.query, call.key, mask.query, mask.key, call.scale, routing.Rule("top_k", kept))
    assert ((mass * mask.to_dense()).sum(-1) >= (mass * pooled.to_dense()).sum(-1) - 1e-6).all()
    assert (mass * mask.to_dense()).sum() > 1.02 * (mass * pooled.to_dense()).sum()


@pytest.mark.parametrize(
    "grid", [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(5, 20, 31, text=226, text_at="front")], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    text = 1 - (grid.video / grid.tokens) ** 2
    for density in (0.2, 0.5):
        asked = max(density, text + density / 2 * (1 - text))
        assert abs(float(SparseD(density=density, rows=4).plan(call).mask.density()) - asked) <= 0.03
        call = dataclasses.replace(call, state=State())


@pytest.mark.parametrize("options", [{}, {"rows": 4}, {"density": 0.2}], ids=str)
def test_a_new_pattern_never_waits(options: dict, make_call, no_waiting) -> None:
    call = make_call(GRID, batch=2, key_mask=torch.rand(2, GRID.tokens) < 0.8)
    method = build("sparsed", **options)
    method.plan(call)
    with no_waiting():
        fresh = dataclasses.replace(call, state=State())
        method.plan(fresh).mask.density()
        method.plan(fresh).mask.density()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"select": 0}, r"select=0 is not allowed; use a number in \(0, 1\]"),
        ({"select": 1.2}, "select=1.2"),
        ({"density": 0}, "density=0"),
        ({"every": 0}, "every=0 is not allowed; use None or a whole number >= 1"),
        ({"rows": 1.5}, "rows=1.5"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("sparsed", **options)
    assert "\n" not in str(caught.value)
