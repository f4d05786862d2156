"""Random calls with soft blocks, and their accuracy rule, shared by CPU and interpreter tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_sparse import scoring
from dit_sparse.blockmask import BlockMask
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import soft_reference
from dit_sparse.kernels.soft import merge_soft_blocks, soft_attention, soft_means
from tests.kernels.cases import Case, Inputs, build

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLOOR = {FP32: 2e-6, FP16: 1e-4, BF16: 1e-3}  # errors that are none, however exact plain PyTorch happens to be

# Query block 1 of a case lists nothing, query block 0 everything.
CASES = [
    Case(1, 1, lists="shared"),
    Case(113, 239, head_dim=128),
    Case(63, 300, head_dim=96, dtype=FP16, heads=1, query_block=32, key_block=32),
    Case(130, 113, query_block=128, key_block=32, dtype=FP16, heads=1),
    Case(113, 150, batch=2, lists="all", dtype=FP16),
    Case(113, 150, batch=2, lists="shared", order="permuted"),
    Case(113, 150, order="heads", batch=2, lists="all", masked=True, key_block=32),
    Case(113, 150, order="permuted", masked=True, strided=True, head_dim=96, query_block=32, key_block=16),
    Case(113, 150, strided=True, dtype=FP16, value_dim=96),
    Case(113, 150, masked=True, batch=2, dtype=FP16, key_block=32),
    Case(150, 600, window=1, key_block=16),
    Case(200, 4200, key_block=16, head_dim=64, heads=1, dtype=FP16),
]

# What the Hopper kernel in CUDA C++ computes beside the listed blocks; more means than one step takes, rows that list
# all or nothing, short blocks.
TOGETHER_CASES = [
    Case(150, 1023, head_dim=64, dtype=BF16, query_block=128, key_block=128),
    Case(65, 8600, head_dim=64, dtype=BF16, query_block=128, key_block=64, lists="shared"),
    Case(129, 400, head_dim=96, dtype=FP16, query_block=128, key_block=64, order="heads"),
    Case(129, 300, batch=2, head_dim=128, dtype=BF16, query_block=128, key_block=128, order="permuted", lists="all",
         strided=True),
    Case(1, 1, head_dim=128, dtype=BF16, query_block=128, key_block=128),
]


def masked_out(device: str = "cpu", **options: Any) -> Inputs:
    """A call in which one block has no key left, and the second batch element none at all."""
    inputs = build(Case(113, 150, batch=2, masked=True, key_block=32, **options), device)
    assert inputs.key_mask is not None
    inputs.key_mask[:, 32:64], inputs.key_mask[1] = False, False
    inputs.key[~inputs.key_mask], inputs.value[~inputs.key_mask] = torch.nan, torch.nan
    return inputs


def means_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Block means of keys and values, float32."""
    mean_key, mean_value = (scoring.pool(x, inputs.mask.key, mask=inputs.key_mask) for x in (inputs.key, inputs.value))
    return mean_key, mean_value


def run(inputs: Inputs, kernels: bool | None) -> tuple[Tensor, Tensor]:
    """The operator; kernels: of the soft blocks, merged after the listed ones; None: as calls run by default."""
    call = (inputs.query, inputs.key, inputs.value)
    options = dict(scale=inputs.scale, key_mask=inputs.key_mask)
    if kernels is None:
        return soft_attention(*call, *means_of(inputs), inputs.mask, **options)
    hard = block_sparse_attention(*call, inputs.mask, **options)
    return merge_soft_blocks(inputs.query, *means_of(inputs), inputs.mask, *hard, **options, kernels=kernels)


def merge(inputs: Inputs, kernels: bool | None) -> tuple[Tensor, Tensor]:
    """The operator after plain attention over the listed blocks, in the dtype of the inputs: for its own rounding."""
    hard = plain_parts(inputs)[0]
    return merge_soft_blocks(inputs.query, *means_of(inputs), inputs.mask, *hard, scale=inputs.scale,
                             key_mask=inputs.key_mask, kernels=kernels)


def check(inputs: Inputs, out: Tensor, lse: Tensor) -> str:
    """Error against float64 at most twice that of plain PyTorch in the same dtype; "" when it is."""
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.scale, inputs.key_mask)
    want, want_lse = soft_reference(*arguments, dtype=torch.float64)
    plain, plain_lse = plain_parts(inputs)[1]
    empty = want_lse == -torch.inf
    if out.shape != want.shape or lse.shape != want_lse.shape or lse.dtype != FP32 or out.dtype != inputs.query.dtype:
        return f"shapes {tuple(out.shape)} {tuple(lse.shape)} {lse.dtype}"
    if not torch.equal(lse == -torch.inf, empty) or not torch.isfinite(out).all():
        return "the LSE is not -inf exactly where there is nothing to see, or the output is not finite"
    found = []
    for name, got, got_plainly, true, least in (("out", out, plain, want, FLOOR[out.dtype]),
                                                ("lse", lse[~empty], plain_lse[~empty], want_lse[~empty], 4e-6)):
        error, plain_error = ((x.double() - true).abs().max().item() if x.numel() else 0.0 for x in (got, got_plainly))
        if not error <= 2 * plain_error + least:
            found.append(f"{name}: error {error:.2e}, plain PyTorch {plain_error:.2e}")
    return "; ".join(found)


def plain_parts(inputs: Inputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ordinary PyTorch in the dtype of the inputs: attention over listed blocks alone, and with soft entries."""
    mask: BlockMask = inputs.mask
    q, (B, _, H, _) = inputs.query.transpose(1, 2), inputs.query.shape
    real = torch.ones(inputs.key.shape[:2], dtype=torch.bool, device=q.device)
    real = real if inputs.key_mask is None else inputs.key_mask
    k, v = (torch.where(real[..., None, None], x, 0).transpose(1, 2) for x in (inputs.key, inputs.value))
    count = scoring.pool(real[..., None, None].float().expand(-1, -1, H, 1), mask.key)[..., 0] * mask.key.lengths
    mean_k, mean_v = (x.to(q.dtype) for x in means_of(inputs))
    row = mask.query.block_of_token.expand(B, H, -1)[..., None].expand(-1, -1, -1, mask.key.blocks)
    listed = mask.to_dense().expand(B, H, -1, -1).gather(2, row)

    seen = mask.token_mask() & real[:, None, None]
    hard = (q @ k.mT * inputs.scale).masked_fill(~seen, -torch.inf)
    soft = (q @ mean_k.mT * inputs.scale + count.log()[:, :, None].to(q.dtype)).masked_fill(listed, -torch.inf)

    def finish(score: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = (score.softmax(-1).nan_to_num(0) @ value).transpose(1, 2)
        return out.contiguous(), score.float().logsumexp(-1)

    return finish(hard, v), finish(torch.cat([hard, soft], -1), torch.cat([v, mean_v], -2))


def inputs_of(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case."""
    return build(case, device)


def check_together(inputs: Inputs, attend: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """Listed and soft blocks in one launch of a kernel, of all heads and of the first one alone; "" when right.

    Args:
        inputs: a call.
        attend: as `block_sparse_attention_cuda`.
    """
    call = (inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask), inputs.scale)
    soft = soft_means(*means_of(inputs), inputs.mask)
    found = attend(*call, soft=soft)
    if problem := check(inputs, *found):
        return problem
    first = torch.zeros(1, dtype=torch.int64, device=inputs.query.device)
    some, plain = attend(*call, soft=dataclasses.replace(soft, heads=first)), attend(*call)
    for mixed, of_all, of_none, heads in zip(some, found, plain, (2, 1), strict=True):
        want = torch.cat([of_all.narrow(heads, 0, 1), of_none.narrow(heads, 1, of_none.shape[heads] - 1)], heads)
        if not torch.equal(mixed, want):
            return "soft blocks of the first head alone change another head, or differ from those of all heads"
    return ""
