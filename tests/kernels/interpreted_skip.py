"""The kernel with the inner filter in Triton's interpreter. Run by test_skip.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.skip import skip_attention
from tests.kernels.cases import Case
from tests.kernels.skip_rule import CASES, check, inputs_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_the_twin(case: Case) -> None:
    assert check(inputs_of(case), True) == ""


def test_kernel_visits_in_list_order_when_asked() -> None:
    assert check(inputs_of(CASES[2]), True, first="list") == ""


def test_counting_leaves_out_nothing() -> None:
    inputs = inputs_of(CASES[1])
    arguments = inputs.query, inputs.key, inputs.value, inputs.mask, torch.tensor([[1.0, 0.5, 0.1], [0.9, 0.4, 0.0]])
    found = skip_attention(*arguments, scale=inputs.scale, apply=False, kernels=True)
    want = skip_attention(*arguments, scale=inputs.scale, apply=False, kernels=False)
    for got, expected in zip(found[:2], want[:2], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(found[2], want[2])


def test_bfloat16_is_refused_in_words() -> None:
    inputs = inputs_of(Case(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        skip_attention(inputs.query, inputs.key, inputs.value, inputs.mask, torch.ones(1, 1), kernels=True)


def test_nothing_to_do() -> None:
    mask = BlockMask.full(BlockLayout.raster(0, 16), BlockLayout.raster(40, 16))
    query, key, value = (torch.randn(1, n, 2, 16) for n in (0, 40, 40))
    out, lse, levels = skip_attention(query, key, value, mask, torch.ones(1, 1), kernels=True)
    assert not out.numel() and not lse.numel() and not levels.numel()
