"""Compiles the kernels of soft blocks for sm_90 on any machine, without a GPU, and counts registers and spills.

    python tests/kernels/offline_soft.py [--cases bf16-128 fp32 ...]

Exits with 1 when a compile fails or spills, or when the matrix products are not those of Hopper. Works with triton 3.6
and later.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dit_sparse.kernels import soft_kernel  # noqa: E402
from dit_sparse.kernels.blocks import Blocks  # noqa: E402
from tests.kernels.offline_routing import TYPES, Case, run  # noqa: E402


def soft(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, query_block: int = 128, index: bool = False,
    **options: Any,
) -> Case:
    """Soft blocks merged into what is there."""
    name = TYPES[dtype]
    blocks = Blocks.dense(256, 256, query_block, None, torch.device("cpu"))
    constants = soft_kernel.constants_of(blocks, head_dim, head_dim, dtype, torch.device("cpu"))
    constants |= options
    warps = constants.pop("num_warps")
    types = dict.fromkeys(("Q", "KEYS", "VALUES", "OUT"), f"*{name}")
    types |= {"BIAS": "*fp32", "LISTED": "*i8", "LSE": "*fp32", "scale_log2": "fp32"}
    constants["stride_qd"] = 1
    if index:
        types["QUERY_INDEX"] = "*i64"
    else:
        constants["QUERY_INDEX"] = None
    return Case(soft_kernel.soft_kernel, types, constants, warps, constants["STAGES"])


CASES = {
    "bf16-128": soft(),
    "bf16-128-index": soft(index=True),
    "fp16-128": soft(torch.float16),
    "bf16-96": soft(head_dim=96, index=True),
    "bf16-64": soft(head_dim=64),
    "bf16-block-64": soft(query_block=64, index=True),
    "fp32-128": soft(torch.float32, index=True),
    "mark": Case(soft_kernel.mark_kernel, dict.fromkeys(("LISTS", "WHOLE", "BOUNDARY"), "*i32") | {"LISTED": "*i8"},
                 dict(STEP=1024)),
}


if __name__ == "__main__":
    sys.exit(run(CASES, __doc__, half=CASES.keys() - {"mark", "fp32-128"}))
