import math

import pytest
import torch
from torch import Tensor

from dit_sparse import order as orders
from dit_sparse import scoring
from dit_sparse.blockmask import BlockLayout
from dit_sparse.grid import TokenGrid
from dit_sparse.selection import select_top_k

NAN = float("nan")


def layouts(tokens: int, block_size: int, heads: int) -> dict[str, BlockLayout]:
    one, many = torch.randperm(tokens), torch.stack([torch.randperm(tokens) for _ in range(heads)])[None]
    return {
        "raster": BlockLayout.raster(tokens, block_size),
        "one order": BlockLayout.from_order(one, block_size, lengths=[tokens // 3, tokens - tokens // 3]),
        "per head": BlockLayout.from_order(many, block_size),
        "empty block": BlockLayout.from_order(one, tokens, lengths=torch.tensor([0, tokens])),
    }


def members(layout: BlockLayout, head: int, block: int) -> Tensor:
    """Tokens of a block, as one head sees it."""
    index = layout.token_of_slot
    index = index if index.dim() == 1 else index[0, head if index.shape[1] > 1 else 0]
    tokens = index.reshape(layout.blocks, -1)[block]
    return tokens[tokens >= 0]


@pytest.mark.parametrize("name", ["raster", "one order", "per head", "empty block"])
@pytest.mark.parametrize("tokens", [1, 63, 100, 113])
@pytest.mark.parametrize("masked", [False, True])
def test_pool_is_the_mean_of_real_tokens(name: str, tokens: int, masked: bool) -> None:
    heads = 3
    layout = layouts(tokens, 32, heads)[name]
    x = torch.randn(2, tokens, heads, 8)
    mask = None
    if masked:
        mask = torch.rand(2, tokens) < 0.7
        x[~mask] = NAN
    pooled = scoring.pool(x, layout, mask=mask)
    assert pooled.dtype == torch.float32 and pooled.shape == (2, heads, layout.blocks, 8)
    for b in range(2):
        for h in range(heads):
            for n in range(layout.blocks):
                rows = members(layout, h, n)
                rows = rows if mask is None else rows[mask[b, rows]]
                expected = x[b, rows, h].sum(0) / max(1, len(rows))
                torch.testing.assert_close(pooled[b, h, n], expected)


def test_pool_in_pieces_equals_pool_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts(239, 16, 3)["per head"]
    x = torch.randn(2, 239, 3, 8, dtype=torch.bfloat16)
    whole = scoring.pool(x, layout)
    monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", 1)
    assert torch.equal(scoring.pool(x, layout), whole)


def test_pool_accumulates_in_float32() -> None:
    x = torch.full((1, 4096, 1, 2), 1.0, dtype=torch.bfloat16)
    x[:, ::2] += 0.0078125
    assert scoring.pool(x, BlockLayout.raster(4096, 4096))[0, 0, 0, 0].item() == pytest.approx(1.00390625)


def test_pool_refuses_another_length() -> None:
    with pytest.raises(ValueError, match="x has 10 tokens, the layout 11"):
        scoring.pool(torch.zeros(1, 10, 1, 2), BlockLayout.raster(11, 4))


@pytest.mark.parametrize("name", ["raster", "one order", "per head"])
def test_to_slots_and_back(name: str) -> None:
    layout = layouts(113, 32, 3)[name]
    x = torch.randn(2, 113, 3, 4)
    slots = scoring.to_slots(x, layout)
    assert slots.shape == (2, layout.slots, 3, 4)
    assert not slots[:, ~layout.real].any()
    place = layout.slot_of_token.expand(2, 3, -1).transpose(1, 2)[..., None].expand_as(x)
    assert torch.equal(slots.gather(1, place), x)


def test_pooled_scores_of_text_are_apart_from_video() -> None:
    """Text in front, as in CogVideoX: pooled over its own blocks only, whatever the video order."""
    grid = TokenGrid(3, 5, 7, text=9, text_at="front")
    layout = orders.layout(grid, orders.hilbert(grid), 32)
    query, key = torch.randn(1, grid.tokens, 2, 4), torch.zeros(1, grid.tokens, 2, 4)
    key[:, :9] = 1
    scores = scoring.pooled_scores(query, key, layout, layout, 0.5)
    assert not scores[..., :-1].any()
    torch.testing.assert_close(scores[0, :, :, -1], scoring.pool(query, layout)[0].sum(-1) * 0.5)


@pytest.mark.parametrize("masked", [False, True])
def test_select_means_equals_selection_of_all_heads(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    query_layout, key_layout = BlockLayout.raster(100, 16), BlockLayout.raster(77, 8)
    query, key = torch.randn(2, 100, 5, 8), torch.randn(2, 77, 5, 8)
    mask = torch.arange(77).expand(2, -1) < 60 if masked else None
    if masked:
        key[:, 60:] = NAN
    means = scoring.pool(query, query_layout), scoring.pool(key, key_layout, mask=mask)
    scores = scoring.pooled_scores(query, key, query_layout, key_layout, 0.3, key_mask=mask)
    assert scores.isfinite().all()
    expected = select_top_k(scores, 3)
    for limit in (1, 2**26):
        monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", limit)
        keep = scoring.select_means(*means, 0.3, lambda s, heads: select_top_k(s, 3))
        assert torch.equal(keep, expected)


def dense(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return (torch.einsum("blhd,bmhd->bhlm", query.double(), key.double()) * scale).softmax(-1)


@pytest.mark.parametrize("per_head", [False, True])
def test_sampled_rows_equal_dense_rows(per_head: bool) -> None:
    query, key, value = torch.randn(2, 113, 3, 8), torch.randn(2, 63, 3, 8), torch.randn(2, 63, 3, 5)
    rows = torch.randint(113, (1, 3, 7)) if per_head else torch.randint(113, (7,))
    probs, out = scoring.sampled_row_attention(query, key, value, rows, 0.4)
    place = rows.expand(2, 3, -1)
    expected = dense(query, key, 0.4).gather(2, place[..., None].expand(-1, -1, -1, 63)).float()
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(out, expected @ value.transpose(1, 2))


def test_sampled_rows_with_masks() -> None:
    query, key, value = torch.randn(2, 20, 3, 8), torch.randn(2, 30, 3, 8), torch.randn(2, 30, 3, 5)
    real = torch.arange(30).expand(2, -1) < torch.tensor([[30], [11]])
    key[~real], value[~real] = NAN, NAN
    allowed = torch.rand(6, 30) < 0.5
    allowed[0] = False
    probs, out = scoring.sampled_row_attention(query, key, value, torch.arange(6), 1.0, allowed=allowed, key_mask=real)
    assert probs.isfinite().all() and out.isfinite().all()
    assert not probs[:, :, 0].any() and not out[:, :, 0].any()
    both = (allowed & real[:, None]).unsqueeze(1).expand(2, 3, 6, 30)
    assert not probs[~both].any()
    assert torch.allclose(probs.sum(-1)[both.any(-1)], torch.ones(()))
    clean = key.nan_to_num()
    logits = torch.einsum("blhd,bmhd->bhlm", query[:, :6], clean).masked_fill(~both, -math.inf)
    torch.testing.assert_close(probs, logits.softmax(-1).nan_to_num())
    assert scoring.sampled_row_attention(query, key, None, torch.arange(6), 1.0)[1] is None


@pytest.mark.parametrize("name", ["raster", "one order", "per head"])
@pytest.mark.parametrize("masked", [False, True])
def test_block_mass_equals_dense_softmax(monkeypatch: pytest.MonkeyPatch, name: str, masked: bool) -> None:
    heads = 3
    query_layout, key_layout = layouts(100, 32, heads)[name], layouts(63, 16, heads)[name]
    query, key = torch.randn(2, 100, heads, 8), torch.randn(2, 63, heads, 8)
    real = torch.arange(63).expand(2, -1) < torch.tensor([[63], [40]]) if masked else None
    probs = dense(query, key, 0.5)
    if masked:
        probs = probs * real[:, None, None]
        probs = probs / probs.sum(-1, keepdim=True)
        key[~real] = NAN
    mass = scoring.block_mass(query, key, query_layout, key_layout, 0.5, key_mask=real)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))
    for b in range(2):
        for h in range(heads):
            for i in range(query_layout.blocks):
                rows = members(query_layout, h, i)
                for j in range(key_layout.blocks):
                    share = probs[b, h, rows][:, members(key_layout, h, j)].sum(-1).mean().item()
                    assert mass[b, h, i, j].item() == pytest.approx(share, abs=1e-5)
    monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(
        scoring.block_mass(query, key, query_layout, key_layout, 0.5, key_mask=real), mass
    )


def test_head_chunks_cover_all_heads() -> None:
    chunks = list(scoring.head_chunks(40, 2**26 // 12))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(40))
    assert max(chunk.stop - chunk.start for chunk in chunks) == 12
    assert list(scoring.head_chunks(3, 2**40)) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_scores_never_read_a_tensor() -> None:
    x = torch.rand(1, 113, 2, 8, device="meta")
    layout = BlockLayout.from_order(torch.zeros(1, 2, 113, dtype=torch.int64, device="meta"), 32)
    mask = torch.ones(1, 113, dtype=torch.bool, device="meta")
    means = scoring.pool(x, layout), scoring.pool(x, layout, mask=mask)
    keep = scoring.select_means(*means, 1.0, lambda s, heads: select_top_k(s, 2))
    assert keep.shape == (1, 2, 4, 4)
    assert scoring.block_mass(x, x, layout, layout, 1.0, key_mask=mask).shape == (1, 2, 4, 4)
