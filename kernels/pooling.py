"""Mean of every block of tokens in one pass over the activations: Triton, on any GPU that it knows, and interpreted.

The twin is `dit_sparse.scoring.pool`. Importing this module needs triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .portable import _broadcast_strides, _on_device, _width


@triton.jit(do_not_specialize=["H", "L", "BLOCKS"])
def pool_kernel(
    X, INDEX, MASK, OUT, stride_xb, stride_xn, stride_xh, stride_xd, stride_ib, stride_ih, stride_mb, stride_mn,
    H, L, BLOCKS, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """One block of one head. X (B, L, H, D) by strides, OUT (B, H, BLOCKS, D) float32, contiguous.

    May be None: INDEX (slot = token), MASK bool (B, L), True where the token is real.
    """
    # Heads lie next to each other in memory, so neighbouring programs take the heads of one block.
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    i_block = (pid // H % BLOCKS).to(tl.int64)
    b = (pid // H // BLOCKS).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in tl.static_range(0, BLOCK, ROWS):
        place = start + tl.arange(0, ROWS)
        slot = i_block * BLOCK + place
        if INDEX is None:
            token = tl.where(place < BLOCK, slot, -1)
        else:
            token = tl.load(INDEX + b * stride_ib + h * stride_ih + slot, mask=place < BLOCK, other=-1)
        m_row = (token >= 0) & (token < L)
        if MASK is not None:
            m_row &= tl.load(MASK + b * stride_mb + token * stride_mn, mask=m_row, other=0) != 0
        p_tile = X + b * stride_xb + h * stride_xh + token[:, None] * stride_xn + o_d[None, :] * stride_xd
        total += tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        count += m_row.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(OUT + ((b * H + h) * BLOCKS + i_block) * D + o_d, mean, mask=o_d < D)


def rows_at_once(block: int, width: int, dtype: torch.dtype) -> int:
    """Tokens that a program of 4 warps loads at a time: 64 numbers of a thread at most, 32 of float32."""
    return max(1, min(triton.next_power_of_2(block), (4096 if dtype == torch.float32 else 8192) // width))


def pool_triton(x: Tensor, index: Tensor | None, block: int, blocks: int, mask: Tensor | None = None) -> Tensor:
    """Mean of the real tokens of every block; neither padding nor masked tokens are read.

    Args:
        x: (B, L, H, D), any strides.
        index: int64 (B|1, H|1, blocks * block), token at each slot and -1 for padding; None: slot = token.
        block, blocks: slots of a block, and how many blocks there are.
        mask: bool (B, L), True where the token is real; None: all are.

    Returns:
        float32 (B, H, blocks, D); zeros for a block without real tokens.
    """
    B, L, H, D = x.shape
    out = torch.empty(B, H, blocks, D, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    index_strides = (0, 0) if index is None else _broadcast_strides(index)[:2]
    mask_strides = (0, 0) if mask is None else mask.expand(B, L).stride()
    width = _width(D)
    if index is not None:
        index = index if index.stride(-1) == 1 else index.contiguous()
    with _on_device(x.device):
        pool_kernel[(B * H * blocks,)](
            x, index, mask, out, *x.stride(), *index_strides, *mask_strides, H, L, blocks,
            D=D, WIDTH=width, BLOCK=block, ROWS=rows_at_once(block, width, x.dtype), num_warps=4)
    return out
