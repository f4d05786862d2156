"""The twins: against PyTorch, and against each other."""

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference, merge_by_lse
from tests.kernels.cases import Case, build


def test_attention_reference_equals_sdpa() -> None:
    query, key, value = (torch.randn(2, n, 3, 64, dtype=torch.float64) for n in (63, 113, 113))
    seen = torch.rand(2, 3, 63, 113) < 0.5
    out, lse = attention_reference(query, key, value, seen, 0.2, dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2).transpose(1, 2)
    torch.testing.assert_close(out, want)
    scores = (q @ k.transpose(-1, -2) * 0.2).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_queries_without_a_key_give_zero_and_minus_infinity() -> None:
    query, key = torch.randn(1, 5, 2, 16), torch.randn(1, 7, 2, 16)
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    out, lse = attention_reference(query, key, key, seen)
    assert not out[:, 2].any() and (lse[..., 2] == -torch.inf).all()
    assert torch.isfinite(lse[..., [0, 1, 3, 4]]).all()


def test_masked_keys_may_be_nan() -> None:
    query, key, value = (torch.randn(2, 9, 2, 16) for _ in range(3))
    key_mask = torch.rand(2, 9) < 0.6
    key_mask[:, 0] = True
    want = attention_reference(query, key, value, key_mask=key_mask)
    key[~key_mask], value[~key_mask] = torch.nan, torch.nan
    for got, expected in zip(attention_reference(query, key, value, key_mask=key_mask), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge_by_lse_rebuilds_the_whole(parts: int) -> None:
    query, key, value = (torch.randn(2, n, 2, 32) for n in (17, 40, 40))
    seen = torch.rand(2, 1, 17, 40) < 0.7
    seen[:, :, 3] = False
    part_of_key = torch.randint(0, parts, (40,))
    pieces = [attention_reference(query, key, value, seen & (part_of_key == i)) for i in range(parts)]
    for got, want in zip(merge_by_lse(pieces), attention_reference(query, key, value, seen), strict=True):
        torch.testing.assert_close(got, want)


def test_merge_by_lse_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="parts is empty"):
        merge_by_lse([])


@pytest.mark.parametrize("case", [
    Case(), Case(order="permuted", window=2, always=True), Case(order="heads", lists="all", batch=2),
    Case(window=3, query_block=32, key_block=128), Case(query_tokens=1, key_tokens=63, lists="shared", window=1),
], ids=lambda case: case.name)
def test_blocks_and_block_mask_mean_the_same_pairs(case: Case) -> None:
    inputs = build(case)
    blocks = Blocks.from_mask(inputs.mask)
    shape = (case.batch, case.heads, case.query_tokens, case.key_tokens)
    assert torch.equal(blocks.token_mask().expand(shape), inputs.mask.token_mask().expand(shape))


def test_density_one_equals_dense() -> None:
    from dit_sparse.blockmask import BlockLayout, BlockMask

    query, key, value = (torch.randn(1, n, 2, 64) for n in (63, 113, 113))
    mask = BlockMask.full(BlockLayout.raster(63, 32), BlockLayout.raster(113, 64))
    sparse, dense = block_sparse_reference(query, key, value, mask), attention_reference(query, key, value)
    for got, want in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got, want)
