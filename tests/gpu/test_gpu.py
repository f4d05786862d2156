"""The GPU checks under pytest."""

import pytest
import torch

from tests.gpu.run import checks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(),
                       reason="needs a CUDA GPU; on such a machine also run: python tests/gpu/run.py --out DIR"),
]


@pytest.mark.parametrize("name", list(checks_of(None)))
def test_gpu(name: str) -> None:
    found = checks_of(None)[name]()
    assert (found[0] if isinstance(found, tuple) else found) == ""
