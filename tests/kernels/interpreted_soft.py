"""The kernel of soft blocks in Triton's interpreter. Run by test_soft.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels import soft_kernel
from dit_sparse.kernels.blocks import Blocks
from tests.kernels.cases import Case
from tests.kernels.soft_rule import CASES, check, inputs_of, masked_out, merge, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_the_twin(case: Case) -> None:
    inputs = inputs_of(case)
    assert check(inputs, *run(inputs, True)) == ""
    assert check(inputs, *merge(inputs, True)) == ""


def test_blocks_without_keys_are_no_entries() -> None:
    inputs = masked_out(order="permuted")
    assert check(inputs, *run(inputs, True)) == ""


def test_marks_are_the_lists() -> None:
    for case in (Case(300, 3000, key_block=16, batch=2, lists="all"), Case(113, 239, lists="shared")):
        blocks = Blocks.from_mask(inputs_of(case).mask)
        listed = soft_kernel.listed_blocks(blocks, 256)
        assert torch.equal(listed[..., : blocks.key_blocks] != 0, blocks.listed())
        assert not listed[..., blocks.key_blocks :].any()
    # One list shared by all query blocks, with stride 0.
    dense = Blocks.dense(70, 150, 64, None, torch.device("cpu"))
    assert soft_kernel.listed_blocks(dense, 128)[..., :3].all()


def test_query_blocks_wider_than_a_tile() -> None:
    """Query blocks of 256 take two programs each."""
    inputs = inputs_of(Case(300, 200, query_block=256, key_block=32, heads=1, dtype=torch.float16))
    assert check(inputs, *merge(inputs, True)) == ""


def test_bfloat16_is_refused_in_words() -> None:
    inputs = inputs_of(Case(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        run(inputs, True)


def test_nothing_to_do() -> None:
    layouts = BlockLayout.raster(0, 16), BlockLayout.raster(40, 16)
    mask = BlockMask.full(*layouts)
    query, key, value, means = (torch.randn(1, n, 2, 16) for n in (0, 40, 40, 3))
    from dit_sparse.kernels.soft import merge_soft_blocks

    out, lse = merge_soft_blocks(query, means.transpose(1, 2), means.transpose(1, 2), mask, torch.empty(1, 0, 2, 16),
                                 torch.empty(1, 2, 0), kernels=True)
    assert not out.numel() and not lse.numel()
