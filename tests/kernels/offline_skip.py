"""Compiles the kernel with the inner filter for sm_90 on any machine, without a GPU, and counts registers and spills.

    python tests/kernels/offline_skip.py [--cases bf16-128 ...]

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

from dit_sparse.kernels import skip_kernel  # noqa: E402
from dit_sparse.kernels.blocks import Blocks  # noqa: E402
from tests.kernels.offline_routing import TYPES, Case, run  # noqa: E402


def skip(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, block: int = 128, index: bool = False, mask: bool = False,
    trials: int = 1, apply: bool = True, **options: Any,
) -> Case:
    """Attention with the filter over plain lists."""
    x = torch.empty(1, 256, 1, head_dim, dtype=dtype)
    constants = skip_kernel.constants_of(x, x, Blocks.dense(256, 256, block, None, x.device), trials, apply) | options
    warps = constants.pop("num_warps")
    types = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{TYPES[dtype]}") | {
        "LSE": "*fp32", "LEVELS": "*u8", "BOUNDS": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("LISTS", "WHOLE", "BOUNDARY", "START", "ORDER", "KEY_LENGTHS"), "*i32")
    constants |= {name: 1 for name in ("stride_qd", "stride_kd", "stride_vd")}
    constants |= dict.fromkeys(("COORDINATES", "LOW", "HIGH", "ALWAYS"))
    for name, kind, there in (("QUERY_INDEX", "*i64", index), ("KEY_OK", "*i8", mask)):
        if there:
            types[name] = kind
        else:
            constants[name] = None
    return Case(skip_kernel.skip_kernel, types, constants, warps, constants["STAGES"])


CASES = {
    "bf16-128": skip(),
    "bf16-128-index": skip(index=True, mask=True),
    "bf16-128-count": skip(trials=22, apply=False),
    "fp16-64": skip(torch.float16, head_dim=64),
    "bf16-block-64": skip(block=64),
}


if __name__ == "__main__":
    sys.exit(run(CASES, __doc__, half=CASES.keys()))
