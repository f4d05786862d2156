"""Mean of every block of tokens, and of their squares, in one pass over the activations: Triton, on any GPU that it
knows, and interpreted.

The twin is the plain path of `dit_sparse.routing.pool` and `pool_moments`. Importing this module needs triton.
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
    X, INDEX, MASK, OUT, SQUARES, stride_xb, stride_xn, stride_xh, stride_xd, stride_ib, stride_ih, stride_mb,
    stride_mn, H, L, BLOCKS, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """One block of one head. X (B, L, H, D) by strides, OUT (B, H, BLOCKS, D) float32, contiguous.

    May be None: INDEX (slot = token), MASK bool (B, L), True where the token is real, SQUARES (B, H, BLOCKS) float32,
    contiguous, the mean of the tokens' squared norms.
    """
    # Heads lie next to each other in memory, so neighbouring programs take the heads of one block.
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    i_block = (pid // H % BLOCKS).to(tl.int64)
    b = (pid // H // BLOCKS).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    if SQUARES is not None:
        square = tl.zeros([ROWS, WIDTH], tl.float32)
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
        x = tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        total += x
        if SQUARES is not None:
            square += x * x
        count += m_row.to(tl.int32)
    tokens = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    place = (b * H + h) * BLOCKS + i_block
    tl.store(OUT + place * D + o_d, tl.sum(total, 0) / tokens, mask=o_d < D)
    if SQUARES is not None:
        tl.store(SQUARES + place, tl.sum(tl.sum(square, 1), 0) / tokens)


def tile(block: int, width: int, dtype: torch.dtype, *, squares: bool = False) -> dict[str, int]:
    """Tokens that a program loads at a time, and its warps.

    H200, 75,600 tokens, 40 heads of 128, bf16, November 2026, ms: means .243 with 8 tokens and 4 warps, .259 with 16,
    .260 with 32, .202 with 128, .196 with 128 and 2 warps; the means of squares too .231 with 8 and 4 warps, .223 with
    32, .253 with 64.
    """
    numbers = 4096 if squares or dtype == torch.float32 else 16384
    rows = max(1, min(triton.next_power_of_2(block), numbers // width))
    return dict(ROWS=rows, num_warps=2 if numbers == 16384 else 4)


def pool_triton(
    x: Tensor, index: Tensor | None, block: int, blocks: int, mask: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """Mean of the real tokens of every block; neither padding nor masked tokens are read.

    Args:
        x: (B, L, H, D), any strides.
        index: int64 (B|1, H|1, blocks * block), token at each slot and -1 for padding; None: slot = token.
        block, blocks: slots of a block, and how many blocks there are.
        mask: bool (B, L), True where the token is real; None: all are.
        squares: float32 (B, H, blocks), contiguous: written to, the mean of the tokens' squared norms.

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
            x, index, mask, out, squares, *x.stride(), *index_strides, *mask_strides, H, L, blocks,
            D=D, WIDTH=width, BLOCK=block,
            **tile(block, width, x.dtype, squares=squares is not None))
    return out
