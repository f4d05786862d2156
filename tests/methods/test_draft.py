"""DraftAttention: the patch order, the published counts, the draft map against its formula, ties, recall."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.draft import Draft, paper_kept, patch_layout, patch_of
from dit_sparse.order import video_blocks
from dit_sparse.scoring import block_mass, pool, to_slots


def reference_order(frames: int, height: int, width: int) -> Tensor:
    """The authors' index list: strips of 8 rows, patches of 16 columns in them, rows in a patch, columns in a row."""
    index = torch.arange(frames * height * width).reshape(frames, height // 8, 8, width // 16, 16)
    return index.permute(0, 1, 3, 2, 4).reshape(-1)


def reference_mask(query: Tensor, key: Tensor, sparsity: float) -> Tensor:
    """The authors' mask of one head: query and key are (blocks, D) means. What is at least the kk-th smallest stays."""
    draft = (query @ key.T / math.sqrt(query.shape[-1])).softmax(-1)
    count = int(sparsity * draft.numel())
    if count == 0:
        return torch.ones_like(draft, dtype=torch.bool)
    return (draft >= draft.flatten().kthvalue(count).values) | torch.eye(len(draft), dtype=torch.bool)


# -- order ---------------------------------------------------------------------------------------------------------


def test_golden_orders() -> None:
    order = patch_layout(TokenGrid(2, 16, 32), 128).token_of_slot
    places = (0, 15, 16, 31, 32, 127, 128, 255, 256)
    assert [int(order[p]) for p in places] == [0, 15, 32, 47, 64, 239, 16, 255, 256]
    blocks = patch_layout(TokenGrid(33, 48, 80), 128)
    order = blocks.token_of_slot
    assert blocks.blocks == 990 and torch.equal(order.sort().values, torch.arange(33 * 48 * 80))
    assert [int(order[p]) for p in (0, 15, 16, 17, 127, 128, 129)] == [0, 15, 80, 81, 575, 16, 17]
    assert torch.equal(order, reference_order(33, 48, 80))


@pytest.mark.parametrize("height, width", [(16, 32), (45, 80), (30, 52), (7, 5), (1, 113), (63, 1)])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_every_frame_is_cut_in_patches_and_back(height: int, width: int, block_size: int) -> None:
    grid = TokenGrid(2, height, width, text=5, text_at="front")
    blocks = patch_layout(grid, block_size)
    x = torch.randn(1, grid.tokens, 1, 2)
    assert torch.equal(to_slots(x, blocks)[:, blocks.slot_of_token], x)
    at = grid.coordinates()
    rows, columns = patch_of(block_size, height, width)
    for block in blocks.token_of_slot.reshape(-1, block_size)[: video_blocks(blocks, grid)]:
        inside = at[block[block >= 0] - 5]
        span = inside.amax(0) - inside.amin(0) + 1
        assert span[0] == 1 and span[1] <= rows and span[2] <= columns and span.prod() == len(inside)


def test_patches_are_the_papers_where_they_fit() -> None:
    for height, width in ((48, 80), (32, 48), (8, 16)):
        assert patch_of(128, height, width) == (8, 16)
    assert patch_of(128, 30, 52) == (8, 13) and patch_of(128, 4, 80) == (4, 27) and patch_of(128, 1, 1) == (1, 1)


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, sparsity, kept", [(990, 0.9, 98_011), (990, 0.6, 392_041), (630, 0.75, 99_226), (252, 0.55, 28_578)]
)
def test_published_counts(blocks: int, sparsity: float, kept: int) -> None:
    assert paper_kept(1 - sparsity, blocks) == kept


def test_limits_of_the_count() -> None:
    assert paper_kept(1.0, 7) == 49
    text = (992**2 - 990**2 + 98_011) / 992**2
    assert text == pytest.approx(0.10363, abs=1e-5), "with two blocks of text"


# -- scores and selection ------------------------------------------------------------------------------------------


def test_draft_scores_are_block_means_of_the_logits(make_call) -> None:
    grid = TokenGrid(2, 16, 32)
    call = make_call(grid, head_dim=16)
    blocks = patch_layout(grid, 128)
    order = reference_order(2, 16, 32)
    query, key = (pool(x, blocks) for x in (call.query, call.key))
    ordered = [x[:, order].unflatten(1, (8, 128)) for x in (call.query, call.key)]
    torch.testing.assert_close(query, ordered[0].mean(2).transpose(1, 2), atol=1e-6, rtol=0)
    logits = torch.einsum("biqhd,bjkhd->bhijqk", *ordered).mean((-2, -1))
    torch.testing.assert_close(query @ key.mT, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("text_at, text", [("none", 0), ("back", 20), ("front", 40)])
def test_mask_is_that_of_the_paper(text_at: str, text: int, make_call) -> None:
    """Batch elements and heads have masks of their own; text is seen and sees everything."""
    grid = TokenGrid(3, 16, 32, text=text, text_at=text_at)
    call = make_call(grid, batch=2, heads=2)
    mask = Draft(density=0.3, count_forced=False, block_size=128).plan(call).mask
    got = mask.to_dense()
    video = [x[:, grid.video_slice][:, reference_order(3, 16, 32)].unflatten(1, (12, 128)).mean(2)
             for x in (call.query, call.key)]
    for b in range(2):
        for h in range(2):
            want = reference_mask(video[0][b, :, h], video[1][b, :, h], 0.7)
            assert torch.equal(got[b, h, :12, :12], want)
    assert got[..., 12:, :].all() and got[..., 12:].all()


def test_rows_keep_different_numbers_or_the_same(make_call) -> None:
    call = make_call(TokenGrid(3, 16, 32), heads=1)
    work = [Draft(density=0.3, selection=s, block_size=64).plan(call).mask.work() for s in ("global", "row")]
    assert work[0].min() < work[0].max() and work[1].min() == work[1].max()
    assert abs(int(work[0].sum()) - int(work[1].sum())) <= work[0].numel()


def test_row_selection_keeps_the_best_of_every_row(make_call) -> None:
    grid = TokenGrid(3, 16, 32)
    call = make_call(grid)
    mask = Draft(density=0.25, selection="row", count_forced=False, block_size=128).plan(call).mask
    blocks = patch_layout(grid, 128)
    scores = pool(call.query, blocks) @ pool(call.key, blocks).mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    want = torch.zeros(1, 2, 12, 12, dtype=torch.bool).scatter_(-1, scores.topk(3).indices, True)
    assert torch.equal(mask.to_dense(), want)


@pytest.mark.parametrize("selection", ["global", "row"])
def test_equal_scores_keep_the_count(selection: str, make_call) -> None:
    call = make_call(TokenGrid(4, 16, 32))
    call.query, call.key = torch.ones_like(call.query), torch.ones_like(call.key)
    mask = Draft(density=0.25, selection=selection).plan(call).mask
    assert float(mask.density()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("count_forced", [True, False])
def test_a_row_below_the_threshold_keeps_its_own_block(count_forced: bool, make_call) -> None:
    """One query block looks everywhere alike, the others at one block each: its entries are the smallest of all."""
    grid = TokenGrid(8, 16, 16)
    call = make_call(grid, heads=1, head_dim=16)
    names = torch.eye(16)[torch.arange(grid.video) // 128] * 12
    call.query, call.key = names[None, :, None].clone(), names[None, :, None].clone()
    call.query[:, :128] = 0
    mask = Draft(density=0.09, count_forced=count_forced, block_size=128).plan(call).mask
    assert int(mask.work()[0, 0, 0]) >= 1 and bool(mask.to_dense()[0, 0, 0, 0])
    out, lse = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale)
    assert out.isfinite().all() and lse.isfinite().all()


# -- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 16, 32), (2, 15, 20), (2, 30, 13)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_output_equals_dense_attention_under_the_mask(size: tuple, dtype: torch.dtype, tolerance: float,
                                                      make_call) -> None:
    call = make_call(TokenGrid(*size), head_dim=16)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    half = Call(query, key, value, call.grid, call.scale)
    for density in (0.3, 1.0):
        mask = Draft(density=density).plan(half).mask
        tokens = mask.token_mask()
        assert density < 1 or tokens.all()
        out, _ = block_sparse_attention(query, key, value, mask, scale=call.scale)
        want, _ = attention_reference(*(x.float() for x in (query, key, value)), tokens, call.scale)
        torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)


def _smooth_call(grid: TokenGrid, heads: int = 2, head_dim: int = 32) -> Call:
    """Queries and keys that change slowly over the grid: waves of one period or less along each axis."""
    generator = torch.Generator().manual_seed(3)
    at = grid.coordinates() / torch.tensor(grid.sizes)
    waves = 6.3 * at @ torch.randn(3, heads * head_dim, generator=generator) * 0.7
    phase = 6.3 * torch.rand(heads * head_dim, generator=generator)
    smooth = (2 * (waves + phase).cos()).reshape(1, grid.video, heads, head_dim)
    noise = torch.randn(3, *smooth.shape, generator=generator)
    return Call(smooth + 0.3 * noise[0], smooth + 0.3 * noise[1], noise[2], grid, head_dim**-0.5)


def test_recall_lies_between_chance_and_the_oracle() -> None:
    grid = TokenGrid(6, 24, 32)
    call = _smooth_call(grid)
    method = Draft(density=0.25, block_size=128)
    mask = method.plan(call).mask
    blocks = mask.query
    mass = block_mass(call.query, call.key, blocks, blocks, call.scale) / blocks.blocks
    keep = mask.to_dense()
    count = int(keep.sum((-2, -1)).max())
    got, best = (mass * keep).sum((-2, -1)), mass.flatten(-2).topk(count).values.sum(-1)
    chance = count / blocks.blocks**2
    assert (got >= chance + 0.05).all() and (got <= best + 1e-6).all()


@pytest.mark.parametrize(
    "grid", [TokenGrid(21, 45, 80), TokenGrid(21, 30, 52), TokenGrid(13, 30, 45, text=226, text_at="front"),
             TokenGrid(9, 16, 16), TokenGrid(1, 64, 64)], ids=str)
@pytest.mark.parametrize("selection", ["global", "row"])
def test_density_is_near_the_asked_one(grid: TokenGrid, selection: str, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    for density in (0.15, 0.25, 0.5):
        assert abs(float(Draft(density, selection).plan(call).mask.density()) - density) <= 0.03


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, r"density=0 .*\(0, 1\]"),
        ({"density": "0.2"}, "density='0.2'"),
        ({"selection": "column"}, "global, row"),
        ({"count_forced": 1}, "True or False"),
        ({"block_size": 48}, "block_size=48"),
        ({"sparsity": 0.75}, "density, selection, count_forced"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("draft", **options)
    assert "\n" not in str(caught.value)
