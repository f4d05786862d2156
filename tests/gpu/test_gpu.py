"""The GPU checks under pytest."""

import pytest
import torch

from tests.gpu.checks import all_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(),
                       reason="needs a CUDA GPU; on such a machine also run: python tests/gpu/run.py --out DIR"),
]


@pytest.mark.parametrize("name", list(all_checks()))
def test_gpu(name: str) -> None:
    assert all_checks()[name]() == ""
