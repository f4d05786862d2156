"""Random calls with the inner filter, and their accuracy rule, shared by CPU and interpreter tests."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_sparse.blockmask import BlockMask
from dit_sparse.kernels.reference import skip_reference
from dit_sparse.kernels.skip import skip_attention
from tests.kernels.cases import Case, Inputs, build
from tests.kernels.cases import check as check_attention

FP16 = torch.float16
THRESHOLD = 0.3

# Query block 1 of a case lists nothing, query block 0 everything.
CASES = [
    Case(1, 1, lists="shared"),
    Case(113, 239, key_block=32),
    Case(150, 300, query_block=32, key_block=16, batch=2, lists="all"),
    Case(150, 300, query_block=32, key_block=16, order="permuted", dtype=FP16),
    Case(113, 150, query_block=16, key_block=16, order="heads", masked=True, batch=2, lists="all"),
    Case(63, 300, query_block=16, key_block=16, window=2, always=True, masked=True),
    Case(130, 113, query_block=128, key_block=32, head_dim=96, strided=True, value_dim=64),
]


def without(mask: BlockMask, skipped: Tensor) -> BlockMask:
    """The mask without some of its list entries, bool (B, H, nq, width)."""
    place = torch.arange(mask.lists.shape[-1])
    left = (place < mask.work()[..., None]) & ~skipped
    lists = mask.lists.expand(left.shape).long()
    keep, partial = (torch.zeros(*left.shape[:3], mask.key.blocks + 1, dtype=torch.bool).scatter_(
        -1, torch.where(some, lists, mask.key.blocks), True)[..., :-1]
        for some in (left, left & (place >= mask.whole[..., None])))
    return BlockMask.from_dense(keep, mask.query, mask.key, partial=partial, window=mask.window)


def check(inputs: Inputs, kernels: bool, first: str = "own", threshold: float = THRESHOLD, device: str = "cpu") -> str:
    """What is left out equals the twin; the rest is attention over what is left, by the accuracy rule.

    Args:
        inputs: on the CPU, where the twin runs.
        kernels, first: as in `skip_attention`, which runs on `device`.
        threshold: filters; a third of it is counted along.
    """
    arguments = inputs.query, inputs.key, inputs.value, inputs.mask
    options = dict(scale=inputs.scale, key_mask=inputs.key_mask, first=first)
    there = (x.to(device) for x in (*arguments, torch.tensor([[threshold, threshold / 3]])))
    key_mask = None if inputs.key_mask is None else inputs.key_mask.to(device)
    found = skip_attention(*there, scale=inputs.scale, key_mask=key_mask, first=first, kernels=kernels)
    out, lse, levels = (x.cpu() for x in found)
    _, _, skipped = skip_reference(*arguments, threshold, **options)
    if levels.dtype != torch.uint8 or not torch.equal(levels > 0, skipped):
        return f"{int((levels > 0).sum())} blocks left out, the twin leaves out {int(skipped.sum())}"
    if not torch.equal(levels > 1, skip_reference(*arguments, threshold / 3, **options)[2]):
        return "the count of the second threshold is not that of the twin"
    return check_attention(dataclasses.replace(inputs, mask=without(inputs.mask, skipped)), out, lse)


def inputs_of(case: Case) -> Inputs:
    """The tensors of a case, with key blocks whose scores lie apart, so that the filter finds something."""
    inputs = build(case)
    height = torch.randn(inputs.mask.key.blocks, generator=torch.Generator().manual_seed(1))
    block = inputs.mask.key.block_of_token.expand(case.batch, case.heads, -1)
    inputs.query[..., 0] = 3 / inputs.scale
    inputs.key[..., 0] = 2 * height[block].transpose(1, 2)
    return inputs
